"""The iterations of feedback training on one block and batch, in slices shared by threads.

A rule brings `iterate`, its iteration on some samples in the primitives of `arraytp.model.passes.Samples`. Here they
are computed, and what all iterations share is computed once per batch: θ ∘ s and a(s^{n+1}). While one iteration is
computed the next one's noise is drawn.

A block goes one of two ways. *By lanes*, for convolutions of many positions: each lane, a fixed part of the batch, runs
`iterate` on slices that fit a cache and sums up its own gradient. *Gathered*, for dense blocks and convolutions of
small maps: the factors x and d of all products x ⋆ d and all samples are gathered above each other first; one long
product, whose rows are shared by the threads, then gives the gradient.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

import numpy as np

from arraytp.backend import Array, array_module
from arraytp.fast import cuts
from arraytp.fast.buffers import Buffers
from arraytp.fast.modules import write_input
from arraytp.fast.parallel import Task, Workspace, even_slices, slices
from arraytp.fast.pools import pool
from arraytp.fast.products import Dense, Products, matmul, patch_products, split_products
from arraytp.model.passes import At, Iterate, NoiseAndProducts, Sums
from arraytp.ops.conv import as_matrix
from arraytp.ops.noise import EPSILON, ETA, chunks, gaussian
from arraytp.options import Unpool

OWNER = "feedback training"
ROW_TILES = 8
TILED_SIZE = 1 << 16
# Positions a column of the weight from which on lanes are the better way.
POSITIONS_PER_COLUMN = 4


class Iterations:
    """What all iterations on one block and batch share; see `arraytp.model.passes.Iterations`.

    Parameters
    ----------
    at : At
    unpool, training
        See `At.iterations`.
    workspace : Workspace
        Holds everything until the next `Iterations` are made.
    """

    def __init__(self, at: At, unpool: Unpool, training: NoiseAndProducts, workspace: Workspace) -> None:
        block, self.at, self.unpool, self.workspace = at.block, at, unpool, workspace
        self.own = workspace.of(OWNER)
        self.s = at.s.reshape(len(at.s), *block.in_shape)
        self.by_lanes = _many_positions(at)
        self.products: Products = split_products(block) if self.by_lanes else patch_products(block)
        self.theta = self.products.matrix(at.weight)
        self.z = self.own.array("z", (len(self.s), *block.pre_shape), self.s.dtype)
        self.a = self.own.array("a", self.z.shape, self.s.dtype)
        self._noise, self._products = Noise(self, training), training.products
        self._share()

    def _share(self) -> None:
        """Compute z = θ ∘ s^n, without the bias, and a(s^{n+1})."""
        at, matrix, by_patches = self.at, as_matrix(self.at.weight), patch_products(self.at.block)

        def samples(part: slice, scratch: Buffers) -> None:
            rows = by_patches.rows(self.s[part], scratch)
            matmul(rows, matrix, self.z[part].reshape(len(rows), -1))
            t = scratch.of(OWNER).array("t", at.output[part].shape, self.s.dtype)
            t[...] = at.output[part]
            write_input(at.block, t, None if at.index is None else at.index[part], self.unpool, self.a[part], scratch)

        length = self._length()
        self.workspace.run([partial(samples, part) for part in slices(len(self.s), length)])

    def _length(self) -> int:
        return cuts.iteration_slice(
            split_products(self.at.block), len(self.s), self.s.itemsize, self.workspace.backend.on_host
        )

    def noise(self, k: int) -> dict[str, Array]:
        """Return the k-th noise, drawn ahead or now; it stays until that of k + 2 is drawn."""
        return self._noise.of(k)

    def sums(self, iterate: Iterate, k: int, omega: Array, bias: Array | None = None) -> Sums:
        """Run an iteration with the k-th noise over all samples."""
        noises = self.noise(k)
        epsilon, eta = noises["epsilon"], noises["eta" if "eta" in noises else "epsilon"]
        biases = None if bias is None else self.own.array("biases", (len(self.s), len(bias)), omega.dtype)
        matrix = self.products.matrix(omega)

        def run(part: slice, sums: "Summing", scratch: Buffers) -> Array:
            samples = Slice(self, part, sums, None if biases is None else biases[part], scratch)
            return iterate(samples, matrix, bias, epsilon[part], eta[part])

        way = self._lanes if self.by_lanes else self._gathered
        weight, returned = way(run, omega, self._noise.tasks(k + 1))
        dbias = None if biases is None else biases.sum(axis=0) * omega.dtype.type(2 / len(self.at.batch))
        return Sums(weight, dbias, returned.sum() / returned.dtype.type(len(self.at.batch)))

    def _lanes(self, run: "Run", omega: Array, ahead: list[Task]) -> tuple[Array, Array]:
        """Let every lane sum up its own gradient, then sum over the lanes."""
        lanes = cuts.lanes(omega.nbytes, len(self.s), self.workspace.backend.on_host)
        totals = self.own.array("lane sums", (len(lanes), *self.products.sum_shape), omega.dtype)
        returned = self.own.array("returned", (len(lanes),), omega.dtype)
        length = self._length()

        def lane(number: int, scratch: Buffers) -> None:
            returned[number], sums = 0, LaneSum(totals[number], scratch)
            parts = slices(lanes[number].stop, length, lanes[number].start)
            for part in parts:
                returned[number] += run(part, sums, scratch)
            _check_products(sums.taken, self._products * len(parts))

        self.workspace.run([*(partial(lane, number) for number in range(len(lanes))), *ahead])
        gradient = self.own.array("gradient", omega.shape, omega.dtype)
        folded = self.products.fold(gradient)
        total = totals.sum(axis=0).reshape(folded.shape)
        array_module(omega).multiply(total, omega.dtype.type(2 / len(self.at.batch)), out=folded)
        return gradient, returned

    def _gathered(self, run: "Run", omega: Array, ahead: list[Task]) -> tuple[Array, Array]:
        """Gather the factors of all products x ⋆ d above each other; one product sums over all."""
        matrix, xp = as_matrix(omega), array_module(omega)
        parts = cuts.lanes(omega.nbytes, len(self.s), self.workspace.backend.on_host)
        returned = self.own.array("returned", (len(parts),), omega.dtype)
        factors = Factors(self, self._products, omega)

        def samples(number: int, scratch: Buffers) -> None:
            gathering = Gathering(factors, parts[number])
            returned[number] = run(parts[number], gathering, scratch)
            gathering.finish()

        self.workspace.run([*(partial(samples, number) for number in range(len(parts))), *ahead])
        left, right = factors.gathered()
        xp.multiply(right, omega.dtype.type(2 / len(self.at.batch)), out=right)
        gradient = self.own.array("gradient", omega.shape, omega.dtype)

        def weight_rows(part: slice, scratch: Buffers) -> None:
            matmul(left[:, part].T, right, as_matrix(gradient)[part])

        tiles = ROW_TILES if matrix.size > TILED_SIZE else 1
        self.workspace.run([partial(weight_rows, part) for part in even_slices(len(matrix), tiles)])
        return gradient, returned


def _check_products(taken: int, announced: int) -> None:
    """Refuse an `iterate` that adds more or fewer products than were announced: some would be those of before.

    Raises
    ------
    ValueError
        Names both numbers.
    """
    if taken != announced:
        raise ValueError(f"iterate added {taken} products x ⋆ d where NoiseAndProducts.products announced {announced}")


Run = Callable[[slice, "Summing", Buffers], Array]
"""(samples, where products go, scratch) → what `iterate` returns for these samples."""


def _many_positions(at: At) -> bool:
    """Tell whether the rows of a product, one per position, are many more than its columns."""
    positions = len(at.batch) * math.prod(at.block.pre_shape[:-1])
    return at.block.window is not None and positions > POSITIONS_PER_COLUMN * at.block.pre_shape[-1]


class Slice:
    """Some samples of the block in one iteration: `arraytp.model.passes.Samples`."""

    def __init__(
        self, shared: Iterations, part: slice, sums: "Summing", biases: Array | None, scratch: Buffers
    ) -> None:
        at, self._shared, self._part, self._sums = shared.at, shared, part, sums
        self._biases, self._scratch, self._own = biases, scratch, scratch.of(OWNER)
        self.s, self.s_next, self.a_next = shared.s[part], at.output[part], shared.a[part]
        self.index = None if at.index is None else at.index[part]
        # How many results each primitive has given: they stay apart, so that a rule may hold as many as it likes.
        self._given = {"F": 0, "a": 0, "transposed": 0}
        # The x whose rows, and the d whose stack, were made last.
        self._rows: tuple[Array, Array] | None = None
        self._stack: tuple[Array, Array] | None = None

    def F(self, epsilon: Array) -> tuple[Array, Array | None]:
        """Return F^n(s^n + ε) and the maxima of its pool; bias and f come after the pool, as in a forward pass."""
        shared, block = self._shared, self._shared.at.block
        # With a pool z itself is not given away: it takes the memory of the next a.
        z = self._array("F" if block.pool is None else "a", "z", block.pre_shape)
        shared.products.add_affine(self._rows_of(epsilon), shared.theta, shared.z[self._part], z, self._scratch)
        if block.pool is None:
            z += shared.at.bias
            self._given["F"] += 1
            return block.activation(z, out=z), None
        s, index = self._array("F", "s", block.out_shape), self._array("F", "index", block.out_shape, np.uint8)
        # Which of ReLU's zeros is the maximum does not matter here: what is put there is 0.
        pool(z, block.pool, s, index, self._scratch)
        s += shared.at.bias
        self._given["F"] += 1
        return block.activation(s, out=s), index

    def a(self, t: Array, index: Array | None) -> Array:
        """Return a(t) = f(unpool(t)); t is overwritten."""
        block = self._shared.at.block
        if block.pool is None:
            return block.activation(t, out=t)
        out = self._array("a", "z", block.pre_shape)
        self._given["a"] += 1
        write_input(block, t, index, self._shared.unpool, out, self._scratch)
        return out

    def transposed(self, omega: Array, d: Array) -> Array:
        """Return ω ∘ d."""
        products, self._rows = self._shared.products, None
        self._given["transposed"] += 1
        # A dense block's rows are ω ∘ d itself.
        room = self._sums.result_room() if isinstance(products, Dense) else None
        r = products.transposed(self._stack_of(d), omega, len(d), self._scratch, room, self._given["transposed"])
        if room is not None:
            self._rows = r, room
        return r

    def add(self, x: Array, d: Array) -> None:
        """Add x ⋆ d to the sum."""
        self._sums.add(1, self._rows_of(x), self._stack_of(d))

    def subtract(self, x: Array, d: Array) -> None:
        """Subtract x ⋆ d from the sum."""
        self._sums.add(-1, self._rows_of(x), self._stack_of(d))

    def add_bias(self, r: Array) -> None:
        """Add r, summed over positions, to the samples' parts of the bias."""
        if self._biases is not None:
            r.reshape(len(r), -1, self._biases.shape[-1]).sum(axis=1, out=self._biases)

    def square(self, r: Array) -> Array:
        """Return ‖r‖²."""
        flat = r.reshape(-1)
        return array_module(r).dot(flat, flat)

    def _array(self, primitive: str, name: str, shape: tuple[int, ...], dtype: object = None) -> Array:
        """Return room for the next result of a primitive."""
        key = primitive, self._given[primitive], name
        return self._own.array(key, (len(self.s), *shape), dtype or self.s.dtype)

    def _rows_of(self, x: Array) -> Array:
        if self._rows is None or self._rows[0] is not x:
            self._rows = x, self._shared.products.rows(x, self._scratch, self._sums.room())
            _protect(x)
        return self._rows[1]

    def _stack_of(self, d: Array) -> Array:
        if self._stack is None or self._stack[0] is not d:
            self._stack = d, self._shared.products.stack(d, self._scratch)
            _protect(d)
        return self._stack[1]


def _protect(array: Array) -> None:
    """Make an array whose patches are kept read-only, where that is possible."""
    if isinstance(array, np.ndarray):
        array.flags.writeable = False


class Summing(Protocol):
    """Where the products x ⋆ d of a slice go."""

    def room(self) -> Array | None:
        """Return where the rows of x may be written so that `add` need not copy them."""

    def result_room(self) -> Array | None:
        """Return where a result may be written that is itself the rows of a product's x."""

    def add(self, sign: int, rows: Array, stacked: Array) -> None:
        """Take sign · Rᵀ V."""


class LaneSum:
    """Sums up the products of a lane's slices."""

    def __init__(self, total: Array, scratch: Buffers) -> None:
        self.total, self.scratch, self.taken = total, scratch, 0

    def room(self) -> None:
        """Return None: rows go to scratch."""
        return

    def result_room(self) -> None:
        """Return None: results go to scratch."""
        return

    def add(self, sign: int, rows: Array, stacked: Array) -> None:
        """Write the first product to the sum, add others to it."""
        self.taken += 1
        if self.taken == 1:
            matmul(rows.T, stacked, self.total)
            if sign < 0:
                array_module(self.total).negative(self.total, out=self.total)
            return
        share = self.scratch.of(OWNER).array("share", self.total.shape, self.total.dtype)
        matmul(rows.T, stacked, share)
        if sign < 0:
            self.total -= share
        else:
            self.total += share


class Factors:
    """The rows of x, and ± d, of all products x ⋆ d and all samples, above each other."""

    def __init__(self, shared: Iterations, products: int, omega: Array) -> None:
        (inputs, outputs), self.per_sample = as_matrix(omega).shape, shared.products.sample_rows
        rows = len(shared.s) * self.per_sample
        self.x = shared.own.array("x factors", (products, rows, inputs), omega.dtype)
        self.d = shared.own.array("d factors", (products, rows, outputs), omega.dtype)

    def gathered(self) -> tuple[Array, Array]:
        """Return all rows of x, and all of d."""
        return self.x.reshape(-1, self.x.shape[-1]), self.d.reshape(-1, self.d.shape[-1])


class Gathering:
    """Takes the factors of some samples' products, each in a place of its own.

    A result of `transposed` is written to the last free place, where it need not be copied if it is added.
    """

    def __init__(self, factors: Factors, part: slice) -> None:
        rows = slice(part.start * factors.per_sample, part.stop * factors.per_sample)
        self._x, self._d, self._free, self.taken = factors.x[:, rows], factors.d[:, rows], [*range(len(factors.x))], 0
        self._room: Array | None = None
        # The place that holds a result, the result, and rows that need the place although the rule may hold the result.
        self._held: int | None = None
        self._result: Array | None = None
        self._late: Array | None = None

    def _next(self) -> int | None:
        """Return the first place that is free and holds no result."""
        return next((place for place in self._free if place != self._held), None)

    def room(self) -> Array | None:
        """Return where the rows of the next product's x may be written, None where there is no place."""
        place = self._next()
        if self._room is None and place is not None:
            self._room = self._x[place]
        return self._room

    def result_room(self) -> Array | None:
        """Return where a result may be written that is to be x of a product, None where there is no place."""
        if self._held is not None or not self._free:
            return None
        self._held, self._room = self._free[-1], None
        self._result = self._x[self._held]
        return self._result

    def add(self, sign: int, rows: Array, stacked: Array) -> None:
        """Take the factors of a product."""
        self.taken += 1
        place = self._held if rows is self._result else self._next()
        if place is None or place not in self._free:
            if not self._free:
                _check_products(self.taken, len(self._x))
            place, self._late = self._free[0], rows.copy()
        elif rows is not self._result and rows is not self._room:
            self._x[place] = rows
        self._free.remove(place)
        array_module(stacked).multiply(stacked, stacked.dtype.type(sign), out=self._d[place])
        self._room = None

    def finish(self) -> None:
        """Put what had to wait into its place: the rule holds no result any more."""
        _check_products(self.taken, len(self._x))
        if self._late is not None and self._held is not None:
            self._x[self._held] = self._late


class Noise:
    """The noises of the iterations; those of two iterations are held at once."""

    def __init__(self, shared: Iterations, training: NoiseAndProducts) -> None:
        at, self._own, self._workspace, self._training = shared.at, shared.own, shared.workspace, training
        self._key = at.batch.seed, at.batch.number, at.n
        self._first = at.batch.first
        self._like = {"epsilon": (EPSILON, shared.s)} | ({"eta": (ETA, at.output)} if training.output_noise else {})
        self._drawn: dict[int, dict[str, Array]] = {}

    def of(self, k: int) -> dict[str, Array]:
        """Return the k-th noise, by name."""
        if k not in self._drawn:
            self._workspace.run(self.tasks(k))
        return self._drawn[k]

    def tasks(self, k: int) -> list[Task]:
        """Return tasks that draw the k-th noise, unless there is none or it is drawn already."""
        if k >= self._training.noises or k in self._drawn:
            return []
        # Every other iteration's noise shares a buffer.
        self._drawn = {other: noise for other, noise in self._drawn.items() if other % 2 != k % 2}
        tasks: list[Task] = []
        arrays = self._drawn[k] = {}
        for name, (kind, like) in self._like.items():
            array = arrays[name] = self._own.array(("noise", kind, k % 2), like.shape, like.dtype)
            parts = chunks(len(array), self._first) if self._workspace.backend.on_host else [slice(0, len(array))]
            tasks += [partial(self._draw, array[part], self._first + part.start, k, kind) for part in parts]
        return tasks

    def _draw(self, out: Array, first: int, k: int, kind: int, scratch: Buffers) -> None:
        gaussian(out, self._training.sigma, first, *self._key, k, kind)

"""The iterations of feedback training on one block and batch, in slices shared by threads.

A rule supplies `iterate`, one iteration on some samples, written in the primitives of `arraytp.model.passes.Samples`.
This module computes the primitives; θ ∘ s and a(s^{n+1}), which all iterations share, are computed once per batch. The
next iteration's noise is drawn while the current iteration is computed.

The batch is cut into fixed parts, the lanes. The products x ⋆ d are summed in one of two ways. *By lanes*, for
convolutions with many positions: each lane runs `iterate` on slices that fit a cache and sums its own gradient
(`LaneSums`). *Gathered*, for dense blocks and convolutions on small maps: the factors x and d of all products and all
samples are stacked first; one long product, whose rows the threads share, then gives the gradient (`Gathered`).
"""

import math
from functools import partial

import numpy as np

from arraytp.backend import Array, array_module
from arraytp.fast.modules import write_input
from arraytp.fast.parallel import Task, Workspace, even_slices, slices
from arraytp.fast.passes import pool
from arraytp.fast.products import Patches, Products, iteration_slice, matmul, split_products
from arraytp.model.passes import At, Iterate, NoiseAndProducts, Sums
from arraytp.ops.conv import as_matrix
from arraytp.ops.noise import chunks, gaussian
from arraytp.options import Unpool

OWNER = "feedback training"
ROW_TILES = 8
TILED_SIZE = 1 << 16
# With more positions in the batch per column of the weight than this, summing by lanes is faster.
POSITIONS_PER_COLUMN = 4


def noise(workspace: Workspace, out: Array, sigma: float, first: int, *key: int) -> Array:
    """Fill an array with the N(0, σ²) noise of a key and return it: `Batch.noise`."""
    workspace.run(_drawing(workspace, out, sigma, first, *key))
    return out


def _drawing(workspace: Workspace, out: Array, sigma: float, first: int, *key: int) -> list[Task]:
    parts = chunks(len(out), first)
    return [partial(gaussian, out[part], sigma, first + part.start, *key) for part in parts]


class Iterations:
    """What all iterations on one block and batch share; see `arraytp.model.passes.Iterations`.

    Parameters
    ----------
    workspace : Workspace
        Holds all arrays until the next `Iterations` is created.
    at : At
    unpool, training
        See `At.iterations`.
    """

    def __init__(self, workspace: Workspace, at: At, unpool: Unpool, training: NoiseAndProducts) -> None:
        self.workspace, self.at, self.unpool, self.training = workspace, at, unpool, training
        block, self.own = at.block, workspace.of(OWNER)
        self.s = at.s.reshape(len(at.s), *block.in_shape)
        positions = len(at.batch) * math.prod(block.pre_shape[:-1])
        self.by_lanes = block.window is not None and positions > POSITIONS_PER_COLUMN * block.pre_shape[-1]
        split, patches = split_products(block), Patches(block)
        self.products: Products = split if self.by_lanes else patches
        self.theta = self.products.matrix(at.weight)
        self.z = self.own.array("z", (len(self.s), *block.pre_shape), self.s.dtype)
        self.a = self.own.array("a", self.z.shape, self.s.dtype)
        self.length = iteration_slice(split, len(self.s), self.s.itemsize)
        self._drawn: dict[int, dict[str, Array]] = {}
        workspace.run([partial(self._share, patches, part) for part in slices(len(self.s), self.length)])

    def _share(self, patches: Patches, part: slice) -> None:
        """Compute z = θ ∘ s^n, without the bias, and a(s^{n+1}) of some samples."""
        at, scratch = self.at, self.workspace.scratch
        rows = patches.rows(self.s[part], scratch)
        matmul(rows, as_matrix(at.weight), self.z[part].reshape(len(rows), -1))
        t = scratch.of(OWNER).array("t", at.output[part].shape, self.s.dtype)
        t[...] = at.output[part]
        write_input(at.block, t, None if at.index is None else at.index[part], self.unpool, self.a[part], scratch)

    def noise(self, k: int) -> dict[str, Array]:
        """Return the k-th noise, drawing it unless it was drawn ahead; valid until noise k + 2 is drawn."""
        if k not in self._drawn:
            self.workspace.run(self._draw(k))
        return self._drawn[k]

    def _draw(self, k: int) -> list[Task]:
        """Return tasks that draw the k-th noise; no tasks if there is no such noise or it is drawn already."""
        if k >= self.training.noises or k in self._drawn:
            return []
        # Every other iteration's noise shares a buffer.
        self._drawn = {other: noises for other, noises in self._drawn.items() if other % 2 != k % 2}
        at, tasks, self._drawn[k] = self.at, list[Task](), {}
        for name, (kind, like) in self.training.kinds(self.s, at.output).items():
            out = self._drawn[k][name] = self.own.array(("noise", kind, k % 2), like.shape, like.dtype)
            key = at.batch.first, at.batch.seed, at.batch.number, at.n, k, kind
            tasks += _drawing(self.workspace, out, self.training.sigma, *key)
        return tasks

    def sums(self, iterate: Iterate, k: int, omega: Array, bias: Array | None = None) -> Sums:
        """Run an iteration with the k-th noise over all samples.

        Raises
        ------
        ValueError
            If `iterate` adds more or fewer products than announced: the sum would miss some, or include stale ones.
        """
        noises, samples, scalar = self.noise(k), len(self.s), omega.dtype.type
        epsilon, eta = noises["epsilon"], noises["eta" if "eta" in noises else "epsilon"]
        parts, matrix = self.workspace.lanes(omega.nbytes, samples), self.products.matrix(omega)
        length = self.length if self.by_lanes else samples
        products = (LaneSums if self.by_lanes else Gathered)(self, omega, len(parts))
        biases = None if bias is None else self.own.array("biases", (samples, len(bias)), omega.dtype)
        returned = self.own.array("returned", (len(parts),), omega.dtype)

        def lane(number: int) -> None:
            returned[number] = 0
            for part in slices(parts[number].stop, length, parts[number].start):
                done = Slice(self, number, part, products, None if biases is None else biases[part])
                returned[number] += iterate(done, matrix, bias, epsilon[part], eta[part])
                if biases is not None and not done.has_bias:
                    biases[part] = 0
                if done.taken != self.training.products:
                    raise ValueError(
                        f"iterate added {done.taken} products x ⋆ d where NoiseAndProducts.products announced "
                        f"{self.training.products}"
                    )

        self.workspace.run([*(partial(lane, number) for number in range(len(parts))), *self._draw(k + 1)])
        weight = self.own.array("gradient", omega.shape, omega.dtype)
        products.write_mean(weight)
        dbias = None if biases is None else biases.sum(axis=0) * scalar(2 / len(self.at.batch))
        return Sums(weight, dbias, returned.sum() / scalar(len(self.at.batch)))


class Slice:
    """Some samples of the block in one iteration: `arraytp.model.passes.Samples`."""

    def __init__(
        self, shared: Iterations, lane: int, part: slice, products: "LaneSums | Gathered", biases: Array | None
    ) -> None:
        at, self._shared, self.lane, self.part, self._sums = shared.at, shared, lane, part, products
        self._biases, self.scratch = biases, shared.workspace.scratch
        self.s, self.s_next, self.a_next = shared.s[part], at.output[part], shared.a[part]
        self.index = None if at.index is None else at.index[part]
        # How many products were taken, and whether anything was added to the bias.
        self.taken, self.has_bias = 0, False
        # How many results each primitive has returned: each has its own memory, so that a rule may hold any number.
        self._given = {"F": 0, "a": 0, "transposed": 0}
        # The last x, the number of the product that its rows were made for, and the rows; the last d and its stack.
        self._rows: tuple[Array, int, Array] | None = None
        self._stack: tuple[Array, Array] | None = None

    def F(self, epsilon: Array) -> tuple[Array, Array | None]:
        """Return F^n(s^n + ε) and the maxima of its pool; bias and f come after the pool, as in a forward pass."""
        shared, block, index = self._shared, self._shared.at.block, None
        # With a pool, z itself is not returned: it uses the memory of the next a.
        z = self._array("F" if block.pool is None else "a", "z", block.pre_shape)
        # `add_affine` may overwrite the memory of the stack.
        self._stack = None
        shared.products.add_affine(self._rows_of(epsilon), shared.theta, shared.z[self.part], z, self.scratch)
        s = z
        if block.pool is not None:
            s, index = self._array("F", "s", block.out_shape), self._array("F", "index", block.out_shape, np.uint8)
            block.activation.tie(z, shared.at.bias)
            pool(z, block.pool, s, index, self.scratch)
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
        write_input(block, t, index, self._shared.unpool, out, self.scratch)
        return out

    def transposed(self, omega: Array, d: Array) -> Array:
        """Return ω ∘ d."""
        # `transposed` may overwrite the memory of the rows.
        self._rows = None
        self._given["transposed"] += 1
        return self._shared.products.transposed(self._stack_of(d), omega, self.scratch, key=self._given["transposed"])

    def add(self, x: Array, d: Array, sign: int = 1) -> None:
        """Add x ⋆ d to the sum."""
        self._sums.add(self, sign, self._rows_of(x), self._stack_of(d))
        self.taken += 1

    def subtract(self, x: Array, d: Array) -> None:
        """Subtract x ⋆ d from the sum."""
        self.add(x, d, -1)

    def add_bias(self, r: Array) -> None:
        """Add r, summed over positions, to each sample's part of the bias's gradient."""
        if self._biases is None:
            return
        parts = r.reshape(len(r), -1, self._biases.shape[-1])
        if self.has_bias:
            self._biases += parts.sum(axis=1)
        else:
            parts.sum(axis=1, out=self._biases)
        self.has_bias = True

    def square(self, r: Array) -> Array:
        """Return ‖r‖²."""
        flat = r.reshape(-1)
        return array_module(r).dot(flat, flat)

    def _array(self, primitive: str, name: str, shape: tuple[int, ...], dtype: object = None) -> Array:
        """Return memory for the next result of a primitive."""
        key = primitive, self._given[primitive], name
        return self.scratch.of(OWNER).array(key, (len(self.s), *shape), dtype or self.s.dtype)

    def _rows_of(self, x: Array) -> Array:
        """Return the rows of x, stored where the next product reads them."""
        if self._rows is None or self._rows[0] is not x or self._rows[1] != self.taken:
            rows = self._shared.products.rows(x, self.scratch, self._sums.room(self))
            self._rows = x, self.taken, rows
            x.flags.writeable = False
        return self._rows[2]

    def _stack_of(self, d: Array) -> Array:
        if self._stack is None or self._stack[0] is not d:
            self._stack = d, self._shared.products.stack(d, self.scratch)
            d.flags.writeable = False
        return self._stack[1]


class LaneSums:
    """The products x ⋆ d, summed lane by lane."""

    def __init__(self, shared: Iterations, omega: Array, lanes: int) -> None:
        self._batch, self._products = len(shared.at.batch), shared.products
        self._totals = shared.own.array("lane sums", (lanes, *shared.products.sum_shape), omega.dtype)
        self._totals.fill(0)

    def room(self, samples: Slice) -> None:
        """Return None: rows go to scratch."""
        return

    def add(self, samples: Slice, sign: int, rows: Array, stacked: Array) -> None:
        """Add sign · Rᵀ V to the lane's sum."""
        total = self._totals[samples.lane]
        share = samples.scratch.of(OWNER).array("share", total.shape, total.dtype)
        matmul(rows.T, stacked, share)
        xp = array_module(total)
        (xp.add if sign > 0 else xp.subtract)(total, share, out=total)

    def write_mean(self, out: Array) -> None:
        """Write 2/B times the sum over the lanes to an array of ω's shape."""
        folded = self._products.fold(out)
        total = self._totals.sum(axis=0).reshape(folded.shape)
        array_module(out).multiply(total, out.dtype.type(2 / self._batch), out=folded)


class Gathered:
    """The rows of x, and of ± d, of all products x ⋆ d and all samples, stacked."""

    def __init__(self, shared: Iterations, omega: Array, lanes: int) -> None:
        (inputs, outputs), self._sample_rows = as_matrix(omega).shape, shared.products.sample_rows
        self._batch, self._workspace = len(shared.at.batch), shared.workspace
        shape = shared.training.products, len(shared.s) * self._sample_rows
        self._x = shared.own.array("x factors", (*shape, inputs), omega.dtype)
        self._d = shared.own.array("d factors", (*shape, outputs), omega.dtype)

    def _rows(self, samples: Slice) -> slice:
        return slice(samples.part.start * self._sample_rows, samples.part.stop * self._sample_rows)

    def room(self, samples: Slice) -> Array | None:
        """Return where to write the rows of the next product's x; None for more products than announced."""
        return self._x[samples.taken, self._rows(samples)] if samples.taken < len(self._x) else None

    def add(self, samples: Slice, sign: int, rows: Array, stacked: Array) -> None:
        """Store sign · d of a product; the rows of its x are in place already."""
        if samples.taken < len(self._d):
            out = self._d[samples.taken, self._rows(samples)]
            array_module(stacked).multiply(stacked, stacked.dtype.type(sign), out=out)

    def write_mean(self, out: Array) -> None:
        """Write 2/B times the sum of all products to an array of ω's shape."""
        x, d = (factors.reshape(-1, factors.shape[-1]) for factors in (self._x, self._d))
        array_module(d).multiply(d, d.dtype.type(2 / self._batch), out=d)
        matrix = as_matrix(out)
        parts = even_slices(len(matrix), ROW_TILES if matrix.size > TILED_SIZE else 1)
        self._workspace.run([partial(matmul, x[:, part].T, d, matrix[part]) for part in parts])

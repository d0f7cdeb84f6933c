"""The engine of a GPU: one launch per operation, on whole batches, because nothing has to fit a cache.

All work between two products is one kernel (`arraytp.ops.kernels`). The rest is inherited from `Fast`.
"""

from typing import Any

import numpy as np

from arraytp.backend import NUMPY, Array, Backend, add_product
from arraytp.fast.engine import Fast
from arraytp.fast.inverse import is_formed, transposed_inverse
from arraytp.fast.overlaps import per_tap
from arraytp.model.blocks import Block, Network
from arraytp.model.passes import At, ForwardPass, Gradients, Iterate, NoiseAndProducts, Sums, Through
from arraytp.ops import kernels
from arraytp.ops.activations import LINEAR
from arraytp.ops.conv import as_matrix
from arraytp.ops.noise import gaussian
from arraytp.ops.solve import LU, Cholesky, PseudoInverse
from arraytp.options import Unpool

OWNER = "device"


class Device(Fast):
    """An `arraytp.model.passes.Engine` for a device."""

    def product(self, a: Array, b: Array, out: Array) -> Array:
        """See `Batch.product`."""
        return add_product(a, b, out)

    def noise(self, out: Array, sigma: float, first: int, *key: int) -> Array:
        """See `Batch.noise`."""
        seed, number, *of_what = key
        held = self.number("step", number, np.uint64) if kernels.has_kernels(out) else number
        return gaussian(out, sigma, first, seed, held, *of_what)

    def forward(self, network: Network, x: Array, name: str = "forward") -> ForwardPass:
        """Run the network: patches, product, and one kernel for bias, pool and activation."""
        own, done = self.of((OWNER, name)), ForwardPass([x], [], [])
        for n, block in enumerate(network.blocks):
            rows = self.rows(block, done.s[n])
            output = own.array((n, "output"), (len(x), *block.out_shape), x.dtype)
            index = None if block.pool is None else own.array((n, "index"), output.shape, np.uint8)
            z = output if block.pool is None else self.room("z", (len(x), *block.pre_shape), x.dtype)
            add_product(rows, as_matrix(network.weights[n]), z.reshape(len(rows), -1))
            kernels.activate(block.activation, block.pool, z, network.biases[n], output, index)
            s_next = output
            if block.auxiliary:
                s_next = own.array((n, "handed on"), (len(x), *block.next_shape), x.dtype)
                s_next[...] = output[..., : s_next.shape[-1]]
            done.s.append(s_next)
            done.outputs.append(output)
            done.index.append(index)
        return done

    def backward(self, at: At, ds: Array, through: Through | None, scale: float | Array | None) -> Gradients:
        """See `At.backward`."""
        if isinstance(through, Cholesky | LU | PseudoInverse):
            return super().backward(at, ds, through, scale)
        block, s = at.block, at.s
        own, ds = self.of((OWNER, at.batch.results, at.n)), ds.reshape(at.s_next.shape)
        dz = self.room("dz", (len(s), *block.pre_shape), s.dtype)
        kernels.unpool_gradient(block.activation, block.pool, ds, at.output, at.index, scale, dz)
        dweight = own.array("dweight", block.weight_shape, s.dtype)
        dbias = own.array("dbias", block.weight_shape[-1:], s.dtype)
        stacked = dz.reshape(-1, dz.shape[-1])
        add_product(self.rows(block, s).T, stacked, as_matrix(dweight))
        ones = self.of(OWNER).filled("ones", (len(stacked),), s.dtype, 1.0)
        add_product(ones[None], stacked, dbias[None])
        if through is None:
            return dweight, dbias, None
        carrier: Array = through
        if through.shape != block.weight_shape:
            # `through` has only the units that are handed on: auxiliary ones get zeros.
            carrier = self.room("through", block.weight_shape, s.dtype)
            carrier[...] = 0
            carrier[..., : through.shape[-1]] = through
        return dweight, dbias, self.transposed(block, carrier, dz, own.array("ds", s.shape, s.dtype))

    def feedback(self, at: At, omega: Array, bias: Array, t: Array, unpool: Unpool) -> Array:
        """See `At.feedback`."""
        a = self.room("a", (len(t), *at.block.pre_shape), t.dtype)
        kernels.unpool_input(at.block.activation, at.block.pool, t.reshape(at.output.shape), at.index, unpool, a)
        out = self._carried(at, omega, a)
        out.reshape(len(t), *at.block.in_shape)[...] += bias
        return out

    def feedback_difference(self, at: At, omega: Array, delta: Array, unpool: Unpool) -> Array:
        """See `At.feedback_difference`."""
        f, pool, s = at.block.activation, at.block.pool, at.output
        d = self.room("a", (len(s), *at.block.pre_shape), s.dtype)
        kernels.unpool_difference(f, pool, s, delta.reshape(s.shape), at.index, unpool, d)
        return self._carried(at, omega, d)

    def carry(self, at: At, d: Array, inverse: PseudoInverse) -> Array:
        """See `At.carry`."""
        if not is_formed(at, inverse):
            return super().carry(at, d, inverse)
        d, a = d.reshape(at.output.shape), self.room("a", (len(at.s), *at.block.pre_shape), d.dtype)
        kernels.unpool_gradient(LINEAR, at.block.pool, d, d, at.index, None, a)
        return self._carried(at, transposed_inverse(self, at.block, inverse), a)

    def _carried(self, at: At, omega: Array, a: Array) -> Array:
        own = self.of((OWNER, at.batch.results, at.n))
        return self.transposed(at.block, omega, a, own.array("transposed", at.s.shape, at.s.dtype))

    def jacobian_overlap(self, at: At, unpool: Unpool) -> tuple[Array, Array]:
        """Return N and M: a kernel each for the values at every position, summed over samples, then for each tap."""
        block, s = at.block, at.output
        values = self.room("overlap", (2, len(s), *block.pre_shape), s.dtype)
        kernels.slope_products(block.activation, block.pool, s, at.index, unpool, values[0], values[1])
        n, m = values.sum(axis=1).reshape(2, -1)
        return per_tap(block, n, self.of(OWNER)), per_tap(block, m, self.of(OWNER))

    def iterations(self, at: At, unpool: Unpool, training: NoiseAndProducts) -> "Iterations":
        """See `At.iterations`."""
        return Iterations(self, at, unpool, training)

    def room(self, name: object, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return memory that the next call with this name reuses."""
        return self.of(OWNER).array(name, shape, dtype)

    def rows(self, block: Block, x: Array, name: object = "rows") -> Array:
        """Return x as the rows that multiply a weight's matrix; those of a convolution are in scratch of this name."""
        if block.window is None:
            return x.reshape(len(x), -1)
        window, matrix_rows = block.window, block.window.kernel**2 * block.in_shape[-1]
        out = self.room(name, (len(x), window.out_height, window.out_width, matrix_rows), x.dtype)
        return kernels.im2col(x, window, out).reshape(-1, matrix_rows)

    def transposed(self, block: Block, weight: Array, d: Array, out: Array) -> Array:
        """Write the transposed affine map of d, of shape (B, *pre_shape), to `out`, of s^n's shape, and return it."""
        stacked, matrix = d.reshape(-1, d.shape[-1]), as_matrix(weight)
        if block.window is None:
            add_product(stacked, matrix.T, out.reshape(len(stacked), -1))
            return out
        dpatches = self.room("rows", (len(stacked), len(matrix)), d.dtype)
        add_product(stacked, matrix.T, dpatches)
        kernels.col2im(dpatches.reshape(*d.shape[:-1], -1), block.window, out.reshape(len(d), *block.in_shape))
        return out


class Iterations:
    """The iterations of feedback training on one block, all samples at once: both `Iterations` and `Samples`."""

    def __init__(self, engine: Device, at: At, unpool: Unpool, training: NoiseAndProducts) -> None:
        block, self._engine, self._at, self._unpool, self._training = at.block, engine, at, unpool, training
        self.s, self.s_next, self.index = at.s.reshape(len(at.s), *block.in_shape), at.output, at.index
        self._own = engine.of((OWNER, "iterations"))
        self._z = self._array("z", block.pre_shape)
        rows = engine.rows(block, self.s)
        add_product(rows, as_matrix(at.weight), self._z.reshape(len(rows), -1))
        self.a_next = self._array("a_next", block.pre_shape)
        kernels.unpool_input(block.activation, block.pool, self.s_next, self.index, unpool, self.a_next)
        self._drawn: tuple[int, dict[str, Array]] | None = None
        self._given = 0
        self._rows: tuple[Array, Array] | None = None
        self._bias: Array | None = None
        self._products = 0

    def noise(self, k: int) -> dict[str, Array]:
        """Return the k-th noise; it stays valid until noise k + 2 is drawn."""
        if self._drawn is None or self._drawn[0] != k:
            batch = self._at.batch
            drawn = {
                name: self._engine.noise(
                    self._array(("noise", kind, k % 2), like.shape[1:]), self._training.sigma, batch.first,
                    batch.seed, batch.number, self._at.n, k, kind,
                )
                for name, (kind, like) in self._training.kinds(self.s, self.s_next).items()
            }  # fmt: skip
            self._drawn = k, drawn
        return self._drawn[1]

    def sums(self, iterate: Iterate, k: int, omega: Array, bias: Array | None = None) -> Sums:
        """Run an iteration with the k-th noise."""
        noises = self.noise(k)
        self._weight = self._own.array("weight", omega.shape, omega.dtype)
        self._given, self._rows, self._bias, self._products = 0, None, None, 0
        returned = iterate(self, omega, bias, noises["epsilon"], noises.get("eta", noises["epsilon"]))
        if bias is not None and self._bias is None:
            self._bias = self._own.array("bias", bias.shape, bias.dtype)
            self._bias.fill(0)
        return Sums(self._weight, self._bias, returned / omega.dtype.type(len(self._at.batch)))

    def F(self, epsilon: Array) -> tuple[Array, Array | None]:
        """Return F(s + ε): θ ∘ s is added to θ ∘ ε."""
        block = self._at.block
        out = self._next("F", block.out_shape)
        index = None if block.pool is None else self._own.array(("index", self._given), out.shape, np.uint8)
        z = out if block.pool is None else self._engine.room("z", self._z.shape, out.dtype)
        rows = self._rows_of(epsilon)
        add_product(rows, as_matrix(self._at.weight), z.reshape(len(rows), -1))
        kernels.activate(block.activation, block.pool, z, self._at.bias, out, index, base=self._z)
        return out, index

    def a(self, t: Array, index: Array | None) -> Array:
        """Return f(unpool(t))."""
        block = self._at.block
        out = self._next("a", block.pre_shape)
        return kernels.unpool_input(block.activation, block.pool, t, index, self._unpool, out)

    def transposed(self, omega: Array, d: Array) -> Array:
        """Return ω ∘ d."""
        return self._engine.transposed(self._at.block, omega, d, self._next("transposed", self.s.shape[1:]))

    def add(self, x: Array, d: Array) -> None:
        """Add 2/B times x ⋆ d."""
        self._add(1, x, d)

    def subtract(self, x: Array, d: Array) -> None:
        """Subtract 2/B times x ⋆ d."""
        self._add(-1, x, d)

    def _add(self, sign: int, x: Array, d: Array) -> None:
        add_product(
            self._rows_of(x).T, d.reshape(-1, d.shape[-1]), as_matrix(self._weight), sign * 2 / len(self._at.batch),
            float(self._products > 0),
        )  # fmt: skip
        self._products += 1

    def add_bias(self, r: Array) -> None:
        """Add 2/B times r, summed over samples and positions."""
        rows = r.reshape(-1, r.shape[-1])
        ones = self._engine.of(OWNER).filled("ones", (len(rows),), r.dtype, 1.0)
        before, self._bias = self._bias, self._own.array("bias", rows.shape[1:], r.dtype)
        add_product(ones[None], rows, self._bias[None], 2 / len(self._at.batch), float(before is not None))

    def square(self, r: Array) -> Array:
        """Return ‖r‖²."""
        self._given += 1
        flat, out = r.reshape(1, -1), self._own.array(("square", self._given), (1, 1), r.dtype)
        return add_product(flat, flat.T, out).reshape(())

    def _rows_of(self, x: Array) -> Array:
        """Return the rows of x, kept for the next product with it."""
        if self._rows is None or self._rows[0] is not x:
            self._rows = x, self._engine.rows(self._at.block, x, "kept rows")
        return self._rows[1]

    def _next(self, primitive: str, shape: tuple[int, ...]) -> Array:
        """Return memory for the next result of a primitive; it is the caller's until the iteration ends."""
        self._given += 1
        return self._array((primitive, self._given), shape)

    def _array(self, name: object, shape: tuple[int, ...]) -> Array:
        return self._own.array(name, (len(self.s), *shape), self.s.dtype)


def fast_engine(backend: Backend = NUMPY, threads: int | None = None) -> Fast:
    """Return the fast engine for a backend: `Fast` on the host, `Device` on a device; arguments as for `Workspace`."""
    return Fast(backend, threads) if backend.on_host else Device(backend)

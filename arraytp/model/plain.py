"""Every primitive in its readable form, on the whole batch at once: the reference for tests of `arraytp.fast`.

`arraytp run --plain` trains with it. First come functions of one block, then `Plain`, the engine built from them.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

from arraytp.backend import Array, Backend, array_module
from arraytp.model import feedback
from arraytp.model.blocks import Block, Network, Shape
from arraytp.model.inverse import GRAM, check_condition
from arraytp.model.passes import (
    At,
    Batch,
    ForwardPass,
    Gradients,
    GramErrors,
    Iterate,
    NoiseAndProducts,
    Sums,
    Through,
)
from arraytp.ops.conv import as_matrix, conv_backward_input, conv_backward_weight, conv_forward
from arraytp.ops.dense import dense_backward_input, dense_backward_weight, dense_forward
from arraytp.ops.excess import is_tall
from arraytp.ops.noise import gaussian
from arraytp.ops.patches import col2im, coverage, im2col
from arraytp.ops.pool import max_pool_backward, max_pool_forward
from arraytp.ops.solve import (
    LU,
    Cholesky,
    Factors,
    PseudoInverse,
    condition,
    damped_gauss_newton,
    factor,
    factor_gram,
    inverse_rows,
    right_solve,
    transposed_rows,
)
from arraytp.options import Unpool


def block_forward(block: Block, weight: Array, bias: Array, x: Array) -> tuple[Array, Array, Array | None]:
    """Return z, s^{n+1} and the pool's index (or None) of one block, plainly: affine → activation → [max-pool].

    Parameters
    ----------
    block : Block
    weight, bias : arrays
        θ of the block.
    x : array of shape (B, *in_shape)
        s^n; a dense block takes any shape of the right size.
    """
    if block.window is None:
        z = dense_forward(x.reshape(len(x), -1), weight, bias)
    else:
        z, _ = conv_forward(x, weight, bias, block.window)
    s = block.activation(z)
    if block.pool is None:
        return z, s, None
    return z, *max_pool_forward(s, block.pool)


def block_backward(
    block: Block, ds: Array, z: Array, index: Array | None, x: Array, feedback: Array | None
) -> tuple[Array, Array, Array | None]:
    """Return dW, db and the gradient of x of one block, plainly, given the gradient of its output.

    Parameters
    ----------
    block : Block
    ds : array of shape (B, *next_shape)
        Gradient of s^{n+1}; that of its auxiliary units is 0.
    z, index : arrays
        From `block_forward`.
    x : array of shape (B, *in_shape)
    feedback : array of shape weight_shape, or None
        What carries the gradient back to x: the weight itself (BP), a fixed random one (FA); None: no gradient of x.
    """
    ds = pad_auxiliary(block, ds)
    df = ds if index is None or block.pool is None else max_pool_backward(ds, index, block.pool)
    dz = block.activation.backward(df, block.activation(z))
    if block.window is None:
        dweight, dbias = dense_backward_weight(dz, x.reshape(len(x), -1))
        dx = None if feedback is None else dense_backward_input(dz, feedback).reshape(x.shape)
        return dweight, dbias, dx
    dweight, dbias = conv_backward_weight(dz, im2col(x, block.window))
    dx = None if feedback is None else conv_backward_input(dz, feedback, block.window)
    return dweight.reshape(block.weight_shape), dbias, dx


def block_inverse(block: Block, factors: Factors, bias: Array, y: Array, x: Array) -> Array:
    """Return G(y) with G(F(x)) = x of one square block without pool, plainly: f⁻¹, −b, W⁻¹, col2im (GP paper, 2.2.2).

    Overlapping patches add up to n_x ⊙ x, n_x windows over each pixel; (n_x − 1) ⊙ x of the forward pass is subtracted.

    Parameters
    ----------
    block : Block
    factors : Factors
        Of W.
    bias : array
    y : array of shape (B, *out_shape)
        Near the block's output, auxiliary units included.
    x : array of shape (B, *in_shape)
        The block's input in the forward pass; pixels that no window covers keep it.
    """
    assert block.activation.inverse is not None
    z = block.activation.inverse(y) - bias
    patches = right_solve(factors, z.reshape(-1, z.shape[-1]))
    if block.window is None:
        return patches.reshape(x.shape)
    n_x = coverage(block.window, x)
    return col2im(patches.reshape(z.shape), block.window) - (n_x - x.dtype.type(1)) * x


def pad_auxiliary(block: Block, handed_on: Array) -> Array:
    """Return an array of shape (B, *next_shape) padded to (B, *out_shape) with zeros for the auxiliary units."""
    if not block.auxiliary:
        return handed_on
    xp = array_module(handed_on)
    zeros = xp.zeros((*handed_on.shape[:-1], block.auxiliary), dtype=handed_on.dtype)
    return xp.concatenate([handed_on, zeros], axis=-1)


class Plain:
    """An `arraytp.model.passes.Engine` of readable operations; its results are new arrays.

    Parameters
    ----------
    backend : Backend
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def beside(self) -> "Plain":
        """Return this engine: its results are new arrays."""
        return self

    def run(self, tasks: Iterable[Callable[[], object]]) -> None:
        """Run the tasks one after another."""
        for task in tasks:
            task()

    def array(self, name: object, shape: Shape, dtype: Any) -> Array:
        """Return a new array."""
        return self.backend.xp.empty(shape, dtype=dtype)

    def product(self, a: Array, b: Array, out: Array) -> Array:
        """Write the matrix product a b to `out`."""
        out[...] = a @ b
        return out

    def in_slices(self, count: int, compute: Callable[[slice], None]) -> None:
        """Compute the whole batch at once."""
        compute(slice(0, count))

    def between(self, work: Callable[[], object]) -> None:
        """Do the work directly: no graph is captured."""
        work()

    def noise(self, out: Array, sigma: float, first: int, *key: int) -> Array:
        """Draw the whole batch at once."""
        return gaussian(out, sigma, first, *key)

    def forward(self, network: Network, x: Array, name: str = "forward") -> ForwardPass:
        """Run one block after the other."""
        done = ForwardPass([x], [], [])
        for block, weight, bias in zip(network.blocks, network.weights, network.biases, strict=True):
            _, output, index = block_forward(block, weight, bias, done.s[-1])
            done.outputs.append(output)
            done.index.append(index)
            done.s.append(array_module(x).ascontiguousarray(output[..., : block.next_shape[-1]]))
        return done

    def backward(self, at: At, ds: Array, through: Through | None, scale: float | Array | None) -> Gradients:
        """Return the gradients of one block; z is computed again."""
        block = at.block
        z, _, _ = block_forward(block, at.weight, at.bias, at.s)
        ds = ds.reshape(at.s_next.shape)
        if scale is not None:
            ds = ds * (ds.dtype.type(scale) if isinstance(scale, float) else scale.reshape(-1, *[1] * (ds.ndim - 1)))
        if isinstance(through, LU | Cholesky):
            # To replace Wᵀ by W⁻¹ is to replace W by W⁻ᵀ.
            through = inverse_rows(through, slice(0, len(through.matrix))).T.reshape(block.weight_shape)
        elif isinstance(through, PseudoInverse):
            through = _transposed(block, through)
        return block_backward(block, ds, z, at.index, at.s, through)

    def carry(self, at: At, d: Array, inverse: PseudoInverse) -> Array:
        """Return (unpool d) W⁺."""
        unpooled = feedback.unpooled(at.block, d.reshape(at.output.shape), at.index, "accumulate")
        return feedback.transposed(at.block, _transposed(at.block, inverse), unpooled).reshape(at.s.shape)

    def feedback(self, at: At, omega: Array, bias: Array, t: Array, unpool: Unpool) -> Array:
        """Return G(t)."""
        t = t.reshape(at.output.shape)
        return feedback.feedback_forward(at.block, omega, bias, t, at.index, unpool).reshape(at.s.shape)

    def feedback_difference(self, at: At, omega: Array, delta: Array, unpool: Unpool) -> Array:
        """Return G(s + δ) − G(s)."""
        delta = delta.reshape(at.output.shape)
        d = feedback.input_difference(at.block, at.output, delta, at.index, unpool)
        return feedback.transposed(at.block, omega, d).reshape(at.s.shape)

    def iterations(self, at: At, unpool: Unpool, training: NoiseAndProducts) -> "PlainIterations":
        """Return what the iterations share."""
        return PlainIterations(at, unpool, training)

    def jacobian_overlap(self, at: At, unpool: Unpool) -> tuple[Array, Array]:
        """Return N and M."""
        return feedback.jacobian_overlap(at.block, at.output, at.index, unpool)

    def jacobian_sums(self, batch: Batch) -> Mapping[int, tuple[Array, Array]]:
        """Return the sums over the samples."""
        jacobians = self._jacobians(batch)
        return {n: ((j @ j.transpose(0, 2, 1)).sum(axis=0), j.sum(axis=0)) for n, j in jacobians.items()}

    def gauss_newton(self, batch: Batch, damping: float) -> Mapping[int, Array]:
        """Return the changes of all samples."""
        return {n: damped_gauss_newton(j, batch.dlogits, damping) for n, j in self._jacobians(batch).items()}

    def _jacobians(self, batch: Batch) -> dict[int, Array]:
        """Return J of every sample, of shape (B, C, D), from one backward pass per class."""
        xp, classes = array_module(batch.logits), batch.logits.shape[1]
        jacobians: dict[int, list[Array]] = {n: [] for n in range(1, len(batch.network))}
        for c in range(classes):
            ds: Any = xp.zeros_like(batch.logits)
            ds[:, c] = 1
            for at in batch.down():
                if at.n > 0:
                    ds = self.backward(at, ds, at.weight, None)[2]
                    jacobians[at.n].append(ds.reshape(len(ds), -1))
        return {n: xp.stack(rows, axis=1) for n, rows in jacobians.items()}

    def gram_errors(self, network: Network) -> GramErrors:
        """Return E, computed block by block."""
        return PlainGramErrors(network)

    def inverses(self, batch: Batch) -> Mapping[int, Factors]:
        """Factorise every W but the first, one after the other."""
        factors = {}
        for n, block in enumerate(batch.network.blocks[1:], start=1):
            factors[n] = factor(as_matrix(batch.network.weights[n]))
            check_condition(block, n, factors[n].matrix.dtype, float(condition(factors[n])))
        return factors

    def pseudo_inverses(self, batch: Batch, ridge: float) -> Mapping[int, PseudoInverse]:
        """Factorise the smaller Gram matrix of every W but the first, one after the other."""
        inverses = {}
        for n, block in enumerate(batch.network.blocks[1:], start=1):
            matrix = as_matrix(batch.network.weights[n])
            gram = factor_gram(matrix, ridge)
            check_condition(block, n, matrix.dtype, float(condition(gram)), GRAM)
            inverses[n] = PseudoInverse(matrix, gram)
        return inverses

    def inverse(self, at: At, factors: Factors, y: Array) -> Array:
        """Return the input for which the output would be y."""
        return block_inverse(at.block, factors, at.bias, y, at.s)


def _transposed(block: Block, inverse: PseudoInverse) -> Array:
    """Return (W⁺)ᵀ, of weight_shape: to replace Wᵀ by W⁺ is to replace W by (W⁺)ᵀ."""
    rows = transposed_rows(inverse, slice(0, max(inverse.matrix.shape)))
    return (rows if is_tall(inverse.matrix) else rows.T).reshape(block.weight_shape)


class PlainGramErrors:
    """E = WWᵀ − I, or WᵀW − I, computed as written."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._computed: dict[int, Array] = {}

    def of(self, positions: Iterable[int]) -> Mapping[int, Array]:
        """Return E of some blocks."""
        positions = list(positions)
        for n in positions:
            if n not in self._computed:
                w = as_matrix(self._network.weights[n])
                gram = w.T @ w if is_tall(w) else w @ w.T
                self._computed[n] = gram - array_module(gram).eye(len(gram), dtype=gram.dtype)
        return {n: self._computed[n] for n in positions}


class PlainIterations:
    """The iterations of feedback training on one block, all samples at once: both `Iterations` and `Samples`."""

    def __init__(self, at: At, unpool: Unpool, training: NoiseAndProducts) -> None:
        self._at, self._unpool, self._training = at, unpool, training
        self.s, self.s_next, self.index = at.s.reshape(len(at.s), *at.block.in_shape), at.output, at.index
        self._weight = self._bias = self.s.dtype.type(0)

    @cached_property
    def a_next(self) -> Array:
        """a(s^{n+1})."""
        return self.a(self.s_next, self.index)

    def noise(self, k: int) -> dict[str, Array]:
        """Draw the k-th noise."""
        key, xp = (self._at.batch.seed, self._at.batch.number, self._at.n, k), self._at.batch.engine.backend.xp
        return {
            name: gaussian(xp.empty(like.shape, like.dtype), self._training.sigma, self._at.batch.first, *key, kind)
            for name, (kind, like) in self._training.kinds(self.s, self.s_next).items()
        }

    def sums(self, iterate: Iterate, k: int, omega: Array, bias: Array | None = None) -> Sums:
        """Run an iteration."""
        self._weight = self._bias = omega.dtype.type(0)
        if bias is not None:
            self._bias = self._at.batch.engine.backend.xp.zeros_like(bias)
        noises, batch = self.noise(k), len(self._at.batch)
        returned = iterate(self, omega, bias, noises["epsilon"], noises.get("eta", noises["epsilon"]))
        two_over_b = omega.dtype.type(2 / batch)
        dbias = None if bias is None else self._bias * two_over_b
        return Sums(self._weight * two_over_b, dbias, returned / omega.dtype.type(batch))

    def F(self, epsilon: Array) -> tuple[Array, Array | None]:
        """Return F(s + ε)."""
        _, s, index = block_forward(self._at.block, self._at.weight, self._at.bias, self.s + epsilon)
        return s, index

    def a(self, t: Array, index: Array | None) -> Array:
        """Return f(unpool(t))."""
        # A copy, since the caller may write to it.
        return feedback.feedback_input(self._at.block, t, index, self._unpool).copy()

    def transposed(self, omega: Array, d: Array) -> Array:
        """Return ω ∘ d."""
        return feedback.transposed(self._at.block, omega, d)

    def add(self, x: Array, d: Array) -> None:
        """Add x ⋆ d."""
        self._weight = self._weight + feedback.outer(self._at.block, x, d)

    def subtract(self, x: Array, d: Array) -> None:
        """Subtract x ⋆ d."""
        self._weight = self._weight - feedback.outer(self._at.block, x, d)

    def add_bias(self, r: Array) -> None:
        """Add Σ r."""
        self._bias = self._bias + r.reshape(-1, r.shape[-1]).sum(axis=0)

    def square(self, r: Array) -> Array:
        """Return ‖r‖²."""
        return (r * r).sum()

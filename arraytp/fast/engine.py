"""The fast engine: every primitive in slices that fit a cache, shared by threads, in arrays that are made once."""

from collections.abc import Callable, Mapping
from typing import Any

from arraytp.backend import Array
from arraytp.fast import feedback_training, inverse, jacobians, modules, orthogonality, overlaps, passes
from arraytp.fast.buffers import Buffers
from arraytp.fast.parallel import Task, Workspace, even_slices
from arraytp.model.blocks import Network, Shape
from arraytp.model.passes import At, Batch, ForwardPass, Gradients, GramErrors, Iterations, NoiseAndProducts, Through
from arraytp.ops.noise import chunks, gaussian
from arraytp.ops.solve import LU, Cholesky, Factors, PseudoInverse
from arraytp.options import Unpool

# Tasks of element-wise work on a batch.
SLICES = 4


class Fast:
    """An `arraytp.model.passes.Engine` on a workspace.

    Parameters
    ----------
    workspace : Workspace
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace, self.backend = workspace, workspace.backend

    def array(self, name: object, shape: Shape, dtype: Any) -> Array:
        """See `Batch.array`."""
        return self.workspace.of("engine").array(name, shape, dtype)

    def product(self, a: Array, b: Array, out: Array) -> Array:
        """See `Batch.product`."""
        return passes.product(a, b, out, self.workspace)

    def in_slices(self, count: int, compute: Callable[[slice], None]) -> None:
        """See `Batch.in_slices`."""
        parts = even_slices(count, SLICES if self.backend.on_host else 1)
        self.workspace.run([_task(compute, part) for part in parts])

    def noise(self, out: Array, sigma: float, first: int, *key: int) -> Array:
        """See `Batch.noise`."""
        parts = chunks(len(out), first) if self.backend.on_host else [slice(0, len(out))]
        self.workspace.run([_noise_task(out, part, sigma, first, key) for part in parts])
        return out

    def forward(self, network: Network, x: Array, name: str = "forward") -> ForwardPass:
        """See `arraytp.fast.passes.forward`."""
        return passes.forward(network, x, self.workspace, name)

    def backward(self, at: At, ds: Array, through: Through | None, scale: float | Array | None) -> Gradients:
        """See `At.backward`."""
        if isinstance(through, LU | Cholesky):
            return inverse.backward_through_inverse(at, ds, through, scale, self.workspace)
        if isinstance(through, PseudoInverse):
            return inverse.backward_through_pseudo_inverse(at, ds, through, scale, self.workspace)
        return passes.backward(at, ds, through, scale, self.workspace)

    def carry(self, at: At, d: Array, inverse_: PseudoInverse) -> Array:
        """See `At.carry`."""
        return inverse.carry(at, d, inverse_, self.workspace)

    def feedback(self, at: At, omega: Array, bias: Array, t: Array, unpool: Unpool) -> Array:
        """See `At.feedback`."""
        return modules.feedback(at, omega, bias, t, unpool, self.workspace)

    def feedback_difference(self, at: At, omega: Array, delta: Array, unpool: Unpool) -> Array:
        """See `At.feedback_difference`."""
        return modules.feedback_difference(at, omega, delta, unpool, self.workspace)

    def iterations(self, at: At, unpool: Unpool, training: NoiseAndProducts) -> Iterations:
        """See `At.iterations`."""
        return feedback_training.Iterations(at, unpool, training, self.workspace)

    def jacobian_overlap(self, at: At, unpool: Unpool) -> tuple[Array, Array]:
        """See `At.jacobian_overlap`."""
        return overlaps.jacobian_overlap(at, unpool, self.workspace)

    def jacobian_sums(self, batch: Batch) -> Mapping[int, tuple[Array, Array]]:
        """See `Batch.jacobian_sums`."""
        return jacobians.jacobian_sums(batch, self.workspace)

    def gauss_newton(self, batch: Batch, damping: float) -> Mapping[int, Array]:
        """See `Batch.gauss_newton`."""
        return jacobians.gauss_newton(batch, damping, self.workspace)

    def gram_errors(self, network: Network) -> GramErrors:
        """See `Batch.gram_errors`."""
        return orthogonality.GramErrors(network, self.workspace)

    def inverses(self, batch: Batch) -> Mapping[int, Factors]:
        """See `Batch.inverses`."""
        return inverse.inverses(batch, self.workspace)

    def pseudo_inverses(self, batch: Batch, ridge: float) -> Mapping[int, PseudoInverse]:
        """See `Batch.pseudo_inverses`."""
        return inverse.pseudo_inverses(batch, ridge, self.workspace)

    def inverse(self, at: At, factors: Factors, y: Array) -> Array:
        """See `At.inverse`."""
        return inverse.inverse(at, factors, y, self.workspace)


def _task(compute: Callable[[slice], None], part: slice) -> Task:
    return lambda scratch: compute(part)


def _noise_task(out: Array, part: slice, sigma: float, first: int, key: tuple[int, ...]) -> Task:
    def draw(scratch: Buffers) -> None:
        gaussian(out[part], sigma, first + part.start, *key)

    return draw

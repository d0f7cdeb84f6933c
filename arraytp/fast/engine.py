"""The fast engine: every primitive in slices that fit a cache, shared by threads, in arrays that are allocated once."""

from collections.abc import Callable
from functools import partial
from typing import Any

from arraytp.backend import Array
from arraytp.fast import factors, feedback_training, inverse, jacobians, modules, orthogonality, overlaps, passes
from arraytp.fast.parallel import Workspace, even_slices
from arraytp.model.blocks import Network, Shape
from arraytp.model.passes import At, Gradients, Iterations, NoiseAndProducts, Through
from arraytp.ops.solve import LU, Cholesky, PseudoInverse
from arraytp.options import Unpool

# How many tasks element-wise work on a batch is cut into.
SLICES = 4


class Fast(Workspace):
    """An `arraytp.model.passes.Engine`: a workspace whose methods are the functions of `arraytp.fast`."""

    forward = passes.forward
    product = passes.product
    feedback = modules.feedback
    feedback_difference = modules.feedback_difference
    jacobian_overlap = overlaps.jacobian_overlap
    jacobian_sums = jacobians.jacobian_sums
    gauss_newton = jacobians.gauss_newton
    inverses = factors.inverses
    pseudo_inverses = factors.pseudo_inverses
    carry = inverse.carry
    inverse = inverse.inverse
    noise = feedback_training.noise

    def array(self, name: object, shape: Shape, dtype: Any) -> Array:
        """See `Batch.array`."""
        return self.of("engine").array(name, shape, dtype)

    def iterations(self, at: At, unpool: Unpool, training: NoiseAndProducts) -> Iterations:
        """See `At.iterations`."""
        return feedback_training.Iterations(self, at, unpool, training)

    def gram_errors(self, network: Network) -> orthogonality.GramErrors:
        """See `Batch.gram_errors`."""
        return orthogonality.GramErrors(self, network)

    def in_slices(self, count: int, compute: Callable[[slice], None]) -> None:
        """See `Batch.in_slices`."""
        parts = even_slices(count, SLICES if self.backend.on_host else 1)
        self.run([partial(compute, part) for part in parts])

    def backward(self, at: At, ds: Array, through: Through | None, scale: float | Array | None) -> Gradients:
        """See `At.backward`."""
        if isinstance(through, LU | Cholesky):
            return inverse.backward_through_inverse(self, at, ds, through, scale)
        if isinstance(through, PseudoInverse):
            return inverse.backward_through_pseudo_inverse(self, at, ds, through, scale)
        return passes.backward(self, at, ds, through, scale)

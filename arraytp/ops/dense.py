"""The dense affine map and its adjoints. Rows are samples."""

from arraytp.backend import Array


def dense_forward(x: Array, weight: Array, bias: Array) -> Array:
    """Return z = x W + b for x of shape (B, in), W of shape (in, out), b of shape (out,)."""
    return x @ weight + bias


def dense_backward_weight(dz: Array, x: Array) -> tuple[Array, Array]:
    """Return dW = xᵀ dz of shape (in, out) and db = Σ dz of shape (out,) for dz of shape (B, out)."""
    return x.T @ dz, dz.sum(axis=0)


def dense_backward_input(dz: Array, weight: Array) -> Array:
    """Return dx = dz Wᵀ of shape (B, in) for dz of shape (B, out)."""
    return dz @ weight.T

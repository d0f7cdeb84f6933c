"""Convolution as im2col and one GEMM, channels last, and its adjoints.

Dimensions: B batch, (H, W) input size, (P, Q) output size, C channels in, O channels out, k kernel, K = k·k·C.
The kernel (k, k, C, O) is used as its (K, O) matrix; a patch of x is a row of the (B·P·Q, K) patch matrix.
"""

from arraytp.backend import Array, array_module
from arraytp.ops.patches import Window, col2im, im2col


def conv_forward(x: Array, weight: Array, bias: Array, window: Window) -> tuple[Array, Array]:
    """Convolve: z[b,p,q,o] = Σ_{i,j,c} x[b, s·p+i, s·q+j, c] · W[i,j,c,o] + b[o], x with its border.

    Parameters
    ----------
    x : array of shape (B, H, W, C)
    weight : array of shape (k, k, C, O)
    bias : array of shape (O,)
    window : Window

    Returns
    -------
    z : array of shape (B, P, Q, O)
    patches : array of shape (B, P, Q, K)
        For `conv_backward_weight`.
    """
    patches = im2col(x, window)
    return patches @ as_matrix(weight) + bias, patches


def conv_backward_weight(dz: Array, patches: Array) -> tuple[Array, Array]:
    """Return the gradients of kernel and bias: dW = patchesᵀ dz, db = Σ dz.

    Parameters
    ----------
    dz : array of shape (B, P, Q, O)
    patches : array of shape (B, P, Q, K)

    Returns
    -------
    dweight : array of shape (K, O)
        The kernel's matrix; reshape it to the kernel's shape.
    dbias : array of shape (O,)
    """
    rows = dz.reshape(-1, dz.shape[-1])
    return patches.reshape(-1, patches.shape[-1]).T @ rows, rows.sum(axis=0)


def conv_backward_input(dz: Array, weight: Array, window: Window) -> Array:
    """Return the gradient of the input, the transposed convolution: dx = col2im(dz Wᵀ).

    Parameters
    ----------
    dz : array of shape (B, P, Q, O)
    weight : array of shape (k, k, C, O)
    window : Window
        Of the forward convolution.

    Returns
    -------
    array of shape (B, H, W, C)
    """
    return col2im(dz @ as_matrix(weight).T, window)


def can_split(window: Window) -> bool:
    """Tell whether `split_matrix` applies to a window: stride 1, no border beyond k − 1."""
    border = max(window.top, window.bottom, window.left, window.right)
    return window.stride == 1 and border < window.kernel


def split_matrix(weight: Array) -> Array:
    """Return the (k·O, k·C) matrix of the kernel, its rows over (i from last to first, o), its columns over (j, c).

    With V = stack_rows(dz) and R = row_patches(x), for stride 1 and borders below k (`can_split`),

        dx = add_row_patches(V · matrix),  dW = Rᵀ V  as an array (j, c, i from last to first, o)

    which equal `conv_backward_input` and `conv_backward_weight`: the sum over the kernel's rows is in V, that over its
    columns in R and its adjoint. Both are k times as large as an image, whereas its patch matrix is k² times as large.
    """
    turned = array_module(weight).ascontiguousarray(weight[::-1].transpose(0, 3, 1, 2))
    return turned.reshape(weight.shape[0] * weight.shape[3], -1)


def as_matrix(weight: Array) -> Array:
    """Return the (K, O) matrix of a kernel (k, k, C, O), or a dense weight (in, out) as it is; no copy."""
    return weight.reshape(-1, weight.shape[-1])

"""Every operation of the network: against its definition, against finite differences, and against its adjoint."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from arraytp.audit import reference
from arraytp.audit.check import DIFFERENCES as FINITE
from arraytp.audit.check import ROUNDING, SUBTRACTED, Check, Floats, apart, checked, host, inner, worst
from arraytp.audit.differences import adjoint_error, gradient_errors
from arraytp.audit.setting import Setting
from arraytp.backend import Array, add_product, array_module
from arraytp.model.architectures import layers_of
from arraytp.model.blocks import Block
from arraytp.ops import conv, dense, noise, patches, pool
from arraytp.ops.activations import Activation
from arraytp.options import Conv

# How many samples of the batch are used: operations treat all alike.
SAMPLES = 2
# ELU's and tanh's inverses lose the digits that saturation has taken.
INVERSE = 1e-9


def affine(setting: Setting) -> Iterator[Check]:
    """Check the affine map of every block: its definition, its gradients, its border."""
    layers = layers_of(setting.config.network, len(setting.experiment.plan.dataset.classes))
    for n, block in enumerate(setting.network.blocks):
        layer = layers[n]
        if isinstance(layer, Conv):
            error = _window_error(block, layer)
            yield checked(f"{block.label}: border and size", "window", patches.make_window, error, 0.0)
        yield from _affine(setting, n, block)


def _affine(setting: Setting, n: int, block: Block) -> Iterator[Check]:
    weight, bias, window = setting.network.weights[n], setting.network.biases[n], block.window
    x = setting.batch.at(n).s[:SAMPLES].reshape(-1, *block.in_shape)
    u = setting.normal((len(x), *block.pre_shape), 1, n)
    forward: Any
    backward: tuple[Any, Any, Any]
    if window is None:
        what, formulas, forward = "affine map", ("z = xW + b", "dW = xᵀ dz", "dx = dz Wᵀ"), dense.dense_forward
        backward = dense.dense_backward_weight, dense.dense_backward_weight, dense.dense_backward_input
        gradients = *dense.dense_backward_weight(u, x), dense.dense_backward_input(u, weight)
    else:
        what, forward = "im2col against a direct sum", conv.conv_forward
        formulas = "z = patches W + b", "dW = patchesᵀ dz", "dx = col2im(dz Wᵀ)"
        backward = conv.conv_backward_weight, conv.conv_backward_weight, conv.conv_backward_input
        dweight, dbias = conv.conv_backward_weight(u, conv.conv_forward(x, weight, bias, window)[1])
        gradients = dweight.reshape(weight.shape), dbias, conv.conv_backward_input(u, weight, window)

    def z(w: Array, b: Array, v: Array) -> Array:
        return forward(v, w, b) if window is None else forward(v, w, b, window)[0]

    expected = reference.affine(block, host(weight), host(bias), host(x))
    error = apart(z(weight, bias, x), expected)
    yield checked(f"{block.label}: {what}", formulas[0], forward, error, ROUNDING)
    generator, names = setting.generator(2, n), ("weight", "bias", "input")
    errors = gradient_errors(lambda *at: inner(u, z(*at)), (weight, bias, x), gradients, generator)
    sources = formulas[1], "db = Σ dz", formulas[2]
    for name, source, function, error in zip(names, sources, backward, errors, strict=True):
        yield checked(f"{block.label}: gradient of the {name}", source, function, error, FINITE)
    if window is not None:
        yield from _adjoints(setting, n, block, x)


def _adjoints(setting: Setting, n: int, block: Block, x: Array) -> Iterator[Check]:
    window, label = block.window, block.label
    assert window is not None

    def line(what: str, function: Any, error: float) -> Check:
        return checked(f"{label}: adjoint of {what}", "⟨Ax, u⟩ = ⟨x, Aᵀu⟩", function, error, ROUNDING)

    shape = (len(x), window.out_height, window.out_width, window.kernel**2 * x.shape[-1])
    u = setting.normal(shape, 3, n)
    error = adjoint_error(lambda v: patches.im2col(v, window), lambda w: patches.col2im(w, window), x, u)
    yield line("im2col", patches.col2im, error)
    covered = reference.conv_input_gradient(
        np.ones((1, *shape[1:3], 1)), np.ones((window.kernel, window.kernel, 1, 1)), window
    )
    error = apart(patches.coverage(window, x), covered)
    yield checked(f"{label}: windows over each pixel", "n_x", patches.coverage, error, ROUNDING)
    if not conv.can_split(window):
        return
    shape = (len(x), window.height, window.out_width, window.kernel * x.shape[-1])
    u = setting.normal(shape, 4, n)
    error = adjoint_error(lambda v: patches.row_patches(v, window), lambda w: patches.add_row_patches(w, window), x, u)
    yield line("row patches", patches.add_row_patches, error)
    dz = setting.normal((len(x), *block.pre_shape), 5, n)
    u = setting.normal((*shape[:3], window.kernel * dz.shape[-1]), 6, n)
    zeros = setting.put(np.zeros(dz.shape))
    error = adjoint_error(
        lambda v: patches.stack_rows(v, window),
        lambda w: patches.add_stacked_rows(w, window, zeros.copy()),
        dz,
        u,
    )
    yield line("stacked rows", patches.add_stacked_rows, error)


def _window_error(block: Block, layer: Conv) -> float:
    """Return how many numbers of a window differ from what the layer's options say."""
    window = block.window
    assert window is not None
    wrong = 0
    axes = ((window.height, window.top, window.bottom, window.out_height, block.pre_shape[0]),
            (window.width, window.left, window.right, window.out_width, block.pre_shape[1]))  # fmt: skip
    for size, before, after, outputs, planned in axes:
        if layer.padding == "same":
            count = math.ceil(size / layer.stride)
            total = max((count - 1) * layer.stride + layer.kernel - size, 0)
            expected = total // 2, total - total // 2, count
        else:
            count = (size + 2 * layer.padding - layer.kernel) // layer.stride + 1
            expected = layer.padding, layer.padding, count
        wrong += sum(a != b for a, b in zip((before, after, outputs), expected, strict=True)) + (planned != count)
    return wrong + ((window.kernel, window.stride) != (layer.kernel, layer.stride))


def activation(setting: Setting) -> Iterator[Check]:
    """Check every activation of the network: its values, derivative, inverse and differences."""
    zs, _, _ = reference.forward(setting.on_host(), host(setting.images)[:SAMPLES])
    for f in dict.fromkeys(block.activation for block in setting.network.blocks):
        z = np.concatenate([z.ravel() for z, block in zip(zs, setting.network.blocks, strict=True)
                            if block.activation is f])[: 1 << 16]  # fmt: skip
        name, s = f.name, f(setting.put(z.copy()))
        yield checked(f"{name}: values", "s = f(z)", Activation.__call__, apart(s, reference.activation(z, name)),
                      ROUNDING)  # fmt: skip
        yield checked(f"{name}: derivative, element by element", "D = f'(z)", Activation.backward,
                      _derivative_error(setting, z, f), FINITE)  # fmt: skip
        u = setting.normal(z.shape, 7)
        yield checked(f"{name}: adjoint", "dz = D ⊙ ds", Activation.backward,
                      apart(f.backward(u, s), host(u) * reference.slope(z, name)), ROUNDING)  # fmt: skip
        delta = host(setting.normal(z.shape, 8))
        values = reference.activation(z + delta, name) - reference.activation(z, name)
        # The definition subtracts values that saturation makes nearly equal.
        lost = SUBTRACTED * max(1.0, float(np.abs(z).max())) / max(float(np.abs(values).max()), 1e-300)
        yield checked(f"{name}: difference of two values", "f(z + δ) − f(z)", f.difference,
                      apart(f.difference(setting.put(z), setting.put(delta)), values), max(ROUNDING, lost))  # fmt: skip
        if f.inverse is not None:
            # Where f is almost flat, a digit lost in s is many lost in z.
            clear = reference.slope(z, name) > 1e-3
            yield checked(f"{name}: inverse", "f⁻¹(f(z)) = z", Activation, apart(host(f.inverse(s))[clear], z[clear]),
                          INVERSE)  # fmt: skip


def _derivative_error(setting: Setting, z: Floats, f: Activation) -> float:
    """Return the largest error of f' against central differences, at values away from the kink at 0."""
    h = 1e-5
    z = z[np.abs(z) > 2 * h]
    s = f(setting.put(z.copy()))
    d = np.ones_like(z) if f.derivative is None else host(f.derivative(s))
    above, below = (host(f(setting.put(z + step))) for step in (h, -h))
    return apart(d, (above - below) / (2 * h))


def pooling(setting: Setting) -> Iterator[Check]:
    """Check max-pooling and unpooling of every block that pools, window by window."""
    zs, _, _ = reference.forward(setting.on_host(), host(setting.images)[:SAMPLES])
    mode = setting.unpool or "accumulate"
    for n, block in enumerate(setting.network.blocks):
        window = block.pool
        if window is None:
            continue
        s = reference.activation(zs[n], block.activation.name)
        maxima, places = reference.max_pool(s, window)
        out, index = pool.max_pool_forward(setting.put(s), window)
        error = worst(apart(out, maxima), apart(index, places))
        yield checked(f"{block.label}: maxima, window by window", "max-pool", pool.max_pool_forward, error, 0.0)
        u = setting.normal(maxima.shape, 9, n)
        error = apart(pool.max_pool_backward(u, index, window), reference.unpool(host(u), places, window, "accumulate"))
        yield checked(f"{block.label}: gradients to the maxima", "adjoint of max-pool", pool.max_pool_backward,
                      error, ROUNDING)  # fmt: skip
        error = apart(pool.max_unpool(u, index, window, mode), reference.unpool(host(u), places, window, mode))
        yield checked(f"{block.label}: unpooling, {mode}", "max-unpool", pool.max_unpool, error, ROUNDING)
        if setting.experiment.plan.backend.on_host:
            yield from _scattered(block, u, index)


def _scattered(block: Block, u: Array, index: Array) -> Iterator[Check]:
    """Check the host's fast forms of the two adjoints."""
    window = block.pool
    assert window is not None
    corner = pool.window_corners(len(u), window, u.shape[-1])
    position = np.empty(u.shape, np.intp)
    out = np.empty((len(u), *block.pre_shape))
    for function, mode in ((pool.max_pool_scatter, "accumulate"), (pool.max_unpool_scatter, "overwrite")):
        function(u, index, window, corner, position, out)
        error = apart(out, reference.unpool(host(u), index, window, mode))
        yield checked(f"{block.label}: {mode}, scattered", "the same", function, error, ROUNDING)


def gaussian_noise(setting: Setting) -> Iterator[Check]:
    """Check noise of feedback training: its spread, its independence of how a batch is cut, its keys."""
    if setting.rule.feedback is None:
        return
    seed, shape, sigma = setting.config.seed, (4 * noise.CHUNK, 512), 0.3
    empty = setting.put(np.zeros(shape))
    whole = host(noise.gaussian(empty.copy(), sigma, 0, seed, 1, 2, 3, 0))
    parts = [
        host(noise.gaussian(empty[first : first + noise.CHUNK].copy(), sigma, first, seed, 1, 2, 3, 0))
        for first in range(0, len(whole), noise.CHUNK)
    ]
    bound = 5 / math.sqrt(2 * whole.size)
    yield checked("noise: standard deviation", "N(0, σ²)", noise.gaussian, abs(whole.std() / sigma - 1), bound)
    yield checked("noise: mean over σ", "N(0, σ²)", noise.gaussian, abs(whole.mean()) / sigma, 2 * bound)
    yield checked("noise: the whole batch and its parts", "same bits", noise.gaussian,
                  float(np.abs(whole - np.concatenate(parts)).max()), 0.0)  # fmt: skip
    keys = (seed + 1, 1, 2, 3, 0), (seed, 0, 2, 3, 0), (seed, 1, 1, 3, 0), (seed, 1, 2, 2, 0), (seed, 1, 2, 3, 1)
    others = [host(noise.gaussian(empty.copy(), sigma, 0, *key)) for key in keys]
    chunks = [(whole[: noise.CHUNK], part) for part in parts[1:]]
    pairs = [*((whole, other) for other in others), *chunks]
    largest = worst(*(abs(float(np.corrcoef(a.ravel(), b.ravel())[0, 1])) for a, b in pairs))
    yield checked("noise: correlation between keys and chunks", "separate streams", noise.gaussian, largest,
                  6 / math.sqrt(parts[0].size))  # fmt: skip


def tensor_cores(setting: Setting) -> Iterator[Check]:
    """Check the error of float32 products where the config lets them round their factors to TF32's 11 bits."""
    if not setting.config.tf32:
        return
    for n, block in enumerate(setting.network.blocks):
        w = conv.as_matrix(setting.network.weights[n]).astype(np.float32)
        found = add_product(w.T, w, array_module(w).empty((w.shape[1], w.shape[1]), dtype=w.dtype))
        exact = host(w).astype(np.float64)
        error = float((np.abs(host(found) - exact.T @ exact) / (np.abs(exact).T @ np.abs(exact))).max())
        # Each factor is rounded by 2⁻¹¹ at most, each sum by 2⁻²⁴.
        yield checked(f"{block.label}: WᵀW in TF32, of Σ |terms|", "2⁻¹⁰", add_product, error,
                      2.0**-10 + len(exact) * 2.0**-24)  # fmt: skip


CHECKS = (affine, activation, pooling, gaussian_noise, tensor_cores)

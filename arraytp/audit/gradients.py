"""The loss, the passes through a block and through the network, and the whole gradient of backpropagation."""

import math
from collections.abc import Iterator
from functools import partial

import numpy as np

from arraytp.audit import reference
from arraytp.audit.check import DIFFERENCES, KINKED, ROUNDING, Check, apart, checked, host, inner, worst
from arraytp.audit.differences import DIRECTIONS, derivative, gradient_error, relative
from arraytp.audit.ops import SAMPLES
from arraytp.audit.setting import Setting
from arraytp.backend import Array, array_module
from arraytp.fast import passes as fused
from arraytp.fast.parallel import Workspace
from arraytp.model import initialise, network
from arraytp.model.network import ForwardPass, Network
from arraytp.ops import loss
from arraytp.rules import bp
from arraytp.rules.protocol import Updates

# The passes sum in another order than the references, layer after layer.
PASS = 1e-9
# Samples of the batch whose loss is differentiated: each unit more is one more that may cross a kink.
FEW = 2
COPIES_FLOPS = 2e10


def cross_entropy(setting: Setting) -> Iterator[Check]:
    """Check the loss on the batch's logits, its gradient, and the rank of the labels."""
    reduction, logits = setting.config.loss.reduction, setting.passed.logits
    value, cache = loss.cross_entropy_forward(logits, setting.labels, reduction)
    wanted = reference.cross_entropy(host(logits), host(setting.labels), reduction)
    yield checked(f"loss: value, {reduction}", "−Σ log softmax(z)[y]", loss.cross_entropy_forward,
                  abs(float(value) - wanted) / (abs(wanted) or 1.0), ROUNDING)  # fmt: skip
    error = gradient_error(
        lambda z: reference.cross_entropy(host(z), host(setting.labels), reduction),
        logits, loss.cross_entropy_backward(cache, reduction), setting.generator(20),
    )  # fmt: skip
    yield checked("loss: gradient of the logits", "softmax(z) − onehot(y)", loss.cross_entropy_backward, error,
                  DIFFERENCES)  # fmt: skip
    z, y = host(logits), host(setting.labels)
    wanted_rank = [int(np.flatnonzero(np.argsort(-row, kind="stable") == label)[0])
                   for row, label in zip(z, y, strict=True)]  # fmt: skip
    error = apart(loss.label_rank(logits, setting.labels), np.array(wanted_rank))
    yield checked("loss: rank of the label", "top-k", loss.label_rank, error, 0.0)


def initial(setting: Setting) -> Iterator[Check]:
    """Check initial weights and biases: orthonormality, or the spread that the scheme asks for."""
    init = setting.config.network.init
    for n, block in enumerate(setting.network.blocks):
        weight = host(setting.experiment.network.weights[n])
        fan_in, fan_out = int(np.prod(weight.shape[:-1])), int(np.prod(weight.shape[:-2])) * weight.shape[-1]
        matrix = weight.reshape(fan_in, -1)
        if init == "orthogonal":
            narrow = matrix if fan_in >= matrix.shape[1] else matrix.T
            error, tolerance = apart(narrow.T @ narrow, np.eye(narrow.shape[1])), ROUNDING
        else:
            spread = (1 / (3 * fan_in)) ** 0.5 if init == "kaiming-uniform" else (2 / (fan_in + fan_out)) ** 0.5
            error, tolerance = abs(float(np.sqrt(np.mean(weight**2))) / spread - 1), 5 / (2 * weight.size) ** 0.5
        yield checked(f"{block.label}: initial weight, {init}", "network.init", initialise.initial_weight, error,
                      tolerance)  # fmt: skip
        bias = host(setting.experiment.network.biases[n])
        bound = fan_in**-0.5 if init == "kaiming-uniform" else 0.0
        yield checked(f"{block.label}: largest initial bias", "network.init", initialise.initial_bias,
                      float(np.abs(bias).max()), bound)  # fmt: skip


def passes(setting: Setting) -> Iterator[Check]:
    """Check the plain and the fast pass through every block, against definitions and finite differences."""
    there = setting.on_host()
    zs, s, indices = reference.forward(there, host(setting.images))
    for n, block in enumerate(setting.network.blocks):
        weight, bias, x = setting.network.weights[n], setting.network.biases[n], setting.passed.x[n]
        z, out, index = network.block_forward(block, weight, bias, x)
        yield checked(f"{block.label}: the plain pass", "s = pool(f(xW + b))", network.block_forward,
                      worst(apart(z, zs[n]), apart(out, s[n + 1])), PASS)  # fmt: skip
        error = apart(setting.passed.s[n + 1], s[n + 1])
        if block.pool is not None:
            error = worst(error, apart(setting.passed.index[n], indices[n]))
        yield checked(f"{block.label}: the fast pass", "the same", fused.forward, error, PASS)
        u = setting.normal((len(x), *block.passed_shape), 21, n)
        dweight, dbias, dx = network.block_backward(block, u, z, index, x, weight)
        yield from _block_gradients(setting, n, u, (dweight, dbias, dx))
        fast = fused.backward(block, u, setting.passed.s[n + 1], setting.passed.index[n], x, weight, setting.workspace,
                              "audit")  # fmt: skip
        error = worst(*(apart(a, b) for a, b in zip(fast, (dweight, dbias, dx), strict=True)))
        yield checked(f"{block.label}: the fast gradients", "the same", fused.backward, error, PASS)


def _block_gradients(setting: Setting, n: int, u: Array, found: tuple[Array, Array, Array]) -> Iterator[Check]:
    """Check the gradients of one block by finite differences, on the first samples."""
    block, few = setting.network.blocks[n], SAMPLES
    weight, bias, x = setting.network.weights[n], setting.network.biases[n], setting.passed.x[n][:few]

    def value(weight: Array, bias: Array, x: Array) -> float:
        _, out, _ = network.block_forward(block, weight, bias, x)
        return inner(u[:few], out[..., : block.passed_shape[-1]])

    z, _, index = network.block_forward(block, weight, bias, x)
    dweight, dbias, dx = network.block_backward(block, u[:few], z, index, x, weight)
    generator = setting.generator(22, n)
    error = worst(
        gradient_error(lambda w: value(w, bias, x), weight, dweight, generator, 1),
        gradient_error(lambda b: value(weight, b, x), bias, dbias, generator, 1),
        gradient_error(lambda v: value(weight, bias, v), x, dx, generator, 1),
        apart(found[2][:few], dx),
    )
    yield checked(f"{block.label}: gradients of the block", "dz = D ⊙ unpool(ds)", network.block_backward, error,
                  KINKED)  # fmt: skip


def backpropagation(setting: Setting) -> Iterator[Check]:
    """Check BP's updates: the gradient of the loss in random directions, parameter by parameter and of all at once."""
    there, reduction, few = setting.network, setting.config.loss.reduction, slice(FEW)
    passed = fused.forward(there, setting.images[few], setting.workspace, "few")
    _, cache = loss.cross_entropy_forward(passed.logits, setting.labels[few], reduction)
    dlogits = loss.cross_entropy_backward(cache, reduction)
    updates = [(w.copy(), b.copy()) for w, b in bp.updates(
        bp.Options(), {}, there, passed, dlogits, setting.workspace)]  # fmt: skip
    for n, block in enumerate(there.blocks):
        run, (weight, bias) = partial(_loss_from, setting, passed, n), (there.weights[n], there.biases[n])
        error = worst(
            gradient_error(lambda w, n=n, run=run, bias=bias: run({n: (w, bias)}), weight, updates[n][0],  # type: ignore[misc]
                           setting.generator(23, n)),
            gradient_error(lambda b, n=n, run=run, weight=weight: run({n: (weight, b)}), bias, updates[n][1],  # type: ignore[misc]
                           setting.generator(24, n), 1),
        )  # fmt: skip
        yield checked(f"{block.label}: ∂L/∂W and ∂L/∂b", "BP", bp.updates, error, KINKED)
    yield checked("all parameters: ∂L/∂θ in random directions", "BP", bp.updates,
                  _whole_error(setting, passed, updates), KINKED)  # fmt: skip
    found = bp.updates(bp.Options(), {}, there, setting.passed, setting.dlogits, setting.workspace)
    wanted = reference.backward(setting.on_host(), setting.on_host().weights, host(setting.images),
                                host(setting.dlogits))  # fmt: skip
    error = worst(
        *(apart(a, b) for mine, exact in zip(found, wanted, strict=True) for a, b in zip(mine, exact, strict=True))
    )
    yield checked("all parameters: BP by definition", "dz = D ⊙ ds, ds = dz Wᵀ", bp.updates, error, PASS)


def _loss_from(setting: Setting, passed: ForwardPass, first: int, changed: dict[int, tuple[Array, Array]]) -> float:
    """Return what the loss gains when some blocks' parameters change, run on from the first of those."""
    there = setting.network
    pairs = [changed.get(n, (there.weights[n], there.biases[n])) for n in range(first, len(there))]
    rest = Network(there.blocks[first:], [w for w, _ in pairs], [b for _, b in pairs])
    x = passed.x[first]
    logits = fused.forward(rest, x, setting.workspace, "audit").logits
    base, labels = host(passed.logits), host(setting.labels[: len(x)])
    return reference.cross_entropy_change(host(logits), base, labels, setting.config.loss.reduction)


def _whole_error(setting: Setting, passed: ForwardPass, updates: Updates) -> float:
    """Return the error of ∂L/∂θ along directions that move every parameter by a share of its size."""
    generator, largest = setting.generator(25), 0.0
    theta = list(zip(setting.network.weights, setting.network.biases, strict=True))
    for _ in range(DIRECTIONS):
        v = [tuple(_direction(p, generator) for p in pair) for pair in theta]
        pairs = [(d, g) for ds, gs in zip(v, updates, strict=True) for d, g in zip(ds, gs, strict=True)]
        exact = sum(inner(d, g) for d, g in pairs)
        typical = math.sqrt(sum(inner(d, d) * inner(g, g) / d.size for d, g in pairs))
        scale = worst(abs(exact), typical)

        def moved(h: float, v: list[tuple[Array, ...]] = v) -> float:
            changed = {n: (w + h * v[n][0], b + h * v[n][1]) for n, (w, b) in enumerate(theta)}
            return _loss_from(setting, passed, 0, changed)

        largest = worst(largest, relative(derivative(moved, scale) - exact, scale))
    return largest


def _direction(parameter: Array, generator: np.random.Generator) -> Array:
    drawn = generator.standard_normal(parameter.shape)
    size = float(np.linalg.norm(host(parameter)))
    return array_module(parameter).asarray(drawn * (size / np.linalg.norm(drawn)))


def copies(setting: Setting) -> Iterator[Check]:
    """Check a batch of the run's size, copies of the small one and cut into more slices: so many times the updates."""
    batch = len(setting.images)
    affordable = int(COPIES_FLOPS / (3 * sum(map(network.block_flops, setting.network.blocks))))
    times = max(2, min(setting.batch_size, affordable) // batch)
    xp, workspace = array_module(setting.images), Workspace(setting.workspace.backend)
    images, dlogits = (xp.concatenate([array] * times) for array in (setting.images, setting.dlogits))
    passed = fused.forward(setting.network, images, workspace)
    error = apart(passed.logits, xp.concatenate([setting.passed.logits] * times))
    yield checked(f"logits of {times} copies of the batch", "a function of each sample", fused.forward, error, PASS)
    many = bp.updates(bp.Options(), {}, setting.network, passed, dlogits, workspace)
    once = bp.updates(bp.Options(), {}, setting.network, setting.passed, setting.dlogits, setting.workspace)
    error = worst(
        *(apart(a, times * b) for pair, one in zip(many, once, strict=True) for a, b in zip(pair, one, strict=True))
    )
    yield checked(f"updates of {times} copies of the batch", "sums over samples", bp.updates, error, PASS)


def threads(setting: Setting) -> Iterator[Check]:
    """Check the passes on one thread and on three."""
    if not setting.experiment.plan.backend.on_host:
        return
    found = []
    for count in (1, 3):
        workspace = Workspace(threads=count)
        passed = fused.forward(setting.network, setting.images, workspace)
        updates = bp.updates(bp.Options(), {}, setting.network, passed, setting.dlogits, workspace)
        found.append([passed.logits, *(array for pair in updates for array in pair)])
    error = worst(*(float(np.abs(a - b).max()) for a, b in zip(*found, strict=True)))
    yield checked("one thread and three", "same bits", bp.updates, error, 0.0)


CHECKS = (cross_entropy, initial, passes, backpropagation, copies, threads)

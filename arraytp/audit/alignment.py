"""Feedback alignment, direct and not: the rules by definition, and BP where the feedback is the transpose."""

import math
from collections.abc import Iterator

import numpy as np

from arraytp.audit import reference
from arraytp.audit.check import Check, apart, checked, host, worst
from arraytp.audit.gradients import PASS
from arraytp.audit.setting import Setting
from arraytp.rules import bp, dfa, fa
from arraytp.rules.protocol import State, Updates


def feedback_alignment(setting: Setting) -> Iterator[Check]:
    """Check FA: its definition with its own B, and BP with B = W."""
    if setting.config.rule.name != "fa":
        return
    there = setting.on_host()
    state = setting.state()
    carriers = [host(state.get(f"feedback/{n}/weight", w)) for n, w in enumerate(there.weights)]
    wanted = reference.backward(there, carriers, host(setting.images), host(setting.dlogits))
    mine = _updates(setting, state)
    for block, a, b in zip(there.blocks, mine, wanted, strict=True):
        error = worst(apart(a[0], b[0]), apart(a[1], b[1]))
        yield checked(f"{block.label}: update with B by definition", "ds = dz Bᵀ", fa.updates, error, PASS)
    exact = [(w.copy(), b.copy()) for w, b in _exact(setting)]
    symmetric = {name: setting.network.weights[int(name.split("/")[1])] for name in state}
    found = _updates(setting, symmetric)
    error = worst(
        *(apart(a, b) for pair, other in zip(found, exact, strict=True) for a, b in zip(pair, other, strict=True))
    )
    yield checked("all blocks: with B = W the update is BP's", "FA with B = W", fa.updates, error, PASS)
    yield from _independence(setting, state, {n: setting.network.weights[n] for n in range(len(there))})


def direct_feedback_alignment(setting: Setting) -> Iterator[Check]:
    """Check DFA: its definition, and BP's update of the last hidden block with B the transpose of the output weight."""
    if setting.config.rule.name != "dfa":
        return
    there, state = setting.on_host(), setting.state()
    zs, s, indices = reference.forward(there, host(setting.images))
    mine = _updates(setting, state)
    for n, block in enumerate(there.blocks):
        e = host(setting.dlogits)
        ds = e if n == len(there) - 1 else e @ host(state[f"feedback/{n}/weight"])
        x = s[n] if n == 0 else s[n][..., : there.blocks[n - 1].passed_shape[-1]]
        dweight, dbias, _ = reference.block_backward(block, ds, zs[n], indices[n], x, there.weights[n])
        error = worst(apart(mine[n][0], dweight), apart(mine[n][1], dbias))
        yield checked(f"{block.label}: update with B by definition", "ds = e B", dfa.updates, error, PASS)
    if len(there) < 2:
        return
    exact = [(w.copy(), b.copy()) for w, b in _exact(setting)]
    last = len(there) - 2
    units = there.blocks[-1].passed_shape[-1]
    state[f"feedback/{last}/weight"] = setting.put(np.ascontiguousarray(there.weights[-1][:, :units].T))
    found = _updates(setting, state)
    error = worst(*(apart(found[n][i], exact[n][i]) for n in (last, last + 1) for i in (0, 1)))
    what = f"{there.blocks[last].label}: with B the transpose BP's update"
    yield checked(what, "DFA with B = Wᵀ", dfa.updates, error, PASS)


def _independence(setting: Setting, state: State, weights: dict[int, object]) -> Iterator[Check]:
    """Check no B is another name of a weight: their cosines are those of independent draws."""
    largest, smallest = 0.0, math.inf
    for array in state.values():
        b = host(array).ravel()
        for weight in weights.values():
            w = host(weight).ravel()
            if w.size == b.size:
                largest = worst(largest, abs(float(b @ w)) / float(np.linalg.norm(b) * np.linalg.norm(w)))
                smallest = min(smallest, b.size)
    if math.isfinite(smallest):
        yield checked("largest |cosine| between a B and a weight", "streams of their own", fa.init_state, largest,
                      min(0.9, 8 / math.sqrt(smallest)))  # fmt: skip


def _updates(setting: Setting, state: State) -> Updates:
    rule, options = setting.experiment.rule, setting.options
    found = rule.updates(options, state, setting.network, setting.passed, setting.dlogits, setting.workspace)
    return [(w.copy(), b.copy()) for w, b in found]


def _exact(setting: Setting) -> Updates:
    return bp.updates(bp.Options(), {}, setting.network, setting.passed, setting.dlogits, setting.workspace)


CHECKS = (feedback_alignment, direct_feedback_alignment)

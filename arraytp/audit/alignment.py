"""Feedback alignment, direct and not: the updates by definition, and BP where the feedback is the transpose."""

import math
from collections.abc import Iterator

import numpy as np

from arraytp.audit import reference
from arraytp.audit.check import Check, apart, checked, host, worst
from arraytp.audit.gradients import PASS, exact, updates_apart
from arraytp.audit.setting import Setting
from arraytp.rules import dfa, fa
from arraytp.rules.protocol import State


def feedback_alignment(setting: Setting) -> Iterator[Check]:
    """Check FA: its definition with its own B, and BP with B = W."""
    if setting.rule.updates is not fa.updates:
        return
    network, state = setting.on_host(), setting.state()
    through = [host(state.weights.get(n, weight)) for n, weight in enumerate(network.weights)]
    expected = reference.backward(network, through, host(setting.images), host(setting.batch.dlogits))
    for block, actual, of_block in zip(network.blocks, setting.propose(), expected, strict=True):
        error = updates_apart([actual], [of_block])
        yield checked(f"{block.label}: update with B by definition", "ds = dz Bᵀ", fa.updates, error, PASS)
    symmetric = State({n: setting.network.weights[n] for n in state.weights})
    error = updates_apart(setting.propose(state=symmetric), exact(setting.batch))
    yield checked("all blocks: with B = W the update is BP's", "FA with B = W", fa.updates, error, PASS)
    yield from _independence(setting, state)


def direct_feedback_alignment(setting: Setting) -> Iterator[Check]:
    """Check DFA: its definition, and BP's update of the last hidden block with B the transpose of the output weight."""
    if setting.rule.updates is not dfa.updates:
        return
    network, state = setting.on_host(), setting.state()
    zs, s, indices = reference.forward(network, host(setting.images))
    updates, e = setting.propose(), host(setting.batch.dlogits)
    for n, block in enumerate(network.blocks):
        ds = e if n == len(network) - 1 else e @ host(state.weights[n + 1])
        taken = reference.handed_on(network, s, n)
        dweight, dbias, _ = reference.block_backward(block, ds, zs[n], indices[n], taken, network.weights[n])
        error = worst(apart(updates[n][0], dweight), apart(updates[n][1], dbias))
        yield checked(f"{block.label}: update with B by definition", "ds = e B", dfa.updates, error, PASS)
    if len(network) < 2:
        return
    last = len(network) - 1
    units = network.blocks[last].next_shape[-1]
    state.weights[last] = setting.put(np.ascontiguousarray(network.weights[last][:, :units].T))
    error = updates_apart(setting.propose(state=state)[-2:], exact(setting.batch)[-2:])
    what = f"{network.blocks[last - 1].label}: with B the transpose BP's update"
    yield checked(what, "DFA with B = Wᵀ", dfa.updates, error, PASS)


def _independence(setting: Setting, state: State) -> Iterator[Check]:
    """Check no B is another name of a weight: their cosines are those of independent draws."""
    largest, smallest = 0.0, math.inf
    for array in state.weights.values():
        b = host(array).ravel()
        for weight in setting.network.weights:
            w = host(weight).ravel()
            if w.size == b.size:
                largest = worst(largest, abs(float(b @ w)) / float(np.linalg.norm(b) * np.linalg.norm(w)))
                smallest = min(smallest, b.size)
    if math.isfinite(smallest):
        yield checked("largest |cosine| between a B and a weight", "streams of their own", setting.rule.init_state,
                      largest, min(0.9, 8 / math.sqrt(smallest)))  # fmt: skip


CHECKS = (feedback_alignment, direct_feedback_alignment)

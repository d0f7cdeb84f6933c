"""Feedback alignment and its relatives: updates by definition, equality with BP where B = W, and each rule's B."""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import numpy as np

from arraytp import optim
from arraytp.audit import reference
from arraytp.audit.check import ROUNDING, Check, Floats, apart, checked, host, worst
from arraytp.audit.gradients import PASS, exact, updates_apart
from arraytp.audit.setting import Setting, fresh
from arraytp.model.blocks import Network
from arraytp.rules import dfa, fa, sign_symmetry
from arraytp.rules.protocol import State
from arraytp.training.experiment import Experiment

BATCHES = 2


def feedback_alignment(setting: Setting) -> Iterator[Check]:
    """Check FA against its definition with its own B, and against BP with B = W."""
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
    if setting.rule.follow is None:
        yield from _independence(setting, state)


def sign_symmetry_of(setting: Setting) -> Iterator[Check]:
    """Check sign symmetry: B's signs and magnitudes on two batches, each with different forward weights."""
    if setting.rule.follow is not sign_symmetry.follow:
        return
    magnitude, state, blocks = setting.options.magnitude, setting.state(), setting.network.blocks
    sizes = [{n: np.abs(host(B)) for n, B in state.weights.items()}]
    signs = dict.fromkeys(state.weights, 0)
    for number in range(BATCHES):
        weights = [setting.normal(w.shape, 70, number, n) for n, w in enumerate(setting.network.weights)]
        batch = replace(setting.batch, network=Network(blocks, weights, setting.network.biases), number=number)
        sign_symmetry.follow(setting.options, state, batch)
        sizes.append({n: np.abs(host(B)) for n, B in state.weights.items()})
        for n, B in state.weights.items():
            signs[n] += int((np.sign(host(B)) != np.sign(host(weights[n]))).sum())
    for n, wrong in signs.items():
        label, shape = blocks[n].label, blocks[n].weight_shape
        yield checked(f"{label}: signs of B that are not W's", "B = |R| ⊙ sign(W)", sign_symmetry.follow, wrong, 0.0)
        c = math.sqrt(2 / (math.prod(shape[:-2]) * (shape[-2] + shape[-1])))
        if magnitude != "unit":
            spread = worst(*(abs(math.sqrt((size[n] ** 2).mean()) / c - 1) for size in sizes))
            error, tolerance = spread, 5 / math.sqrt(2 * math.prod(shape))
        if magnitude == "batch":
            repeated = sum(np.array_equal(a[n], b[n]) for a, b in pairwise(sizes))
            yield checked(f"{label}: batches that share |R|", "drawn anew", sign_symmetry.follow, repeated, 0.0)
        elif magnitude == "fixed":
            changed = sum(not np.array_equal(a[n], b[n]) for a, b in pairwise(sizes))
            yield checked(f"{label}: batches that change |R|", "drawn once", sign_symmetry.follow, changed, 0.0)
        else:
            error, tolerance = worst(*(apart(size[n], np.full(shape, c)) for size in sizes)), ROUNDING
        yield checked(f"{label}: |R|, {magnitude}", "c = √(2/(fan_in + fan_out))", sign_symmetry.init_state, error,
                      tolerance)  # fmt: skip


def kolen_pollack_of(setting: Setting) -> Iterator[Check]:
    """Check Kolen–Pollack: W − B shrinks by 1 − λ in each of two steps of random updates."""
    if setting.rule.shared_decay is None:
        return
    experiment, kept = fresh(setting), 1 - setting.rule.shared_decay(setting.options)
    step, before = experiment.forward(setting.images, setting.labels), _differences(experiment)
    for number in range(BATCHES):
        updates = [
            (setting.normal(w.shape, 71, number, n) * 0.1, setting.normal(b.shape, 72, number, n) * 0.1)
            for n, (w, b) in enumerate(zip(experiment.network.weights, experiment.network.biases, strict=True))
        ]
        experiment.apply(step, updates)
    for n, after in _differences(experiment).items():
        error = apart(after, kept**BATCHES * before[n])
        yield checked(f"{setting.network.blocks[n].label}: W − B after {BATCHES} steps", "(1 − λ) per step",
                      optim.apply_updates, error, PASS)  # fmt: skip


def _differences(experiment: Experiment) -> dict[int, Floats]:
    weights = experiment.network.weights
    return {n: host(weights[n]) - host(B) for n, B in experiment.rule_state.weights.items()}


def direct_feedback_alignment(setting: Setting) -> Iterator[Check]:
    """Check DFA against its definition, and its last hidden block's update against BP's with B = Wᵀ of a linear output.

    Through a nonlinear output, e would reach that block multiplied by the derivative, which no B can reproduce.
    """
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
    if len(network) < 2 or network.blocks[-1].activation.derivative is not None:
        return
    last = len(network) - 1
    units = network.blocks[last].next_shape[-1]
    state.weights[last] = setting.put(np.ascontiguousarray(network.weights[last][:, :units].T))
    error = updates_apart(setting.propose(state=state)[-2:], exact(setting.batch)[-2:])
    what = f"{network.blocks[last - 1].label}: with B the transpose BP's update"
    yield checked(what, "DFA with B = Wᵀ", dfa.updates, error, PASS)


def _independence(setting: Setting, state: State) -> Iterator[Check]:
    """Check that no B is a copy of a weight: their cosines must be as small as those of independent draws."""
    ratios = []
    for array in state.weights.values():
        b = host(array).ravel()
        for weight in setting.network.weights:
            w = host(weight).ravel()
            # Two single numbers always have a |cosine| of 1.
            if w.size == b.size > 1:
                cosine = abs(float(b @ w)) / float(np.linalg.norm(b) * np.linalg.norm(w))
                ratios.append(cosine / _most(b.size))
    if ratios:
        yield checked("largest |cosine| between a B and a weight, over its bound", "separate streams",
                      setting.rule.init_state, worst(*ratios), 1.0)  # fmt: skip


def _most(size: int) -> float:
    """Return a bound on the |cosine| of two independent directions in `size` dimensions."""
    # In fewer than twenty, two may well be within 26° of each other: then only a copy can be detected.
    return min(0.9, 8 / math.sqrt(size)) if size >= 20 else 1 - ROUNDING


CHECKS = (feedback_alignment, sign_symmetry_of, kolen_pollack_of, direct_feedback_alignment)

"""The audit of a rule that it does not know: a correct rule passes, and a mistake in any part of it fails a check.

The rule has difference targets of its own and learns ω and G's bias by reconstructing s^n from the clean s^{n+1}.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pytest

from arraytp.audit import audit
from arraytp.audit.check import Check
from arraytp.config import load_one
from arraytp.data.writer import Description, writing
from arraytp.model.blocks import backward_flops
from arraytp.model.passes import NoiseAndProducts
from arraytp.options import FeedbackTraining
from arraytp.rules import RULES, dtp
from arraytp.rules.feedback import feedback_products, init_feedback, module_pairs
from arraytp.rules.protocol import Feedback, Iteration, Rule, Target
from arraytp.training.plan import plan

CONFIG = """\
data: {dataset: images}
network:
  blocks:
    - {type: conv, channels: 4, kernel: 3, activation: elu, pool: {kernel: 3, stride: 2, padding: 1}}
    - {type: conv, channels: 3, kernel: 3, padding: 1, activation: tanh}
    - {type: dense, units: 8, activation: leaky-relu}
    - {type: dense, units: 3}
rule: {name: bp}
optimizer: {name: sgd, lr: 0.05, momentum: 0.9}
train: {epochs: 1, batch_size: 16}
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """β, how to unpool, and feedback training with momentum and a number of iterations per block."""

    name: Literal["reconstruction"] = "reconstruction"
    beta: float = 0.1
    unpool: str = "overwrite"
    feedback: FeedbackTraining = field(default_factory=lambda: FeedbackTraining(iterations=(3, 1, 2), sigma=0.1))


def init_state(options, network, seed, backend):
    return init_feedback("kaiming-uniform", options.feedback.optimizer, network, seed, backend)


def reconstruct(at, omega, bias, epsilon, eta):
    """Add half the gradients of ‖G(s^{n+1}) − s^n‖²."""
    r = at.transposed(omega, at.a_next)
    r += bias
    r -= at.s
    at.add(r, at.a_next)
    at.add_bias(r)
    return at.square(r)


def begin_with(iterate):
    def begin(options, at, sigma, noises):
        shared = at.iterations(options.unpool, NoiseAndProducts(sigma, noises, products=1, output_noise=False))

        def iteration(state, k, with_loss):
            sums = shared.sums(iterate, k, state.weights[at.n], state.biases[at.n])
            return Iteration({"weight": sums.weight, "bias": sums.bias}, sums.returned, shared.noise(k))

        return iteration

    return begin


def targets(options, state, batch):
    delta = batch.dlogits * (-options.beta * len(batch))
    for at in batch.down():
        yield Target(delta)
        if at.n > 0:
            delta = at.feedback_difference(state.weights[at.n], delta, options.unpool)


def local_update(options, at, target):
    """Return the gradient of (1/B) Σ ‖s − t‖²."""
    dW, db, _ = at.backward(target.delta, scale=-2 / len(at.batch))
    return dW, db


def local_loss(options, block, s, t):
    return float(((s - t) ** 2).sum()) / len(s)


def feedback_flops(options, network):
    return feedback_products(options.feedback, network, 2)


def flops(options, network):
    return backward_flops(network.blocks)


RULE = Rule(
    options=Options,
    init_state=init_state,
    targets=targets,
    local_update=local_update,
    local_loss=local_loss,
    feedback=Feedback(begin=begin_with(reconstruct), flops=feedback_flops),
    pairs=module_pairs,
    flops=flops,
)


# The functions above, each with one mistake, which is marked.


def subtracting(at, omega, bias, epsilon, eta):
    r = at.transposed(omega, at.a_next)
    r += bias
    r -= at.s
    at.subtract(r, at.a_next)  # Here.
    at.add_bias(r)
    return at.square(r)


def with_half_a_bias(at, omega, bias, epsilon, eta):
    returned = reconstruct(at, omega, bias, epsilon, eta)
    at.add_bias(0.5 * at.s)  # Here: instead of the residual.
    return returned


def uphill_output(options, state, batch):
    return targets(options, state, replace(batch, dlogits=-batch.dlogits))  # Here.


def turned_difference(options, state, batch):
    delta = batch.dlogits * (-options.beta * len(batch))
    for at in batch.down():
        yield Target(delta)
        if at.n > 0:
            delta = -at.feedback_difference(state.weights[at.n], delta, options.unpool)  # Here.


def turned_update(options, at, target):
    dW, db, _ = at.backward(target.delta, scale=2 / len(at.batch))  # Here.
    return dW, db


def foreign_noise(options, at, sigma, noises):
    iterating = begin_with(reconstruct)(options, at, sigma, noises)
    return lambda state, k, with_loss: iterating(state, 0, with_loss)  # Here: the first noise, always.


def keeping_state(options, network, seed, backend):
    state = init_state(options, network, seed + len(_SEEN), backend)  # Here: not a function of the seed.
    _SEEN.append(seed)
    return state


_SEEN = []


def trained_by(begin):
    return replace(RULE, feedback=replace(RULE.feedback, begin=begin))


# The rule, and words that the name of a failed check must contain.
MISTAKES = {
    "a sign in iterate": (trained_by(begin_with(subtracting)), "feedback gradient by differences"),
    "the bias in iterate": (trained_by(begin_with(with_half_a_bias)), "feedback gradient by differences"),
    "the output's sign": (replace(RULE, targets=uphill_output), "angle of the output's t − s"),
    "the targets' sign": (replace(RULE, targets=turned_difference), "angle of its t − s below to BP's"),
    "the update's sign": (replace(RULE, local_update=turned_update), "update as the local loss's gradient"),
    "the noise's number": (trained_by(foreign_noise), "noise by its keys"),
    "the initial state": (replace(RULE, init_state=keeping_state), "arrays that differ between two runs"),
}


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """Return the plan of a tiny network on random images."""
    folder = tmp_path_factory.mktemp("new rule")
    generator = np.random.default_rng(7)
    description = Description("images", (8, 8, 1), ["a", "b", "c"])
    with writing(folder / "images", description, shard_images=20) as writer:
        for split in ("train", "test"):
            images = generator.integers(0, 256, (32, 8, 8, 1)).astype(np.uint8)
            writer.add(split, images, generator.integers(0, 3, 32))
    (folder / "new.yml").write_text(CONFIG.replace("dataset: images", f"dataset: {folder / 'images'}"))
    return plan(load_one(folder / "new.yml", []))


@pytest.fixture
def audited(planned, monkeypatch):
    """Audit a rule after registering it under the name that it has in configs."""

    def lines(rule, options=None):
        monkeypatch.setitem(RULES, rule.name, rule)
        options = options or rule.options()
        return list(audit(replace(planned, config=replace(planned.config, rule=options))))

    return lines


def failed(lines):
    return [check.what for _, check in lines if check.verdict == "fail"]


def test_a_correct_rule_passes_and_all_of_it_is_checked(audited):
    lines = audited(RULE)
    assert failed(lines) == []
    families = [family for family, _ in lines]
    assert families.count("engines") == 4
    assert families.count("feedback training") == 3 * 6
    assert families.count("targets") >= 4
    assert {"theorems", "run", "optimiser", "batches"} <= set(families)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_mistake_is_a_line_that_failed(audited, mistake):
    rule, what = MISTAKES[mistake]
    assert any(what in line for line in failed(audited(rule)))


def test_parts_of_known_rules_are_held_against_their_definitions(audited):
    """The audit recognises DTP's functions under another name, and checks feedback loss and targets by definition."""
    rule = replace(RULE, targets=dtp.targets, feedback=replace(RULE.feedback, begin=dtp.begin))
    lines = audited(rule)
    assert failed(lines) == []
    whats = [check.what for _, check in lines]
    assert any("feedback loss by definition" in what for what in whats)
    assert sum("t − s of its output" in what for what in whats) == 4


def test_several_noises_for_a_step_and_fine_noise_pass(audited):
    training = FeedbackTraining(iterations=2, sigma=1e-4)
    rule = replace(RULE, feedback=replace(RULE.feedback, begin=dtp.begin, noises=lambda options: 3))
    assert failed(audited(rule, Options(feedback=training))) == []


def test_a_rule_brings_checks_of_its_own(audited):
    def own(setting):
        yield Check("β", "positive", "test", setting.options.beta, 1.0)
        yield Check("β, too", "smaller", "test", setting.options.beta, 0.01)

    lines = audited(replace(RULE, checks=(own,)))
    assert [(check.what, check.verdict) for family, check in lines if family == "own checks"] == [
        ("β", "pass"),
        ("β, too", "fail"),
    ]
    assert failed(lines) == ["β, too"]

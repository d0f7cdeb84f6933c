"""The run itself: its steps do the audited parts in order, repeat bit for bit, and a checkpoint restores everything."""

import math
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from arraytp.audit import reference
from arraytp.audit.check import Check, Floats, angle, apart, checked, host, same_bits, worst
from arraytp.audit.gradients import exact
from arraytp.audit.optimisers import SUMS, expected_rate
from arraytp.audit.setting import Setting, copied, fresh
from arraytp.fast.orthogonality import GramErrors, add_orthogonality, strength_at
from arraytp.model.blocks import Network
from arraytp.optim import at_block
from arraytp.rules import gnt
from arraytp.rules.feedback import train
from arraytp.rules.protocol import State
from arraytp.training.checkpoint import read_checkpoint, write_checkpoint
from arraytp.training.experiment import Experiment

THREADS = 3
PARTS = "weight", "bias"
# How far angles by two formulas may be apart.
DEGREES = 1e-6
RUN = {"position": {"step": 1, "loss": 0.1 + 0.2}}


def repetition(setting: Setting) -> Iterator[Check]:
    """Check that steps have the same bits in two runs, on one and three threads, and resumed from a checkpoint."""
    first, second = fresh(setting, THREADS), fresh(setting, THREADS)
    _step(setting, first, 0)
    with tempfile.TemporaryDirectory(prefix="arraytp-audit-") as folder:
        path = Path(folder, "checkpoint.h5")
        write_checkpoint(path, first, RUN)
        saved = _arrays(first)
        resumed = fresh(setting, THREADS)
        run = read_checkpoint(path, resumed)
    counts = (first.optimizer_state.step, first.feedback_step), (resumed.optimizer_state.step, resumed.feedback_step)
    differing = _differing(saved, _arrays(resumed)) + (counts[0] != counts[1]) + (run != RUN)
    yield checked("arrays and counts that a checkpoint does not restore", "same bits", read_checkpoint, differing, 0.0)
    for experiment, steps in ((first, (1,)), (second, (0, 1)), (resumed, (1,))):
        for number in steps:
            _step(setting, experiment, number)
    expected = _arrays(first)
    yield checked("arrays that differ between two runs of two steps", "same bits", Experiment.step,
                  _differing(expected, _arrays(second)), 0.0)  # fmt: skip
    yield checked("arrays that differ in a run resumed after one step", "same bits", read_checkpoint,
                  _differing(expected, _arrays(resumed)), 0.0)  # fmt: skip
    untouched = sum(same_bits(host(array), expected[name]) for name, array in _arrays(fresh(setting)).items()
                    if name.startswith("network"))  # fmt: skip
    yield checked("parameters that two steps left as they were", "θ learns", Experiment.step, untouched)
    if setting.experiment.plan.backend.on_host:
        one = fresh(setting, threads=1)
        _step(setting, one, 0)
        yield checked("arrays that differ on one thread and three", "same bits", Experiment.step,
                      _differing(_arrays(one), saved), 0.0)  # fmt: skip


def by_hand(setting: Setting) -> Iterator[Check]:
    """Check two steps of a run against forward pass, feedback, update, regulariser and optimiser, one by one."""
    run, moments = fresh(setting, THREADS), [[] for _ in setting.network.parameters()]  # type: ignore[var-annotated]
    for number in range(2):
        before = _arrays(run)
        theta, feedback = _expected(setting, run, number, moments)
        _step(setting, run, number)
        after = _arrays(run)
        for n, block in enumerate(setting.network.blocks):
            names = f"network/weight/{n}", f"network/bias/{n}"
            error = worst(*(apart(after[name] - before[name], theta[name] - before[name]) for name in names))
            yield checked(f"{block.label}: θ after step {number + 1} of a run", "forward, feedback, update, optimiser",
                          Experiment.step, error, SUMS)  # fmt: skip
        if feedback:
            error = worst(*(apart(after[name] - before[name], feedback[name] - before[name]) for name in feedback))
            yield checked(f"feedback weights after step {number + 1} of a run", "forward, feedback, update, optimiser",
                          Experiment.train_feedback, error, SUMS)  # fmt: skip


def _expected(
    setting: Setting, run: Experiment, number: int, moments: list[list[Floats]]
) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Return θ and the rule's arrays after the next step of a run; θ's `moments` are changed."""
    rule, options, optimizer, put = setting.rule, setting.options, setting.config.optimizer, setting.put
    weights, biases = (
        [put(host(array).copy()) for array in each] for each in (run.network.weights, run.network.biases)
    )
    network, state, order = Network(run.network.blocks, weights, biases), run.rule_state.copy(), _order(number)
    images, labels = (put(np.ascontiguousarray(host(array)[order])) for array in (setting.raw, setting.labels))
    batch = replace(setting.pass_over(network, images, labels), number=number)
    if rule.follow is not None:
        rule.follow(options, state, batch)
    if rule.feedback is not None:
        train(rule.feedback, options, state, batch, setting.workspace)
    updates, regulariser = setting.propose(batch, state=state), strength_at(optimizer, number)
    if regulariser:
        # The package's own, bit for bit: for an orthogonal W it is rounding alone, which Adam turns into steps.
        errors, on = GramErrors(setting.workspace, network), optimizer.orthogonality_on
        add_orthogonality(regulariser, network, [weight for weight, _ in updates], errors, setting.workspace, on)
    theta, decay = {}, 0.0 if rule.shared_decay is None else rule.shared_decay(options)
    named = {f"rule/{name}": host(array).copy() for name, array in state.named().items()}
    for n, update in enumerate(updates):
        rate = expected_rate(setting.config.schedule, at_block(optimizer.lr, n), number, number)
        for p, kind, old, gradient in zip((2 * n, 2 * n + 1), PARTS, (weights[n], biases[n]), update, strict=True):
            own = host(old)
            moved = reference.optimiser_step(optimizer, rate, n, number + 1, own, host(gradient), moments[p])
            shares = kind == "weight" and decay and n in state.weights
            theta[f"network/{kind}/{n}"] = moved - decay * own if shares else moved
            if shares:
                B = host(state.weights[n])
                (name,) = (name for name, array in state.named().items() if array is state.weights[n])
                named[f"rule/{name}"] = B + (moved - own) - decay * B
    return theta, named


def angles(setting: Setting) -> Iterator[Check]:
    """Check the angles of a step to BP and to Gauss–Newton targets, with the options that rules are compared at."""
    run, compared, config = fresh(setting), setting.options, setting.config.compare
    if hasattr(compared, "compare_beta"):
        compared = replace(compared, beta=compared.compare_beta)
    step = run.forward(setting.raw, setting.labels)
    run.train_feedback(step)
    updates = run.updates(step)
    own = copied(updates)
    found = run.compare(step, updates)
    if compared != setting.options:
        own = setting.propose(step.batch, compared, run.rule_state)
    references = {"angle_deg": exact(step.batch)}
    if "gnt" in config.against:
        references["gnt_angle_deg"] = copied(gnt.RULE.propose(gnt.Options(damping=config.damping), State(), step.batch))
    for name, of in references.items():
        error = 0.0
        for each, (weight, _), (other, _) in zip(found, own, of, strict=True):
            expected = angle(weight, other)
            # NaN where one of them has no direction.
            if not (math.isnan(expected) and math.isnan(getattr(each, name))):
                error = worst(error, abs(getattr(each, name) - expected))
        yield checked(f"angles of a step, {name}, degrees", "∠(update, reference)", Experiment.compare, error, DEGREES)


def _order(number: int) -> slice:
    # Two batches of the same images: the second in reverse order.
    return slice(None, None, -1 if number else 1)


def _step(setting: Setting, experiment: Experiment, number: int) -> None:
    order = _order(number)
    xp = setting.experiment.plan.backend.xp
    experiment.step(xp.ascontiguousarray(setting.raw[order]), xp.ascontiguousarray(setting.labels[order]), epoch=number)


def _arrays(experiment: Experiment) -> dict[str, Floats]:
    """Return copies of every array of the state by name."""
    named = {f"network/weight/{n}": w for n, w in enumerate(experiment.network.weights)}
    named |= {f"network/bias/{n}": b for n, b in enumerate(experiment.network.biases)}
    named |= {f"rule/{name}": array for name, array in experiment.rule_state.named().items()}
    for p, moments in enumerate(experiment.optimizer_state.moments):
        named |= {f"moment/{p}/{i}": moment for i, moment in enumerate(moments)}
    return {name: host(array).copy() for name, array in named.items()}


def _differing(a: dict[str, Floats], b: dict[str, Floats]) -> int:
    """Return how many arrays are not the same in both, bit for bit."""
    return len(a.keys() ^ b.keys()) + sum(not same_bits(a[name], b[name]) for name in a.keys() & b.keys())


def evaluation(setting: Setting) -> Iterator[Check]:
    """Check that the first batch of the test split, scored twice, gets the same scores."""
    experiment = fresh(setting)
    scores = []
    for _ in range(2):
        with closing(experiment.evaluate()) as batches:  # type: ignore[type-var]
            scores.append(host(next(batches).totals).copy())
    differing = not same_bits(*scores)
    yield checked("scores that differ between two evaluations", "same bits", Experiment.score, differing, 0.0)


CHECKS = (repetition, by_hand, angles, evaluation)

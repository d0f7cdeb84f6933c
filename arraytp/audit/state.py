"""The run itself: two runs give the same bits, threads do not matter, a checkpoint gives everything back."""

import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from arraytp.audit.check import Check, Floats, checked, host, same_bits
from arraytp.audit.setting import Setting, fresh
from arraytp.training.checkpoint import read_checkpoint, write_checkpoint
from arraytp.training.experiment import Experiment

THREADS = 3
RUN = {"position": {"step": 1, "loss": 0.1 + 0.2}}


def repetition(setting: Setting) -> Iterator[Check]:
    """Check two steps of two runs; on one thread and three; and once more from a checkpoint after the first."""
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


def _step(setting: Setting, experiment: Experiment, number: int) -> None:
    # Two batches of the same images: the second in reverse order.
    order = slice(None, None, -1 if number else 1)
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
    """Check the first batch of the test split, scored twice."""
    experiment = fresh(setting)
    scores = []
    for _ in range(2):
        with closing(experiment.evaluate()) as batches:  # type: ignore[type-var]
            scores.append(host(next(batches).totals).copy())
    differing = not same_bits(*scores)
    yield checked("scores that differ between two evaluations", "same bits", Experiment.score, differing, 0.0)


CHECKS = (repetition, evaluation)

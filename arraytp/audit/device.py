"""A device against the host: the same passes, updates and feedback training on NumPy in float64."""

from collections.abc import Iterator
from dataclasses import replace

from arraytp.audit.check import Check, apart, checked, host, worst
from arraytp.audit.setting import Setting
from arraytp.backend import NUMPY
from arraytp.experiment import Experiment, build_planned

# Sums in another order, layer after layer, and after two iterations of feedback training.
TOLERANCE = 1e-8


def against_host(setting: Setting) -> Iterator[Check]:
    """Check logits, updates and feedback weights of one step."""
    if setting.experiment.plan.backend.on_host:
        return
    there = build_planned(setting.experiment.plan)
    here = build_planned(replace(setting.experiment.plan, backend=NUMPY))
    there.propose(setting.raw, setting.labels)
    here.propose(host(setting.raw), host(setting.labels))
    assert there.passed is not None
    assert here.passed is not None
    assert there.updates is not None
    assert here.updates is not None
    for n, block in enumerate(setting.network.blocks):
        error = apart(there.passed.s[n + 1], here.passed.s[n + 1])
        yield checked(f"{block.label}: activations on the host", "the same", Experiment.run_forward, error, TOLERANCE)
        error = worst(*(apart(a, b) for a, b in zip(there.updates[n], here.updates[n], strict=True)))
        yield checked(
            f"{block.label}: updates on the host", "the same", setting.experiment.rule.updates, error, TOLERANCE
        )
    for name, array in here.rule_state.items():
        if name.startswith("feedback/"):
            error = apart(there.rule_state[name], array)
            yield checked(f"{name} on the host", "the same", Experiment.train_feedback, error, TOLERANCE)


CHECKS = (against_host,)

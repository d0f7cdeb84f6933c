"""A device against the host: the same passes and updates on NumPy in float64.

Feedback training, whose noise is another one there, is held against its losses by `arraytp.audit.feedback`.
"""

from collections.abc import Iterator
from dataclasses import replace

from arraytp.audit.check import Check, apart, checked, host, worst
from arraytp.audit.setting import Setting
from arraytp.backend import NUMPY
from arraytp.training.experiment import Experiment, build_planned

# Sums in another order, layer after layer.
TOLERANCE = 1e-8


def against_host(setting: Setting) -> Iterator[Check]:
    """Check activations and updates of one step with the initial feedback weights."""
    if setting.experiment.plan.backend.on_host:
        return
    there = build_planned(setting.experiment.plan)
    here = build_planned(replace(setting.experiment.plan, backend=NUMPY))
    for one, images, labels in (
        (there, setting.raw, setting.labels),
        (here, host(setting.raw), host(setting.labels)),
    ):
        one.run_forward(images, labels)
        one.propose_updates()
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


CHECKS = (against_host,)

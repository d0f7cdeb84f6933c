"""A device against the host: the same passes and updates on NumPy in float64.

Feedback training, whose noise is the device's own, is held against its losses by `arraytp.audit.feedback`.
"""

from collections.abc import Iterator
from dataclasses import replace

from arraytp.audit.check import Check, apart, checked, host
from arraytp.audit.gradients import updates_apart
from arraytp.audit.setting import Setting
from arraytp.backend import NUMPY
from arraytp.training.experiment import Experiment, build_planned

# Sums in another order, layer after layer.
TOLERANCE = 1e-8


def against_host(setting: Setting) -> Iterator[Check]:
    """Check activations and updates of one step with the initial feedback weights."""
    if setting.experiment.plan.backend.on_host:
        return
    rule, on_device = setting.rule, build_planned(setting.experiment.plan)
    on_host = build_planned(replace(setting.experiment.plan, backend=NUMPY))
    device_step = on_device.forward(setting.raw, setting.labels)
    host_step = on_host.forward(host(setting.raw), host(setting.labels))
    updates, expected = on_device.updates(device_step), on_host.updates(host_step)
    for n, block in enumerate(setting.network.blocks):
        error = apart(device_step.batch.at(n).output, host_step.batch.at(n).output)
        yield checked(f"{block.label}: activations on the host", "the same", Experiment.forward, error, TOLERANCE)
        error = updates_apart([updates[n]], [expected[n]])
        yield checked(f"{block.label}: updates on the host", "the same", rule.updates or rule.local_update, error,
                      TOLERANCE)  # fmt: skip


CHECKS = (against_host,)

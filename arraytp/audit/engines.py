"""The same step computed in other ways: updates on the plain engine, a device's activations and updates on the host.

Feedback training, whose noise is the device's own, is checked against its losses by `arraytp.audit.feedback`.
"""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from arraytp.audit.check import Check, apart, checked, host
from arraytp.audit.gradients import PASS, ROUNDINGS, updates_apart
from arraytp.audit.setting import Setting, copied
from arraytp.backend import NUMPY
from arraytp.rules.protocol import Updates
from arraytp.training.build import build_planned
from arraytp.training.experiment import Experiment

# Sums are in another order, layer after layer.
ON_HOST = 1e-8


def both(setting: Setting) -> Iterator[Check]:
    """Check the update of every block on both engines."""
    rule = setting.rule
    # The nudges of GAIT-prop's literal form leave inverses few digits: rules that invert have checks of their own.
    tolerance = None if rule.inverts else PASS
    pairs = zip(setting.network.blocks, setting.propose(), setting.propose(setting.plain), strict=True)
    for block, fast, plain in pairs:
        yield checked(f"{block.label}: update, fast engine against plain", "the same",
                      rule.updates or rule.local_update, updates_apart([fast], [plain]), tolerance)  # fmt: skip


def against_host(setting: Setting) -> Iterator[Check]:
    """Check a device's activations and updates of one step with the initial feedback weights, against NumPy's."""
    if setting.experiment.plan.backend.on_host:
        return
    rule, on_device = setting.rule, build_planned(setting.experiment.plan)
    on_host = build_planned(replace(setting.experiment.plan, backend=NUMPY))
    device_step = on_device.forward(setting.raw, setting.labels)
    host_step = on_host.forward(host(setting.raw), host(setting.labels))
    updates, expected = on_device.updates(device_step), on_host.updates(host_step)
    apart_by_block = [updates_apart([own], [other]) for own, other in zip(updates, expected, strict=True)]
    outputs = [apart(device_step.batch.at(n).output, host_step.batch.at(n).output) for n in range(len(updates))]
    bounds = _bounds(setting, on_host, expected)
    for block, activations, difference, bound in zip(
        setting.network.blocks, outputs, apart_by_block, bounds, strict=True
    ):
        yield checked(f"{block.label}: activations on the host", "the same", Experiment.forward, activations, ON_HOST)
        yield checked(f"{block.label}: updates on the host", "the same", rule.updates or rule.local_update, difference,
                      bound)  # fmt: skip


def _bounds(setting: Setting, on_host: Experiment, expected: Updates) -> list[float]:
    """Return how far apart the updates of two machines may be.

    Rules that invert magnify rounding errors, the more so after the nudges of GAIT-prop's literal form: their bound is
    derived from the effect of one rounding of the images.
    """
    if not setting.rule.inverts:
        return [ON_HOST] * len(expected)
    kept, raw = copied(expected), host(setting.raw)
    nudged = on_host.updates(on_host.forward(np.nextafter(raw, np.inf, dtype=raw.dtype), host(setting.labels)))
    return [max(ON_HOST, ROUNDINGS * updates_apart([own], [other])) for own, other in zip(nudged, kept, strict=True)]

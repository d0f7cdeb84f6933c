"""Updates of the rule, whichever it is: the fast engine against the readable one."""

from collections.abc import Iterator

from arraytp.audit.check import Check, checked
from arraytp.audit.gradients import PASS, updates_apart
from arraytp.audit.setting import Setting


def both(setting: Setting) -> Iterator[Check]:
    """Check the update of every block on both engines."""
    rule = setting.rule
    function = rule.updates or rule.local_update
    # Nudges of the literal form of GAIT-prop leave few digits to what inverts: such rules have checks of their own.
    tolerance = None if rule.inverts else PASS
    pairs = zip(setting.network.blocks, setting.propose(), setting.propose(setting.plain), strict=True)
    for block, fast, plain in pairs:
        yield checked(f"{block.label}: update, fast engine against plain", "the same", function,
                      updates_apart([fast], [plain]), tolerance)  # fmt: skip


CHECKS = (both,)

"""Checks that the rule itself brings: `arraytp.rules.protocol.Rule.checks`."""

from collections.abc import Iterator

from arraytp.audit.check import Check
from arraytp.audit.setting import Setting


def own(setting: Setting) -> Iterator[Check]:
    """Yield the lines of the rule's own checks, one check after the other."""
    for check in setting.rule.checks:
        yield from check(setting)


CHECKS = (own,)

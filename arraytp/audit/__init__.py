"""Check everything about a config's network, data and rule that can be checked: `audit`.

Each module holds one family of checks: functions of a `Setting` that yield lines, each of them a `Check`.
"""

from arraytp.audit.check import Check
from arraytp.audit.families import FAMILIES, audit

__all__ = ["FAMILIES", "Check", "audit"]

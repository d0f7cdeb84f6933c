"""Everything about a config's network, data and rule that can be checked, checked: `audit`.

Each module holds one family of checks, as functions of a `Setting` that yield lines, a `Check` each.
"""

from arraytp.audit.check import Check
from arraytp.audit.families import FAMILIES, audit

__all__ = ["FAMILIES", "Check", "audit"]

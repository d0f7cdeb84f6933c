"""The learning rules, one file each, and the registry in which configs look them up."""

from typing import TYPE_CHECKING, Any, Union

from arraytp.rules import (
    alignment,
    bp,
    dfa,
    drl,
    dtp,
    fa,
    gait_prop,
    gnt,
    kolen_pollack,
    ldrl,
    ldrl_parallel,
    ridge_tp,
    sign_symmetry,
    tp,
    weight_mirror,
)
from arraytp.rules.protocol import Options, Rule

_MODULES = (
    bp,
    fa,
    dfa,
    sign_symmetry,
    kolen_pollack,
    weight_mirror,
    alignment,
    gait_prop,
    tp,
    dtp,
    ldrl,
    ldrl_parallel,
    drl,
    ridge_tp,
    gnt,
)

RULES: dict[str, Rule[Any]] = {module.RULE.name: module.RULE for module in _MODULES}
"""The rules by name."""

if TYPE_CHECKING:
    RuleOptions = Options
else:
    RuleOptions = Union[tuple(rule.options for rule in RULES.values())]  # noqa: UP007

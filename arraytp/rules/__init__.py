"""The learning rules, one file each, and the one line that makes each known to configs."""

from types import ModuleType

from arraytp.rules import bp, dfa, fa, gait_prop

RuleOptions = bp.Options | fa.Options | dfa.Options | gait_prop.Options
RULES: dict[str, ModuleType] = {"bp": bp, "fa": fa, "dfa": dfa, "gait-prop": gait_prop}

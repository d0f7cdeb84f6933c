"""The learning rules, one file each, and the one line that makes each known to configs."""

from types import ModuleType

from arraytp.rules import bp, dfa, drl, dtp, fa, gait_prop, ldrl, ldrl_parallel, tp

RuleOptions = (
    bp.Options
    | fa.Options
    | dfa.Options
    | gait_prop.Options
    | tp.Options
    | dtp.Options
    | ldrl.Options
    | ldrl_parallel.Options
    | drl.Options
)
RULES: dict[str, ModuleType] = {
    "bp": bp,
    "fa": fa,
    "dfa": dfa,
    "gait-prop": gait_prop,
    "tp": tp,
    "dtp": dtp,
    "ldrl": ldrl,
    "ldrl-parallel": ldrl_parallel,
    "drl": drl,
}

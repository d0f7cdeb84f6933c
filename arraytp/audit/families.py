"""The families of checks in order, and the audit that runs all of them."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

from arraytp.audit import (
    alignment,
    closed_form,
    data,
    engines,
    feedback,
    gait_prop,
    gradients,
    inverses,
    ops,
    optimisers,
    state,
    targets,
    theorems,
)
from arraytp.audit.check import Check, name_of
from arraytp.audit.setting import Setting, prepare
from arraytp.errors import Interrupted, UserError
from arraytp.training.build import build_planned
from arraytp.training.plan import Plan

Function = Callable[[Setting], Iterator[Check]]


def _own(setting: Setting) -> Iterator[Check]:
    """Yield the lines of the rule's own checks, `arraytp.rules.protocol.Rule.checks`."""
    return chain.from_iterable(check(setting) for check in setting.rule.checks)


FAMILIES: dict[str, tuple[Function, ...]] = {
    "operations": ops.CHECKS,
    "gradients": gradients.CHECKS,
    "engines": (engines.both,),
    "feedback alignment": alignment.CHECKS,
    "inverses": inverses.CHECKS,
    "GAIT-prop": gait_prop.CHECKS,
    "feedback training": (*feedback.CHECKS, *closed_form.CHECKS),
    "targets": targets.CHECKS,
    "theorems": theorems.CHECKS,
    "own checks": (_own,),
    "optimiser": optimisers.CHECKS,
    "run": state.CHECKS,
    "device": (engines.against_host,),
    "batches": data.CHECKS,
}


def audit(planned: Plan) -> Iterator[tuple[str, Check]]:
    """Check everything about a config that can be checked; yield family and line as they are computed.

    The config is audited in float64 and on a small batch. NonFiniteError if the network's output on it is not finite.
    """
    damaged = False
    for line in _guarded("shards", lambda: data.shards(planned.dataset)):
        damaged = damaged or line.verdict == "fail"
        yield "shards", line
    try:
        with _without_warnings():
            setting = prepare(planned)
    except UserError as error:
        if not damaged:
            raise
        yield "batches", Check(str(error), "the first batch", name_of(build_planned), float("nan"), 0.0)
        return
    for family, functions in FAMILIES.items():
        for function in functions:
            for line in _guarded(family, lambda function=function: function(setting)):  # type: ignore[misc]
                yield family, line


def _guarded(family: str, lines: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    """Yield lines; an exception becomes a failed line instead of ending the audit."""
    try:
        with _without_warnings():
            yield from lines()
    except Interrupted:
        raise
    except Exception as error:
        what = " ".join(f"{family}: cannot be computed: {type(error).__name__}: {error}".split())
        yield Check(what, "no exception", name_of(audit), float("nan"), 0.0)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence warnings about overflow and division by 0, which show in the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield

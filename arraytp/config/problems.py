"""What is wrong with a config tree, in the config's own terms."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from arraytp.config.describe import (
    allowed,
    chosen,
    either,
    entry_of,
    example,
    flow,
    keys,
    members,
    sections,
    tag_of,
    words,
)
from arraytp.config.document import KeyPath, Tree, encodable
from arraytp.config.schema import Config

LARGEST_INTEGER = 2**63 - 1


@dataclass(frozen=True)
class Problem:
    """One thing to repair: `text` continues a sentence that starts with the key; `absent` if the key is missing."""

    path: KeyPath
    text: str
    absent: bool = False


def plain_problems(tree: Tree, path: KeyPath = ()) -> Iterator[Problem]:
    """Yield what no config may hold: non-finite or huge numbers, text that UTF-8 cannot encode, foreign objects."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if isinstance(key, str) and encodable(key):
                yield from plain_problems(value, (*path, key))
            elif isinstance(key, str):
                yield Problem((*path, ascii(key)), "is not a key: it holds what cannot be written as UTF-8")
            else:
                yield Problem((*path, str(key)), f"is not a key: keys are text, got {flow(key)}")
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from plain_problems(value, (*path, index))
    elif (fault := _scalar_fault(tree)) is not None:
        yield Problem(path, fault)


def _scalar_fault(value: Tree) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be a finite number, got {value}"
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        return f"is too large: whole numbers go up to {LARGEST_INTEGER}"
    if isinstance(value, str) and not value.isprintable() and not encodable(value):
        return "holds characters that cannot be written as UTF-8"
    if value is None or isinstance(value, bool | int | float | str):
        return None
    return f"must be a number, text, list or map, got {type(value).__name__}"


def explain(error: ValidationError, tree: Mapping[str, Tree]) -> list[Problem]:
    """Translate the errors of schema validation into problems.

    Unknown keys come first. The key that a misspelt one stands for also counts as missing; this problem is left out.
    """
    spots = [(details, spot) for details in error.errors(include_url=False) if (spot := _locate(details["loc"], tree))]
    unknown = [_unknown_key(spot) for _, spot in spots if spot.unknown]
    guessed = {path for _, path in unknown}
    # Pydantic also reports a list with a bad entry as too short.
    above = {spot.path[:depth] for _, spot in spots for depth in range(len(spot.path))}
    others = [
        _problem(details, spot)
        for details, spot in spots
        if not spot.unknown and not (details["type"] == "too_short" and spot.path in above)
    ]
    kept = [problem for problem in others if not (problem.absent and problem.path in guessed)]
    return list(dict.fromkeys([problem for problem, _ in unknown] + kept))


@dataclass(frozen=True)
class _Spot:
    """Where in the config, and where in its types, an error lies."""

    path: KeyPath
    annotation: Any
    node: Tree
    unknown: bool = False


def _locate(loc: tuple[str | int, ...], tree: Tree) -> _Spot | None:
    """Follow an error's location; None if the error is about an alternative that the config does not choose."""
    spot = _Spot((), Config, tree)
    for step in loc:
        alternatives = members(spot.annotation)
        if len(alternatives) > 1:
            if not isinstance(spot.node, Mapping) or (option := chosen(spot.annotation, spot.node)) is None:
                return spot
            if step not in (option.__name__, *(tag_of(option) or ())[1:]):
                return None
            spot = _Spot(spot.path, option, spot.node)
        elif isinstance(step, int):
            spot = _Spot((*spot.path, step), entry_of(alternatives[0]), spot.node[step])
        else:
            spot = _child(spot, step)
    return spot


def _child(spot: _Spot, key: str) -> _Spot:
    (section,) = sections(spot.annotation)
    path = (*spot.path, key)
    if key not in keys(section):
        return _Spot(path, section, spot.node, unknown=True)
    return _Spot(path, keys(section)[key], spot.node.get(key))


def _unknown_key(spot: _Spot) -> tuple[Problem, KeyPath | None]:
    """Return the problem and the key that was probably meant."""
    *parent, key = spot.path
    tag = tag_of(spot.annotation)
    known = [*keys(spot.annotation), *(["variants"] if not parent else [])]
    near = get_close_matches(str(key), known, n=1)
    if near:
        return Problem(spot.path, f"is not a known key; did you mean {near[0]}?"), (*parent, near[0])
    where = f"with {tag[0]}: {tag[1]}" if tag else "here"
    return Problem(spot.path, f"is not a known key; known {where}: {', '.join(known)}"), None


def _problem(details: ErrorDetails, spot: _Spot) -> Problem:
    options = sections(spot.annotation)
    if isinstance(spot.node, Mapping) and len(options) > 1:
        return _wrong_tag(spot, options)
    if details["type"] == "missing":
        shown = flow(example(spot.annotation), quoted=False)
        return Problem(spot.path, f"is missing; for example {spot.path[-1]}: {shown}", absent=True)
    if details["type"] == "value_error":
        return Problem(spot.path, str(details["ctx"]["error"]))
    if spot.node is None:
        return Problem(spot.path, f"is empty; it must be {allowed(spot.annotation)}")
    if spot.node in ("", [], ()):
        return Problem(spot.path, "must not be empty")
    return Problem(spot.path, f"must be {allowed(spot.annotation)}, got {flow(spot.node)}{_hint(spot)}")


def _wrong_tag(spot: _Spot, options: list[type]) -> Problem:
    tags = [tag for option in options if (tag := tag_of(option))]
    key, names = tags[0][0], [name for _, name in tags]
    path = (*spot.path, key)
    if key not in spot.node:
        return Problem(path, f"is missing; it must be one of {either(names)}", absent=True)
    return Problem(path, f"must be one of {either(names)}, got {flow(spot.node[key])}{_nearest(spot.node[key], names)}")


def _nearest(value: Tree, names: list[str]) -> str:
    near = get_close_matches(str(value).lower(), names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _hint(spot: _Spot) -> str:
    """Say what was probably meant by a refused value."""
    value, accepted = spot.node, allowed(spot.annotation)
    if isinstance(value, float) and value.is_integer() and 0 <= value <= LARGEST_INTEGER and "whole number" in accepted:
        return f"; write {int(value)}" if _fits(int(value), spot.annotation) else ""
    if not isinstance(value, str):
        return ""
    if "number" in accepted and (number := _number(value, whole="whole number" in accepted)) is not None:
        plain = value.replace("_", "")
        said = f"; write it without {'quotes' if plain == value else 'underscores'}: {plain}"
        return said if _fits(number, spot.annotation) else ""
    for option in sections(spot.annotation):
        if (tag := tag_of(option)) and tag[1] == value:
            return f"; write {spot.path[-1]}: {{{tag[0]}: {value}}}"
    return _nearest(value, words(spot.annotation))


def _number(text: str, whole: bool) -> float | None:
    """Return the finite number that text would be without quotes, None if it is none; YAML has only ASCII digits."""
    try:
        number = int(text) if whole else float(text)
        return number if text.isascii() and math.isfinite(number) else None
    except (ValueError, OverflowError):
        return None


def _fits(number: float, annotation: Any) -> bool:
    """Tell whether a number would be accepted, so that a hint does not lead to the next refusal."""
    try:
        TypeAdapter(annotation).validate_python(number)
    except ValidationError:
        return False
    return True

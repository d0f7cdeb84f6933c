"""The settings of each variant of a file, with `--set` overrides, and the problems in them."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, NoReturn

from pydantic import TypeAdapter, ValidationError

from arraytp.config.describe import flow
from arraytp.config.document import Document, KeyPath, Tree, dotted, parse_text
from arraytp.config.merge import assign, overlay
from arraytp.config.problems import Problem, explain, plain_problems
from arraytp.config.schema import LONGEST_NAME, Config
from arraytp.errors import UserError, UserErrors
from arraytp.rules import RULES

_VARIANT_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
# What `arraytp run` writes beside the variants' folders.
_TAKEN_NAMES = ("comparison.png", "comparison.md", "comparison.csv", "seeds.csv", "study.md", "figures")
_MOST_PROBLEMS = 10
_NOT_IN_VARIANTS = {
    "name": "has no place in a variant: its name is the key above it",
    "variants": "has no place in a variant: variants do not nest",
}


@dataclass(frozen=True)
class ConfigFile:
    """The configs of one file, by variant, in the file's order; {"": config} when it has none.

    `name` names the result folder; it is the file's stem unless the file says otherwise.
    """

    name: str
    variants: Mapping[str, Config]


@cache
def schema_adapter() -> TypeAdapter[Config]:
    """Return the validator of the config schema; built on first use, since that takes a while."""
    return TypeAdapter(Config)


@dataclass(frozen=True)
class _Override:
    """One `--set`: the variant it is for (None: all), where it goes, what it holds."""

    variant: str | None
    path: KeyPath
    document: Document


@dataclass(frozen=True)
class _Finding:
    """A problem with its place, as printed, and whether this text tells which variant has it."""

    text: str
    names_variant: bool


def resolve(document: Document, name: str, overrides: Sequence[str], chosen: str | None = None) -> ConfigFile:
    """Apply every variant and `--set` to the file's common settings and check the results.

    With a `chosen` variant, a `--set` that names no variant applies to that one only, since its rule may have keys that
    the others' lack; but a `name` applies to them all.
    """
    base, variants = _split(document)
    sets = [_parse_override(text, list(variants)) for text in overrides]
    configs: dict[str, Config] = {}
    findings: dict[_Finding, list[str]] = {}
    for variant, own in (variants or {"": {}}).items():
        general = chosen in (None, variant)
        applying = [
            entry
            for entry in sets
            if entry.variant == variant or (entry.variant is None and (general or entry.path == ("name",)))
        ]
        outcome = _check(_laid(overlay({"name": name, **base}, own), applying))
        if isinstance(outcome, Config):
            configs[variant] = outcome
            continue
        places = _Places(document, variant, applying)
        for problem in outcome:
            findings.setdefault(places.finding(problem), []).append(variant)
    if findings:
        raise UserErrors(_report(findings, len(variants)))
    return ConfigFile(next(iter(configs.values())).name, configs)


def _split(document: Document) -> tuple[dict[str, Tree], dict[str, Mapping[str, Tree]]]:
    """Separate the settings that all variants share from each variant's own."""
    if document.tree is None:
        raise UserError(f"{document.source}: empty; a config needs at least data, network, optimizer and train")
    if not isinstance(document.tree, Mapping):
        raise UserError(f"{document.source}: must be a map of keys, such as seed: 0, got {flow(document.tree)}")
    base = dict(document.tree)
    variants = base.pop("variants", None)
    if variants is None:
        return base, {}
    if not isinstance(variants, Mapping):
        _refuse(document, ("variants",), f"must be a map from variant names to overrides, got {flow(variants)}")
    return base, {name: _own(document, name, overrides) for name, overrides in variants.items()}


def _own(document: Document, name: Any, overrides: Tree) -> Mapping[str, Tree]:
    """Return a variant's overrides; UserError if its name or one of their keys is not allowed."""
    path = ("variants", name)
    if not isinstance(name, str) or _VARIANT_NAME.fullmatch(name) is None:
        _refuse(document, path, "is not a variant name: use letters, digits, '.', '_' and '-', with no dot in front")
    if len(name) > LONGEST_NAME:
        _refuse(document, path, f"is too long: a variant name has at most {LONGEST_NAME} letters")
    if name in _TAKEN_NAMES:
        _refuse(document, path, "is not a variant name: what compares all variants is written under it")
    if overrides is None:
        return {}
    if not isinstance(overrides, Mapping):
        _refuse(document, path, f"must be a map of overrides, got {flow(overrides)}")
    for key, text in _NOT_IN_VARIANTS.items():
        if key in overrides:
            _refuse(document, (*path, key), text)
    return overrides


def _refuse(document: Document, path: KeyPath, text: str) -> NoReturn:
    raise UserError(f"{document.places.get(path, document.source)}: {dotted(path)} {text}")


def _parse_override(text: str, variants: Sequence[str]) -> _Override:
    """Parse one `--set`, given the names of the file's variants."""
    shown = f"--set {text}"
    key, equals, value = text.partition("=")
    if not equals or "" in key.strip().split("."):
        raise UserError(f"{shown}: expected key.path=value, for example optimizer.lr=0.1")
    document = parse_text(value, shown, lambda line: shown)
    steps: KeyPath = tuple(key.strip().split("."))
    if steps[0] != "variants":
        return _Override(None, steps, document)
    # A variant's name may hold dots, so the known names decide where it ends; the longest match wins.
    rest = dotted(steps[1:]) + "."
    name = max((name for name in variants if rest.startswith(name + ".")), key=len, default=None)
    if name is None or rest == name + ".":
        known = ", ".join(variants) or "none"
        raise UserError(f"{shown}: expected variants.NAME.key.path=value with NAME among the variants: {known}")
    steps = tuple(rest[len(name) + 1 : -1].split("."))
    if steps[0] in _NOT_IN_VARIANTS:
        raise UserError(f"{shown}: {steps[0]} {_NOT_IN_VARIANTS[steps[0]]}")
    return _Override(name, steps, document)


def _laid(tree: Mapping[str, Tree], sets: Sequence[_Override]) -> Mapping[str, Tree]:
    for entry in sets:
        try:
            tree = assign(tree, entry.path, entry.document.tree)
        except UserError as error:
            raise UserError(f"{entry.document.source}: {error}") from None
    return tree


def _check(tree: Mapping[str, Tree]) -> Config | list[Problem]:
    if faults := list(plain_problems(tree)):
        return faults
    try:
        # From JSON, strict mode accepts a map for a dataclass and a list for a tuple, but still no text for a number.
        return schema_adapter().validate_json(json.dumps(_with_own_feedback(tree), default=dict))
    except ValidationError as error:
        return explain(error, tree)


def _with_own_feedback(tree: Mapping[str, Tree]) -> Mapping[str, Tree]:
    """Fill in what `rule.feedback` leaves out with the rule's own defaults, which differ from rule to rule."""
    rule = tree.get("rule")
    if not (isinstance(rule, Mapping) and isinstance(rule.get("feedback"), Mapping) and str(rule.get("name")) in RULES):
        return tree
    usual = getattr(RULES[rule["name"]].options(), "feedback", None)
    feedback = {**(asdict(usual) if usual is not None else {}), **rule["feedback"]}
    return {**tree, "rule": {**rule, "feedback": feedback}}


def _has_scalar(tree: Tree, path: KeyPath) -> bool:
    """Tell whether a number, a text or a truth value is at a path."""
    for step in path:
        if not isinstance(tree, Mapping):
            return False
        tree = tree.get(step)
    return isinstance(tree, str | int | float)


class _Places:
    """Where each setting of one variant comes from."""

    def __init__(self, document: Document, variant: str, sets: Sequence[_Override]) -> None:
        start = ("variants", variant)
        own = {path[2:]: place for path, place in document.places.items() if path[:2] == start and len(path) > 2}
        variants = document.tree.get("variants") or {}
        trees = document.tree, variants.get(variant)
        given: dict[KeyPath, str] = {}
        opened: dict[KeyPath, str] = {}
        for entry in sets:
            source = entry.document.source
            given.update({(*entry.path, *path): source for path in ((), *entry.document.places)})
            for depth in range(1, len(entry.path)):
                # The override has replaced a number or text on its path by a map.
                replaced = any(_has_scalar(tree, entry.path[:depth]) for tree in trees)
                (given if replaced else opened)[entry.path[:depth]] = source
        # At each depth, the first layer that has a path wins; maps that a --set only passed through come last.
        layers = (given, own, document.places, opened)
        # List indices as text, as `--set` has them.
        self._layers = [({tuple(map(str, path)): layer[path] for path in layer}, layer is own) for layer in layers]
        self._given = self._layers[0][0]
        self._variant = variant
        self._source = document.source

    def finding(self, problem: Problem) -> _Finding:
        """Prefix a problem with the place of its key or, if the key is missing, of the map around it."""
        path = tuple(map(str, problem.path))
        for place in _lookups(path, problem.absent):
            for layer, is_own in self._layers:
                if place in layer:
                    key = dotted(("variants", self._variant, *path) if is_own else path)
                    return _Finding(f"{layer[place]}: {key} {problem.text}", is_own)
                if layer is self._given and place[:-1] in layer:
                    # The map around it comes from a --set, whatever the file has there.
                    break
        return _Finding(f"{self._source}: {dotted(path)} {problem.text}", False)


def _lookups(path: tuple[str, ...], absent: bool) -> Iterator[tuple[str, ...]]:
    """Yield the keys whose place can stand for that of a problem at `path`, the best first."""
    if absent:
        path = path[:-1]
        if path:
            # A missing key is required by the choice that the name or type beside it made.
            yield from ((*path, "name"), (*path, "type"))
    for depth in range(len(path), 0, -1):
        yield path[:depth]


def _report(findings: Mapping[_Finding, Sequence[str]], variants: int) -> list[str]:
    """Return the messages; one that holds for only some variants names them, unless its text does already."""
    lines = [
        finding.text
        if finding.names_variant or len(names) >= variants
        else f"{finding.text} (in variant {', '.join(names)})"
        for finding, names in findings.items()
    ]
    more = [f"… and {len(lines) - _MOST_PROBLEMS} more problems"] if len(lines) > _MOST_PROBLEMS else []
    return lines[:_MOST_PROBLEMS] + more

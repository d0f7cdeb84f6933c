"""What a config key may hold, in words, derived from its type annotation."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from arraytp.config.document import Tree

_LONGEST_VALUE = 60


def members(annotation: Any) -> list[Any]:
    """Return the alternatives of an annotation, without None; one that is not a union is its only alternative."""
    bare = _bare(annotation)
    if get_origin(bare) in (Union, UnionType):
        return [member for part in get_args(bare) if part is not NoneType for member in members(part)]
    return [annotation]


def sections(annotation: Any) -> list[type]:
    """Return those alternatives of an annotation that are maps with known keys."""
    return [bare for bare in map(_bare, members(annotation)) if isinstance(bare, type) and is_dataclass(bare)]


@cache
def keys(section: type) -> dict[str, Any]:
    """Return the known keys of a map and the annotation of each."""
    hints = get_type_hints(section, include_extras=True)
    return {field.name: hints[field.name] for field in fields(section)}


def required_keys(section: type) -> list[str]:
    """Return the keys without a default, and the key that distinguishes the section from its alternatives."""
    tag = tag_of(section)
    needed = [field.name for field in fields(section) if field.default is MISSING and field.default_factory is MISSING]
    return needed if tag is None else [tag[0], *needed]


def tag_of(section: type) -> tuple[str, str] | None:
    """Return the key and value by which a section is chosen, such as ("name", "adam"); None if there is none."""
    for key in ("name", "type"):
        values = get_args(annotation) if get_origin(annotation := keys(section).get(key)) is Literal else ()
        if len(values) == 1:
            return key, values[0]
    return None


def chosen(annotation: Any, node: Mapping[str, Tree]) -> type | None:
    """Return the section that a map chooses by its tag; None if the tag is missing or unknown."""
    options = sections(annotation)
    if len(options) == 1:
        return options[0]
    return next((option for option in options if (tag := tag_of(option)) and node.get(tag[0]) == tag[1]), None)


def allowed(annotation: Any) -> str:
    """Say what an annotation admits, as the end of a sentence "must be …"."""
    options = sections(annotation)
    parts = [_in_words(member) for member in members(annotation) if _bare(member) not in options]
    tags = [tag for option in options if (tag := tag_of(option))]
    if len(tags) > 1:
        parts.append(f"a map with {tags[0][0]}: {either(value for _, value in tags)}")
    elif options:
        parts.append(f"a map with the keys {', '.join(keys(options[0]))}")
    return ", or ".join(parts)


def entry_of(annotation: Any) -> Any:
    """Return the annotation of a list's entries."""
    return get_args(_bare(annotation))[0]


def words(annotation: Any) -> list[str]:
    """Return the fixed words that an annotation admits."""
    bares = map(_bare, members(annotation))
    return [str(word) for bare in bares if get_origin(bare) is Literal for word in get_args(bare)]


def either(values: Any) -> str:
    """Join alternatives: "a, b or c"."""
    *head, last = map(str, values)
    return f"{', '.join(head)} or {last}" if head else last


def example(annotation: Any) -> Tree:
    """Return a value that an annotation admits, to show in a message."""
    for entry in _metadata(annotation):
        if isinstance(entry, FieldInfo) and entry.examples:
            return entry.examples[0]
    bare = _bare(members(annotation)[0])
    if isinstance(bare, type) and is_dataclass(bare):
        return {key: example(keys(bare)[key]) for key in required_keys(bare)}
    if get_origin(bare) is Literal:
        return get_args(bare)[0]
    if get_origin(bare) in (list, tuple):
        return [example(entry_of(bare))]
    return {int: 1, float: 0.1, str: "text", bool: True}[bare]


def flow(value: Tree, *, quoted: bool = True) -> str:
    """Write a value on one line of YAML; long ones are truncated."""
    text = _flow(value, quoted)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


def _flow(value: Tree, quoted: bool) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(entry, quoted)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_flow(entry, quoted) for entry in value) + "]"
    if value is None or isinstance(value, bool) or (quoted and isinstance(value, str)):
        return json.dumps(value, ensure_ascii=False)
    # Python refuses to write integers of thousands of digits, except in bases that are powers of two.
    return hex(value) if isinstance(value, int) and value.bit_length() > 64 else str(value)


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _metadata(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()


def _in_words(annotation: Any) -> str:
    bare = _bare(annotation)
    if get_origin(bare) is Literal:
        values = get_args(bare)
        return f"one of {either(values)}" if len(values) > 1 else str(values[0])
    if get_origin(bare) in (list, tuple):
        return f"a list, each entry {allowed(entry_of(bare))}"
    noun = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[bare]
    return noun + _bounds(_metadata(annotation))


def _bounds(metadata: tuple[Any, ...]) -> str:
    """Return the bounds of a number in words: " from 0 to below 1"."""
    low = next((f"from {entry.ge}" for entry in metadata if isinstance(entry, Ge)), None)
    low = next((f"above {entry.gt}" for entry in metadata if isinstance(entry, Gt)), low)
    high = next((f"to {entry.le}" for entry in metadata if isinstance(entry, Le)), None)
    high = next((f"to below {entry.lt}" for entry in metadata if isinstance(entry, Lt)), high)
    if high is None and low is not None and low.startswith("from"):
        return " of at least" + low.removeprefix("from")
    return "".join(f" {bound}" for bound in (low, high) if bound)

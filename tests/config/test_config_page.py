"""docs/config.md tells the truth: its examples load and its tables have every key, its range and its default."""

import json
import re
import shlex
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_args, get_origin

import pytest
from pydantic import TypeAdapter

from arraytp.config import Config, Normalize, parse_config
from arraytp.config.describe import allowed, flow, keys, members, sections, tag_of
from arraytp.config.document import parse_text
from arraytp.config.merge import overlay
from arraytp.options import FeedbackTraining, Pool

PAGE = (Path(__file__).parents[2] / "docs" / "config.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
BASE = {
    "data": {"dataset": "x"},
    "network": {"name": "lenet"},
    "optimizer": {"name": "adam", "lr": 1e-3},
    "train": {"epochs": 1, "batch_size": 1},
}


def rows(heading):
    """Return the table under a heading: key → (holds, default)."""
    body = re.search(rf"^#+ {heading}\n(.*?)(?=^#|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert body is not None, f"the page has no heading {heading!r}"
    found = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|", body[1], re.MULTILINE)
    return {key: (holds, default) for key, holds, default in found}


def default(section, key):
    field = next(field for field in fields(section) if field.name == key)
    if field.default is field.default_factory is MISSING or key in (tag_of(section) or ())[:1]:
        return "required"
    if field.default is MISSING:
        return field.default_factory()
    return "none" if field.default is None else flow(field.default, quoted=False)


def section_of(key, annotation, shown):
    tree = parse_text(f"{key}: {shown.strip('`')}", "page", str).tree
    return TypeAdapter(annotation).validate_json(json.dumps(tree[key]))


def reachable(section):
    """Return a section's class and the classes of all sections below it."""
    found = [section]
    for annotation in keys(section).values():
        for member in members(annotation):
            bare = get_args(member)[0] if hasattr(member, "__metadata__") else member
            inner = get_args(bare)[0] if get_origin(bare) in (list, tuple) else member
            found += [deeper for option in sections(inner) for deeper in reachable(option)]
    return found


def heading(section):
    """Return the page's heading for a section's class."""
    if (tag := tag_of(section)) is None:
        places = {entry: key for key, annotation in keys(Config).items() for entry in sections(annotation)}
        inner = {Config: "Top level", Pool: "A block's pool", FeedbackTraining: "Training of feedback weights"}
        return inner.get(section) or places[section]
    if tag[0] == "type":
        return f"A block of type {tag[1]}"
    kind = next(key for key, annotation in keys(Config).items() if section in sections(annotation))
    return rf"The {kind}s? (?:\S+ and )*{tag[1]}(?: and \S+)*"


SECTIONS = [section for section in dict.fromkeys(reachable(Config)) if section not in (Config, Normalize)]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: f"{section.__module__}.{section.__name__}")
def test_a_table_has_every_key_with_its_range_and_default(section):
    table = rows(heading(section))
    if section is next(iter(sections(keys(Config)["data"]))):
        table = {key: row for key, row in table.items() if key not in keys(Normalize)}
    assert set(table) == set(keys(section))
    tag = tag_of(section)
    for key, (holds, shown) in table.items():
        # The table shows a section's default as the keys that differ from the section's own defaults.
        found = section_of(key, keys(section)[key], shown) if shown.startswith("`") else shown
        assert found == default(section, key), key
        if tag is None or key != tag[0]:
            assert holds == allowed(keys(section)[key]), key
        else:
            assert tag[1] in re.findall(r"[\w-]+", holds)


def test_own_statistics_are_described():
    table = rows("data")
    assert {key: table[key] for key in keys(Normalize)} == {
        key: (allowed(annotation), "required") for key, annotation in keys(Normalize).items()
    }


def test_the_top_level_table_has_every_section():
    table = rows("Top level")
    assert set(table) == {*keys(Config), "variants"}
    (config,) = parse_config(BASE).variants.values()
    for key, (_, shown) in table.items():
        if shown.startswith("`"):
            short = parse_text(f"{key}: {shown.strip('`')}", "page", str).tree
            (same,) = parse_config(BASE | short).variants.values()
            assert same == config
        elif shown not in ("required", "none") and key != "name":
            assert shown == flow(getattr(config, key), quoted=False)


@pytest.mark.parametrize("example", EXAMPLES, ids=[example.splitlines()[0] for example in EXAMPLES])
def test_an_example_loads_alone_or_upon_a_minimal_config(example):
    tree = parse_text(example, "docs/config.md", str).tree
    full = tree if "optimizer" in tree else overlay(BASE, tree)
    assert parse_config(full).variants


def test_the_page_has_two_full_examples_and_one_writes_out_every_section():
    full = [parse_text(example, "page", str).tree for example in EXAMPLES[-2:]]
    assert "variants" in full[0]
    # A study takes the place of training, so a config that trains has none.
    assert set(full[1]) == set(keys(Config)) - {"study"}


COMMANDS = [line for line in PAGE.splitlines() if line.startswith("arraytp run study.yml --set")]


@pytest.mark.parametrize("command", COMMANDS)
def test_an_override_of_the_page_works(command):
    blocks = [{"type": "conv", "channels": 1, "kernel": 5}, {"type": "dense", "units": 10}]
    overrides = [word for word in shlex.split(command)[3:] if word != "--set"]
    assert parse_config(BASE | {"network": {"blocks": blocks}, "variants": {"fa": None}}, overrides=overrides).variants

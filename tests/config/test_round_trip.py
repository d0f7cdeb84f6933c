"""A dumped config, read again, is the same config: results can be repeated from their own folder."""

from dataclasses import is_dataclass
from typing import Annotated, Literal, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import given, settings
from hypothesis import strategies as st

from arraytp.config import Config, dump_config, load_one, parse_config
from arraytp.config.describe import keys, members
from arraytp.config.document import parse_text
from arraytp.options import Conv, Dense, NetworkOptions, Staircase

NAMES = st.text(st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="/\\"), min_size=1).filter(
    lambda name: not name.startswith(".") and name.strip()
)


def bound(metadata, kind, attribute):
    return next((getattr(entry, attribute) for entry in metadata if isinstance(entry, kind)), None)


def numbers(kind, metadata):
    low, high = bound(metadata, Ge, "ge"), bound(metadata, Le, "le")
    above, below = bound(metadata, Gt, "gt"), bound(metadata, Lt, "lt")
    if kind is int:
        return st.integers(low, 2**63 - 1)
    return st.floats(
        low if above is None else above,
        high if below is None else below,
        exclude_min=above is not None,
        exclude_max=below is not None,
        allow_nan=False,
        allow_infinity=False,
    )


def values(annotation):
    """Return a strategy for whatever an annotation of the config admits."""
    return st.one_of([values_of(member) for member in members(annotation)])


def values_of(annotation):
    is_annotated = get_origin(annotation) is Annotated
    bare, *metadata = get_args(annotation) if is_annotated else (annotation,)
    if bare is bool:
        return st.booleans()
    if get_origin(bare) is Literal:
        return st.sampled_from(get_args(bare))
    if get_origin(bare) in (list, tuple):
        return st.lists(values(get_args(bare)[0]), min_size=1, max_size=3).map(get_origin(bare))
    if bare is Staircase:
        epochs = st.lists(st.integers(1, 99), min_size=1, max_size=3, unique=True).map(sorted).map(tuple)
        return sections(bare, epochs=epochs)
    if is_dataclass(bare):
        return sections(bare)
    return (
        numbers(bare, metadata)
        if bare in (int, float)
        else st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
    )


def sections(section, **chosen):
    return st.builds(section, **{key: values(annotation) for key, annotation in keys(section).items()} | chosen)


networks = sections(
    NetworkOptions, blocks=st.none(), activation=st.none() | values(keys(Dense)["activation"])
) | sections(NetworkOptions, name=st.none(), activation=st.none())
normalisations = st.sampled_from(["dataset", "none"]) | st.integers(1, 3).flatmap(
    lambda channels: sections(
        next(member for member in members(keys(keys(Config)["data"])["normalize"]) if is_dataclass(member)),
        mean=st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * channels),
        std=st.tuples(*[st.floats(0, exclude_min=True, allow_infinity=False)] * channels),
    )
)
configs = sections(Config, name=NAMES, network=networks, data=sections(keys(Config)["data"], normalize=normalisations))


@settings(max_examples=60, deadline=None)
@given(configs)
def test_a_dumped_config_reads_back_equal(config):
    tree = parse_text(dump_config(config), "dump", str).tree
    (again,) = parse_config(tree, "dump").variants.values()
    assert again == config


@given(st.floats(0, exclude_min=True, allow_infinity=False))
def test_every_float_survives_to_the_last_bit(rate):
    (config,) = parse_config(TREE | {"optimizer": {"name": "sgd", "lr": rate}}).variants.values()
    read = parse_text(dump_config(config), "dump", str).tree["optimizer"]["lr"]
    assert isinstance(read, float)
    assert read.hex() == rate.hex()


TREE = {
    "name": "no: [plain] text",
    "data": {"dataset": "1e-3"},
    "network": {"blocks": [{"type": "conv", "channels": 1, "kernel": 1}, {"type": "dense", "units": 2}]},
    "optimizer": {"name": "adam", "lr": 1e-3},
    "train": {"epochs": 0, "batch_size": 1},
}


def test_the_dump_holds_every_default_and_nothing_empty(tmp_path):
    (config,) = parse_config(TREE).variants.values()
    text = dump_config(config)
    assert "null" not in text
    for line in ("seed: 0", "  epsilon: 1e-08", "  normalize: dataset", "  every: 100", "    stride: 1", "  name: bp"):
        assert line in text.splitlines()
    path = tmp_path / "config.yml"
    path.write_text(text)
    assert load_one(path) == config
    assert isinstance(config.network.blocks[0], Conv)


@pytest.mark.parametrize("text", ["\x85", "a\nb", " ", "'", "#", "1e-3", "true", "null", "~", "a: b", "\u2028\ufeff"])
def test_text_that_yaml_could_take_for_something_else_survives(text):
    (config,) = parse_config(TREE | {"data": {"dataset": text}}).variants.values()
    assert parse_text(dump_config(config), "dump", str).tree["data"]["dataset"] == text

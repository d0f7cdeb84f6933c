"""Reads checked configs from files, and writes configs as text."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from arraytp.config.document import Document, Tree, read_document
from arraytp.config.resolve import ConfigFile, resolve, schema_adapter
from arraytp.config.schema import Config
from arraytp.errors import UserError
from arraytp.options import Conv, Dense


def load_config(path: str | Path, overrides: Sequence[str] = (), variant: str | None = None) -> ConfigFile:
    """Read a config file.

    Parameters
    ----------
    path : str or Path
        YAML 1.2.
    overrides : sequence of str
        "key.path=value" each, as `--set` takes them; applied in order, after the variants' own overrides.
    variant : str, optional
        The only variant to return; overrides that name no variant then apply to it alone.

    Returns
    -------
    ConfigFile
        Every variant, or only `variant`, checked and with defaults filled in.

    Raises
    ------
    UserError
        If the file cannot be read or a setting is wrong; one line per problem, at most ten, with its place in the file.
        Also if the variant is not in the file.
    """
    file = resolve(read_document(path), Path(path).stem, overrides, variant)
    if variant is None:
        return file
    if variant not in file.variants:
        known = f"its variants are {', '.join(file.variants)}" if "" not in file.variants else "it has no variants"
        raise UserError(f"{path}: has no variant {variant!r}; {known}")
    return replace(file, variants={variant: file.variants[variant]})


def load_one(path: str | Path, overrides: Sequence[str] = (), variant: str | None = None) -> Config:
    """Read a config file that has no variants, or one variant of a file that has some, to which overrides then apply.

    Raises
    ------
    UserError
        As `load_config`; also if the file has variants and none is chosen.
    """
    variants = load_config(path, overrides, variant).variants
    if variant is None and "" not in variants:
        raise UserError(f"{path}: has the variants {', '.join(variants)}; choose one")
    return variants[variant or ""]


def parse_config(tree: Mapping[str, Tree], source: str = "config", overrides: Sequence[str] = ()) -> ConfigFile:
    """Check a config given as nested maps.

    Parameters
    ----------
    tree : mapping
        What the YAML file would hold.
    source : str
        The tree's name in error messages; also the config's name unless the tree has one.
    overrides : sequence of str
        As in `load_config`.

    Returns
    -------
    ConfigFile
        As `load_config`.

    Raises
    ------
    UserError
        If a setting is wrong.
    """
    return resolve(Document(tree, {}, source), source, overrides)


def dump_config(config: Config) -> str:
    """Write a config as YAML 1.2, every default filled in; reading it gives an equal config."""
    yaml = YAML()
    yaml.width = 2**31
    text = StringIO()
    yaml.dump(_plain(config), text)
    return text.getvalue()


def config_schema() -> dict[str, Any]:
    """Return the JSON schema of config files, for editors that complete and check keys while typing."""
    schema = schema_adapter().json_schema()
    schema["properties"]["variants"] = {"type": "object", "additionalProperties": {"type": ["object", "null"]}}
    # A file may leave required sections to its variants, but not a required key of a list's entry.
    del schema["required"]
    for section in (Conv, Dense):
        schema["$defs"][section.__name__]["required"].append("type")
    return schema


def _plain(value: Any) -> Tree:
    """Return dataclasses as maps that YAML can write, leaving out what is None."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    # Line breaks and control characters survive only between double quotes.
    return DoubleQuotedScalarString(value) if isinstance(value, str) and not value.isprintable() else value

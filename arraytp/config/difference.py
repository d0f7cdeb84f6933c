"""Whether two configs belong to one run: the keys that may change on resuming, and the first difference elsewhere."""

from dataclasses import asdict
from typing import Any

from arraytp.config.describe import flow
from arraytp.config.document import parse_text
from arraytp.config.resolve import resolve
from arraytp.config.schema import Config

FREE_ON_RESUME = ("train.epochs", "train.steps", "train.checkpoint_minutes", "cuda_graphs", "device")
"""A resumed run may be prolonged; no number depends on how often it saves, its device or CUDA graphs."""
FREE_IN_A_STUDY = tuple(key for key in FREE_ON_RESUME if key not in ("train.epochs", "train.steps"))
"""Finished seeds of a study are not prolonged, so that all seeds have the same length."""


def first_difference(stored: Config, asked: Config, free: tuple[str, ...] = FREE_ON_RESUME) -> str:
    """Name the first key not in `free` in which two configs differ, and both values; "" if there is none."""
    return _first(asdict(stored), asdict(asked), "", free)


def _first(stored: Any, asked: Any, path: str, free: tuple[str, ...]) -> str:
    if stored == asked or path[1:] in free:
        return ""
    if isinstance(stored, list | tuple) and isinstance(asked, list | tuple):
        stored, asked = dict(enumerate(stored)), dict(enumerate(asked))
    if not (isinstance(stored, dict) and isinstance(asked, dict)):
        return f"{path[1:]} is {flow(stored, quoted=False)} there and {flow(asked, quoted=False)} here"
    keys = list({**stored, **asked})
    return next((text for key in keys if (text := _first(stored.get(key), asked.get(key), f"{path}.{key}", free))), "")


def config_of(text: str, source: str) -> Config:
    """Return the config that `dump_config` has written as text; error messages name `source`."""
    return resolve(parse_text(text, source, lambda _: source), "config", ()).variants[""]

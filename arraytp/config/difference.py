"""Whether two configs are of one run: what may change when a run goes on, and the first key that must not."""

from dataclasses import asdict
from typing import Any

from arraytp.config.describe import flow
from arraytp.config.document import parse_text
from arraytp.config.resolve import resolve
from arraytp.config.schema import Config

FREE_ON_RESUME = ("train.epochs", "train.steps", "train.checkpoint_minutes")
"""A run may be prolonged, and save more often or less."""


def first_difference(stored: Config, wanted: Config, free: tuple[str, ...] = FREE_ON_RESUME) -> str:
    """Say in which key that is not `free` two configs differ first, and both values; "" if in none."""
    return _first(asdict(stored), asdict(wanted), "", free)


def _first(there: Any, here: Any, path: str, free: tuple[str, ...]) -> str:
    if there == here or path[1:] in free:
        return ""
    if isinstance(there, list | tuple) and isinstance(here, list | tuple):
        there, here = dict(enumerate(there)), dict(enumerate(here))
    if not (isinstance(there, dict) and isinstance(here, dict)):
        return f"{path[1:]} is {flow(there, quoted=False)} there and {flow(here, quoted=False)} here"
    keys = list({**there, **here})
    return next((text for key in keys if (text := _first(there.get(key), here.get(key), f"{path}.{key}", free))), "")


def config_of(text: str, source: str) -> Config:
    """Return the config that `dump_config` has written as text.

    Raises
    ------
    UserError
        This version of arraytp does not know such a config; names `source`.
    """
    return resolve(parse_text(text, source, lambda _: source), "config", ()).variants[""]

"""`dataset.json`: the description of a data set in its folder. Reading it checks every claim."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from annotated_types import Ge, Gt, Len, MinLen
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from arraytp.disk import refuse_special
from arraytp.errors import UserError

FILE_NAME = "dataset.json"
FORMAT = "arraytp-dataset"
VERSION = 1

# A shard's name has five digits.
MAX_SHARDS = 100_000
Count = Annotated[int, Gt(0)]
Fraction = Annotated[float, Ge(0)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
SplitName = Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ShardEntry(_Model):
    """One shard file: its number of images, its size in bytes, and the SHA-256 of its range checksums."""

    file: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*-[0-9]{5}\.h5$")]
    count: Count
    bytes: Count
    checksum: Sha256


class SplitEntry(_Model):
    """One split: its number of images, and its shards in row order."""

    count: Count
    shards: Annotated[list[ShardEntry], MinLen(1)]

    @model_validator(mode="after")
    def _counts_add_up(self) -> Self:
        total = sum(shard.count for shard in self.shards)
        if total != self.count:
            raise ValueError(f"count is {self.count}, but its shards hold {total} images")
        return self


class Manifest(_Model):
    """The content of `dataset.json`, without its own checksum.

    `shape` is (H, W, C); `mean` and `std` are per channel over the train split, pixels in [0, 1]; `source` says how the
    data set was made.
    """

    format: Literal["arraytp-dataset"] = "arraytp-dataset"
    version: Literal[1] = 1
    name: Annotated[str, MinLen(1)]
    shape: Annotated[list[Count], Len(3, 3)]
    classes: Annotated[list[str], MinLen(1)]
    mean: list[Fraction]
    std: list[Fraction]
    splits: Annotated[dict[SplitName, SplitEntry], MinLen(1)]
    source: dict[str, Any] = {}

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        channels = self.shape[2]
        for key, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != channels:
                raise ValueError(f"{key} has {len(values)} values for {channels} channels")
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("a class is named twice")
        files = [shard.file for split in self.splits.values() for shard in split.shards]
        if len(set(files)) != len(files):
            raise ValueError("a shard is listed twice")
        return self


def _checksum(document: dict[str, Any]) -> str:
    """SHA-256 of the document without its `checksum`: JSON, keys sorted, no blanks, ASCII only."""
    body = {key: value for key, value in document.items() if key != "checksum"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def manifest_text(manifest: Manifest) -> str:
    """Return the text of `dataset.json`, which depends on the manifest alone."""
    document = manifest.model_dump(mode="json")
    return json.dumps(document | {"checksum": _checksum(document)}, indent=2, ensure_ascii=True) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read and check `dataset.json` of a folder; UserError if it is missing, of another version, damaged or invalid."""
    path = folder / FILE_NAME
    document = _read_document(path)
    if document.get("format") != FORMAT:
        raise UserError(f"{path}: format is {document.get('format')!r}, expected {FORMAT!r}")
    if document.get("version") != VERSION:
        raise UserError(f"{path}: version {document.get('version')!r} is unknown, this arraytp reads version {VERSION}")
    if document.get("checksum") != _checksum(document):
        raise UserError(f"{path}: its content does not match its own checksum; pack the data set again")
    try:
        return Manifest.model_validate({key: value for key, value in document.items() if key != "checksum"})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: {where + ': ' if where else ''}{first['msg']}") from error


def _read_document(path: Path) -> dict[str, Any]:
    refuse_special(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; a data set is a folder that `arraytp data pack` has finished") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); pack the data set again") from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: holds a {type(document).__name__}, expected a JSON object")
    return document

"""`arraytp data`: pack official files into shards, verify them, describe them."""

import json
import re
import signal
import sys
from pathlib import Path
from typing import Any, get_args

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from arraytp.commands.shared_options import check_folder
from arraytp.data.dataset import Dataset, embedded_names, find_dataset, open_dataset
from arraytp.data.writer import SKIPPED_NAME
from arraytp.data_prep import cifar, folder, idx, imagenet, imagenet32
from arraytp.data_prep.fetch import SOURCES
from arraytp.data_prep.fetch import fetch as fetch_files
from arraytp.data_prep.options import Exif, PackOptions, Resize
from arraytp.errors import Interrupted, UserError

_FOLDER = click.Path(path_type=Path)
_DATASET_HELP = (
    f"""DATASET is a folder, or the name of a data set that comes with arraytp ({", ".join(embedded_names())})."""
)

_SHOWN_CLASSES = 20
_DECODING = ("folder", "imagenet")
_SOURCES = (*idx.CLASSES, *cifar.LAYOUTS, "imagenet", "imagenet32", "folder")


@click.group()
def command() -> None:
    """Fetch official data files, pack them into shards, verify and describe data sets."""


def _parse_limits(_context: click.Context, _parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, int]:
    limits: dict[str, int] = {}
    for value in values:
        split, _, count = value.partition("=")
        if not split or not re.fullmatch("0*[1-9][0-9]{0,17}", count):
            raise click.BadParameter(f"{value!r} is not like train=10000 or test=2000")
        if split in limits:
            raise click.BadParameter(f"{value!r} after {split}={limits[split]}: one limit for each split")
        limits[split] = int(count)
    return limits


def _parse_name(_context: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and not (value.strip() and value.isprintable()):
        raise click.BadParameter(f"{value!r} is not a name of printable characters")
    return value


def _parse_size(_context: click.Context, _parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    height, _, width = value.partition("x")
    sides = [int(side) for side in (height, width or height) if re.fullmatch("[1-9][0-9]{0,3}", side)]
    if len(sides) != 2 or value.endswith("x"):
        raise click.BadParameter(f"{value!r} is not like 224 or 180x240 (height x width, up to 9999 pixels)")
    return sides[0], sides[1]


@command.command()
@click.argument("source", metavar="SOURCE", type=click.Choice(_SOURCES))
@click.argument("src", metavar="SRC", type=click.Path(), callback=check_folder)
@click.argument("dst", metavar="DST", type=click.Path(), callback=check_folder)
@click.option("--name", callback=_parse_name, help="The data set's name.  [default: SOURCE; of a folder, its own]")
@click.option(
    "--limit",
    "limits",
    multiple=True,
    callback=_parse_limits,
    metavar="SPLIT=N",
    help="Take the first N images of a split, evenly by class; repeatable.",
)
@click.option("--compression", type=click.Choice(["none", "gzip"]), default="none", show_default=True)
@click.option("--shard-images", type=click.IntRange(min=1), help="Images per shard.  [default: 64 MiB of pixels]")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**63 - 1),
    default=0,
    show_default=True,
    help="Seed of the order of the train images.",
)
@click.option(
    "--size",
    callback=_parse_size,
    metavar="N|HxW",
    help="Resize image files to N x N or H x W pixels.  [default: 224 for imagenet, their own size for folder]",
)
@click.option(
    "--resize",
    type=click.Choice(get_args(Resize)),
    default="stretch",
    show_default=True,
    help="Stretch images to the new size, or scale the shorter side and crop the longer one.",
)
@click.option(
    "--exif",
    type=click.Choice(get_args(Exif)),
    help="Apply the EXIF orientation of images, or ignore it.  [default: ignore for imagenet, apply for folder]",
)
@click.option(
    "--max-skipped",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Skip up to this many broken image files and list them in skipped.csv.",
)
@click.option(
    "--devkit",
    type=_FOLDER,
    help="Devkit (folder or archive), for imagenet with a flat val/ and for imagenet32.  [default: in SRC]",
)
@click.pass_context
def pack(context: click.Context, /, source: str, src: Path, dst: Path, devkit: Path | None, **options: Any) -> None:
    """Pack SRC, the official files of SOURCE, into a data set in the new or empty folder DST.

    \b
    mnist, fashion-mnist, kmnist  folder with the four IDX files, gzipped or not
    cifar10, cifar100             archive or folder, python or binary version
    imagenet                      folder with the official archives, or folder
                                  or tar archive with train/WNID/ and val/
    imagenet32                    folder: train_data_batch_1 to _10, val_data
    folder                        folder or tar archive of SPLIT/CLASS/ with
                                  images (jpg, jpeg, png, webp)
    """  # noqa: D301 - the backspace character tells click not to rewrap these lines
    _refuse_foreign_options(context, source)
    given = PackOptions(**options | {"compression": options["compression"] == "gzip"})
    try:
        skipped = _pack(source, src, dst, devkit, given)
    except (Interrupted, KeyboardInterrupt) as error:
        number = error.signal_number if isinstance(error, Interrupted) else int(signal.SIGINT)
        raise Interrupted(f"{dst}: interrupted; the same pack goes on where it stopped", number) from error
    packed = open_dataset(dst)
    _describe(packed)
    if source in _DECODING and list(packed.classes) != sorted(packed.classes):
        click.echo("arraytp: note: the classes are numbers; labels follow the numbers, not the text", err=True)
    if skipped:
        click.echo(f"skipped  {skipped:,} broken file{'s' * (skipped > 1)}, listed in {dst / SKIPPED_NAME}")


def _refuse_foreign_options(context: click.Context, source: str) -> None:
    allowed = {
        "size": _DECODING,
        "resize": _DECODING,
        "exif": _DECODING,
        "max_skipped": _DECODING,
        "devkit": ("imagenet", "imagenet32"),
    }
    for name, sources in allowed.items():
        given = context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
        if given and source not in sources:
            raise click.UsageError(f"--{name.replace('_', '-')} is for {' and '.join(sources)}, not for {source}")
    resize = context.get_parameter_source("resize") is not click.core.ParameterSource.DEFAULT
    if resize and source == "folder" and context.params["size"] is None:
        raise click.UsageError("--resize says how images get the size of --size; give that, too")


def _pack(source: str, src: Path, dst: Path, devkit: Path | None, options: PackOptions) -> int:
    """Run the source's packer; return how many broken files it skipped."""
    if source == "folder":
        return folder.pack(src, dst, options)
    if source == "imagenet":
        return imagenet.pack(src, dst, options, devkit)
    if source == "imagenet32":
        imagenet32.pack(src, dst, options, devkit)
    elif source in cifar.LAYOUTS:
        cifar.pack(source, src, dst, options)
    else:
        idx.pack(source, src, dst, options)
    return 0


@command.command()
@click.argument("name", metavar="NAME", type=click.Choice(list(SOURCES)))
@click.argument("dst", metavar="DST", type=click.Path(), callback=check_folder)
def fetch(name: str, dst: Path) -> None:
    """Fetch the official files of a data set into the folder DST, except those that are there already.

    NAME is mnist, fashion-mnist, kmnist, cifar10 or cifar100.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as display:
        tasks: dict[str, TaskID] = {}

        def progress(file: str, done: int, total: int | None) -> None:
            if file not in tasks:
                tasks[file] = display.add_task(file, total=None)
            display.update(tasks[file], completed=done, total=total)

        fetch_files(SOURCES[name], dst, progress)
    for file in SOURCES[name].files:
        click.echo(f"{file:8} {(dst / file).stat().st_size:,} bytes")
    archive = dst / next(iter(SOURCES[name].files)) if len(SOURCES[name].files) == 1 else dst
    click.echo(f"arraytp data pack {name} {archive} DST")


@command.command(epilog=_DATASET_HELP)
@click.argument("dataset")
def check(dataset: str) -> None:
    """Read all images and labels of a data set and list all damage, one line each; exit status 2 if there is any."""
    opened = find_dataset(dataset)
    problems = list(opened.problems())
    for problem in problems:
        click.echo(problem)
    if problems:
        raise UserError(f"{opened.folder}: {len(problems)} problem{'s' * (len(problems) > 1)} found; pack it again")
    images = ", ".join(f"{count:,} {split}" for split, count in opened.counts.items())
    click.echo(f"{opened.name}: {images} images verified, no damage")


@command.command(epilog=_DATASET_HELP)
@click.argument("dataset")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the content of dataset.json except its checksum, for programs."
)
def info(dataset: str, as_json: bool) -> None:
    """Describe a data set."""
    opened = open_dataset(dataset)
    if as_json:
        click.echo(json.dumps(opened.manifest.model_dump(mode="json"), indent=2))
    else:
        _describe(opened)


def _describe(dataset: Dataset) -> None:
    height, width, channels = dataset.shape
    shown = dataset.classes if len(dataset.classes) <= _SHOWN_CLASSES else (*dataset.classes[: _SHOWN_CLASSES - 1], "…")
    lines = [
        ("name", dataset.name),
        ("folder", str(dataset.folder)),
        ("images", f"{height} x {width} pixels, {channels} channel{'s' * (channels > 1)}"),
        ("classes", f"{len(dataset.classes)}: {', '.join(shown)}"),
        ("mean", ", ".join(f"{value:.6f}" for value in dataset.mean)),
        ("std", ", ".join(f"{value:.6f}" for value in dataset.std)),
    ]
    for split, entry in dataset.manifest.splits.items():
        size = sum(shard.bytes for shard in entry.shards) / 1e6
        count = len(entry.shards)
        lines.append((split, f"{entry.count:,} images in {count} shard{'s' * (count > 1)}, {size:.1f} MB"))
    for key, text in lines:
        click.echo(f"{key:8} {text}")

"""`arraytp trace`: write every number of one training step of a config to a file."""

import warnings
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import click

from arraytp.commands.shared_options import VARIANT, overriding, settings
from arraytp.config import load_one
from arraytp.errors import NonFiniteError, UserError
from arraytp.signals import StopRequest
from arraytp.training.build import build_planned
from arraytp.training.plan import plan_variant
from arraytp.training.trace import check_replaceable, read_batch, read_weights, write_trace


@click.command(short_help="Write every number of one training step to a file.")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--out", required=True, metavar="FILE.h5", type=click.Path(path_type=Path), help="File to write.")
@VARIANT
@click.option(
    "--weights",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Start from the weights of a trace or a checkpoint.",
)
@click.option("--batch", metavar="FILE", type=click.Path(path_type=Path), help="Use the batch of a trace.")
@click.option("--no-noise", is_flag=True, help="Do not write noise, only its keys, from which it can be drawn again.")
@overriding
def command(
    config: Path,
    out: Path,
    variant: str | None,
    weights: Path | None,
    batch: Path | None,
    no_noise: bool,
    backend: str | None,
    dtype: str | None,
    overrides: tuple[str, ...],
) -> None:
    """Do the first training step of CONFIG and write every number of it to an HDF5 file.

    The file holds inputs, weights, noise, activations, targets, updates, BP's gradients and the weights afterwards;
    docs/trace.md describes its layout.
    """
    check_replaceable(out)
    loaded = load_one(config, settings(overrides, backend, dtype), variant)
    # A trace holds arrays of the whole batch, which exact mode would cut into parts.
    whole = replace(loaded, train=replace(loaded.train, exact=False))
    experiment = build_planned(plan_variant(config, variant or "", whole))
    for note in experiment.plan.notes:
        click.echo(f"arraytp: note: {note}", err=True)
    if weights is not None:
        read_weights(weights, experiment)
    with closing(experiment.train_loader.batches(0)) as batches:
        images, labels = next(batches) if batch is None else read_batch(batch, experiment)
    with StopRequest() as stop, warnings.catch_warnings():
        # The first array that is not finite is reported below.
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            not_finite = write_trace(out, experiment, images, labels, noise=not no_noise, stop=stop)
        except MemoryError as error:
            words = experiment.plan.backend.memory_words(error, experiment.config.train.batch_size)
            raise UserError(f"{config}: {words}") from error
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written: {error.strerror or error}") from error
    if not_finite:
        raise NonFiniteError(f"{out}: {not_finite} is the first array with NaN or infinity in it; the file is complete")
    click.echo(f"trace: {out}, {out.stat().st_size / 1e6:.1f} MB")

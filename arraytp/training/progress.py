"""The display of a training run: a live line on a terminal or in a notebook, plain lines elsewhere, nothing when quiet.

Everything goes to standard error, so that standard output holds results only.
"""

import io
import math
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Self, TextIO, cast

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_REFRESH_SECONDS = 0.125
_PLAIN_SECONDS = 10.0
_FORECAST_STEPS, _FORECAST_SECONDS = 10, 60.0
_SHORTEST_BAR, _LONGEST_BAR = 8, 32


@dataclass
class Meter:
    """Where a run stands and how fast it goes.

    `epochs`, `steps_per_epoch` and `total_steps` refer to the whole run; the last epoch may have fewer steps than the
    others. `epoch` counts finished epochs, `step` the steps of the current one. `images`, `steps`, `tests` and the
    seconds they took refer to this process only. Feedback is trained alone for `feedback_epochs` between two epochs;
    `feedback_due` counts its steps that are still due before the current epoch. `loss` and `top1` (in percent) are
    means over the `measured_images` of the current epoch; `test_top1` is that of the last finished epoch, on `split`.
    All three are NaN until they are known.
    """

    name: str
    epochs: int
    steps_per_epoch: int
    total_steps: int
    epoch: int = 0
    step: int = 0
    images: int = 0
    steps: int = 0
    seconds: float = 0.0
    tests: int = 0
    test_seconds: float = 0.0
    feedback_epochs: int = 0
    feedback_due: int = 0
    feedback_steps: int = 0
    feedback_seconds: float = 0.0
    loss: float = math.nan
    top1: float = math.nan
    measured_images: int = 0
    split: str = "test"
    test_top1: float = math.nan

    def measure(self, images: int, loss: float, top1: float) -> None:
        """Include the mean loss and the accuracy of `images` more images in the current epoch's means."""
        self.measured_images += images
        share = images / self.measured_images
        self.loss = loss if share == 1 else self.loss + share * (loss - self.loss)
        self.top1 = top1 if share == 1 else self.top1 + share * (top1 - self.top1)

    def images_per_second(self) -> float:
        """Return the training speed in this process, without evaluation; NaN before the first step."""
        return self.images / self.seconds if self.seconds > 0 else math.nan

    def steps_done(self) -> int:
        """Return the steps trained in the whole run."""
        return self.epoch * self.steps_per_epoch + self.step

    def steps_of_epoch(self) -> int:
        """Return how many steps the current epoch has."""
        return min(self.steps_per_epoch, self.total_steps - self.epoch * self.steps_per_epoch)

    def steps_left(self) -> int:
        """Return the number of steps left in the run."""
        return max(self.total_steps - self.steps_done(), 0)

    def feedback_steps_left(self) -> int:
        """Return the number of steps of feedback training alone that are left in the run."""
        return self.feedback_due + self.feedback_epochs * self.steps_per_epoch * max(self.epochs - self.epoch - 1, 0)

    def per_step(self) -> tuple[float, float]:
        """Return the seconds per training step and per step of feedback alone.

        Until there is a step of feedback alone, it is assumed to take as long as a training step. NaN if unknown.
        """
        step = self.seconds / self.steps if self.steps else math.nan
        return step, self.feedback_seconds / self.feedback_steps if self.feedback_steps else step

    def training_left(self) -> float:
        """Return the seconds left in the run, without evaluations; NaN before the first step."""
        step, feedback = self.per_step()
        return self.steps_left() * step + self.feedback_steps_left() * feedback

    def seconds_left(self) -> float:
        """Return the seconds left in the run, including evaluations; NaN before the first step."""
        per_test = self.test_seconds / self.tests if self.tests else 0.0
        return self.training_left() + max(self.epochs - self.epoch, 0) * per_test


class Progress:
    """The display of one training run; use it as a context manager.

    `epochs`, `steps_per_epoch` and `steps` refer to the whole run, of which `steps_done` were done before this
    process; `test_top1` is the accuracy of its last finished epoch. Feedback is trained alone for `feedback_epochs`
    between two epochs. `split` names the split that epochs are tested on. The display writes to `stream`, by default
    standard error, and `clock` returns seconds from an arbitrary origin.
    """

    def __init__(
        self,
        name: str,
        epochs: int,
        steps_per_epoch: int,
        *,
        steps: int | None = None,
        steps_done: int = 0,
        test_top1: float = math.nan,
        feedback_epochs: int = 0,
        split: str = "test",
        quiet: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        epoch, step = divmod(steps_done, max(steps_per_epoch, 1))
        total = epochs * steps_per_epoch if steps is None else steps
        self.meter = Meter(
            name, epochs, steps_per_epoch, total, epoch=epoch, step=step, test_top1=test_top1, split=split
        )
        self.meter.feedback_epochs = feedback_epochs
        self._clock = clock
        self._quiet = quiet
        self._console = Console(file=cast(TextIO, _Reader(stream or sys.stderr or io.StringIO())), highlight=False)
        terminal = self._console.is_interactive and self._console.file.isatty()
        # rich needs this package to draw in a notebook; without it, a warning would take the place of the line.
        notebook = self._console.is_jupyter and find_spec("ipywidgets") is not None
        self._live = (
            Live(_Line(self.meter), console=self._console, auto_refresh=False, redirect_stdout=False)
            if (terminal or notebook) and not quiet
            else None
        )
        self._wait = _REFRESH_SECONDS if self._live else math.inf if quiet else _PLAIN_SECONDS
        self._last = self._shown = clock()

    def __enter__(self) -> Self:
        """Open the display and start the clock."""
        self._last = self._shown = self._clock()
        if self._live:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        """Close the display; the live line stays as it last was."""
        if self._live:
            self._live.refresh()
            self._live.stop()

    def step(self, images: int, *, steps: int = 1, loss: float | None = None, top1: float | None = None) -> None:
        """Count the images and steps since the last call; cheap enough for every step.

        `loss` and `top1` are means over these images. Where reading them from a device would hold it up, call this
        once for several steps.
        """
        meter, now = self.meter, self._clock()
        meter.seconds += now - self._last
        self._last = now
        meter.images += images
        meter.steps += steps
        meter.step += steps
        if loss is not None and top1 is not None:
            meter.measure(images, loss, top1)
        if meter.steps >= _FORECAST_STEPS > meter.steps - steps and meter.seconds_left() > _FORECAST_SECONDS:
            self.say(forecast(meter))
        epoch_is_full = self._live is not None and meter.step >= meter.steps_of_epoch()
        if now - self._shown >= self._wait or epoch_is_full:
            self._shown = now
            self._show(_running(meter))

    def epoch(self, row: Mapping[str, float]) -> None:
        """Close an epoch after its evaluation, which took the time since the last step; `row` is as in metrics.csv."""
        meter, now = self.meter, self._clock()
        meter.tests += 1
        meter.test_seconds += now - self._last
        meter.epoch, meter.step = int(row["epoch"]), 0
        meter.loss, meter.top1, meter.test_top1 = row["train_loss"], row["train_top1"], row["test_top1"]
        meter.measured_images = 0
        if 0 < meter.epoch < meter.epochs:
            meter.feedback_due = meter.feedback_epochs * meter.steps_per_epoch
        self._show(_finished(meter, row))
        self._last = self._shown = self._clock()

    def feedback(self, epoch: int, epochs: int, step: int) -> None:
        """Count a step of feedback training alone; its time does not count as training."""
        meter, now = self.meter, self._clock()
        meter.feedback_steps += 1
        meter.feedback_seconds += now - self._last
        meter.feedback_due = (epochs - epoch + 1) * meter.steps_per_epoch - step
        self._last = now
        if now - self._shown >= self._wait:
            self._shown = now
            where = [f"{meter.name}  feedback alone, epoch {epoch}/{epochs}", f"step {step}/{meter.steps_per_epoch}"]
            self._show(where + _time(meter))

    def say(self, message: str) -> None:
        """Write one line, above the live line where there is one."""
        if not self._quiet:
            self._console.print(Text(message), soft_wrap=True)

    def _show(self, pieces: list[str]) -> None:
        if self._live:
            self._live.refresh()
        else:
            self.say("  ".join(pieces))


class _Reader:
    """A stream whose reader may disappear: its output is then dropped, and the training goes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        with suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


class _Line:
    """The live line: spare width shows a progress bar; a narrow terminal drops texts, the least important first."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        meter, width = self.meter, options.max_width
        head, *rest = _running(meter)
        for unwanted in ("step ", "top-1 ", "loss "):
            if len("  ".join([head, *rest])) > width:
                rest = [piece for piece in rest if not piece.startswith(unwanted)]
        room = width - len("  ".join([head, *rest])) - 2
        if room < _SHORTEST_BAR:
            yield Text("  ".join([head, *rest]), no_wrap=True, overflow="ellipsis")
            return
        total = max(meter.total_steps, 1)
        done = meter.steps_done() if meter.epochs else total
        line = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=total, completed=done, width=min(room - room % 4, _LONGEST_BAR))
        line.add_row(Text(head, no_wrap=True), bar, Text("  ".join(rest), no_wrap=True))
        yield line


def _running(meter: Meter) -> list[str]:
    """Return the pieces of the line within an epoch; until the first step, they describe the last finished epoch."""
    epoch = min(meter.epoch + 1, meter.epochs) if meter.steps else meter.epoch
    pieces = [f"{meter.name}  epoch {epoch}/{meter.epochs}"]
    if meter.step:
        steps = meter.steps_of_epoch()
        pieces.append("testing" if meter.step >= steps else f"step {meter.step}/{steps}")
    pieces += _number("{:,.0f} images/s", meter.images_per_second())
    pieces += _loss("loss", meter.loss) + _number("top-1 {:.1f} %", meter.top1)
    return pieces + _number(meter.split + " {:.1f} %", meter.test_top1) + _time(meter)


def _finished(meter: Meter, row: Mapping[str, float]) -> list[str]:
    """Return the pieces of the plain line that closes an epoch."""
    pieces = [f"{meter.name}  epoch {meter.epoch}/{meter.epochs}"]
    pieces += _loss("train loss", row["train_loss"]) + _number("top-1 {:.1f} %", row["train_top1"])
    pieces += _loss(f"{meter.split} loss", row["test_loss"]) + _number("top-1 {:.1f} %", row["test_top1"])
    return pieces + _number("{:,.0f} images/s", meter.images_per_second()) + _time(meter)


def forecast(meter: Meter) -> str:
    """Return a line that estimates the time left in the run, without evaluation, from the steps so far."""
    step, feedback = meter.per_step()
    what = f"{meter.steps_left():,} more steps × {step:.3g} s"
    if left := meter.feedback_steps_left():
        what += f" and {left:,} of feedback alone × {feedback:.3g} s"
    return f"{meter.name}  {what}: about {duration(meter.training_left())} without evaluation"


def _number(template: str, value: float) -> list[str]:
    return [] if math.isnan(value) else [template.format(value)]


def _loss(name: str, value: float) -> list[str]:
    return _number(name + (" {:.3f}" if 0.01 <= abs(value) < 1e5 else " {:.2e}"), value)


def _time(meter: Meter) -> list[str]:
    if meter.epoch >= meter.epochs:
        return [f"took {duration(meter.seconds + meter.feedback_seconds + meter.test_seconds)}"]
    seconds = meter.seconds_left()
    return [] if math.isnan(seconds) else [f"ETA {duration(seconds)}"]


def duration(seconds: float) -> str:
    """Return a time span as m:ss, h:mm:ss or, from a day on, "2 d 03:04"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"

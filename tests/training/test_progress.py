import io
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arraytp.training.progress import Progress, duration

ROW0 = {"epoch": 0, "train_loss": math.nan, "train_top1": math.nan, "test_loss": 2.3, "test_top1": 10.0}
ROW1 = {"epoch": 1, "train_loss": 1.25, "train_top1": 55.0, "test_loss": 0.9, "test_top1": 65.0}
ROW2 = {"epoch": 2, "train_loss": 1.0, "train_top1": 65.0, "test_loss": 0.8, "test_top1": 70.0}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> Clock:
    return Clock()


def plain_run(clock: Clock, **settings: object) -> str:
    """Return what is shown for two epochs of two steps, at 1 s per step and 3 s per evaluation."""
    stream = settings.pop("stream", None) or io.StringIO()
    with Progress("fa", 2, 2, stream=stream, clock=clock, **settings) as progress:  # type: ignore[arg-type]
        clock.now += 3
        progress.epoch(ROW0)
        for row in (ROW1, ROW2):
            for _ in range(2):
                clock.now += 1
                progress.step(100, loss=1.5, top1=50.0)
            clock.now += 3
            progress.epoch(row)
    stream.seek(0)
    return stream.read()


def test_elsewhere_than_on_a_terminal_every_epoch_is_one_plain_line(clock: Clock) -> None:
    assert plain_run(clock) == (
        "fa  epoch 0/2  test loss 2.300  top-1 10.0 %\n"
        "fa  epoch 1/2  train loss 1.250  top-1 55.0 %  test loss 0.900  top-1 65.0 %  100 images/s  ETA 0:05\n"
        "fa  epoch 2/2  train loss 1.000  top-1 65.0 %  test loss 0.800  top-1 70.0 %  100 images/s  took 0:13\n"
    )


def test_a_log_file_and_a_dumb_terminal_get_the_same_lines(clock: Clock, tmp_path: Path, monkeypatch) -> None:
    lines = plain_run(clock)
    monkeypatch.setenv("TERM", "dumb")
    assert plain_run(Clock(), stream=Terminal()) == lines
    with (tmp_path / "run.log").open("w+", encoding="utf-8") as log:
        assert plain_run(Clock(), stream=log) == lines


@pytest.mark.parametrize("no_color", ["", "1"])
def test_no_color_turns_colours_off(clock: Clock, monkeypatch: pytest.MonkeyPatch, no_color: str) -> None:
    """NO_COLOR counts only if it is not empty (no-color.org)."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", no_color)
    colours = re.findall(r"\x1b\[[0-9;]*m", plain_run(clock, stream=Terminal()))
    assert bool(colours) != bool(no_color)


def test_quiet_writes_nothing(clock: Clock) -> None:
    assert plain_run(clock, quiet=True) == ""


def test_plain_lines_inside_an_epoch_come_at_most_every_ten_seconds(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress("fa", 1, 100, stream=stream, clock=clock) as progress:
        for _ in range(25):
            clock.now += 1
            progress.step(8, loss=1.0, top1=50.0)
    forecast, *lines = stream.getvalue().splitlines()
    assert forecast == "fa  90 more steps × 1 s: about 1:30 without evaluation"
    assert [re.search(r"step (\d+)/100", line)[1] for line in lines] == ["10", "20"]
    assert lines[0] == "fa  epoch 1/1  step 10/100  8 images/s  loss 1.000  top-1 50.0 %  ETA 1:30"


def test_a_resumed_run_counts_from_its_position_but_times_this_process_only(clock: Clock) -> None:
    progress = Progress("fa", 4, 10, steps_done=23, test_top1=61.0, stream=io.StringIO(), clock=clock)
    clock.now += 1000
    with progress:
        clock.now += 2
        progress.step(64)
    meter = progress.meter
    assert (meter.epoch, meter.step, meter.test_top1) == (2, 4, 61.0)
    assert meter.images_per_second() == 32.0
    assert meter.seconds_left() == 2 * (40 - 24)


def test_a_run_that_ends_within_an_epoch_counts_to_its_last_step(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress("fa", 2, 100, steps=130, steps_done=110, stream=stream, clock=clock)
    with progress:
        clock.now += 10
        progress.step(8, steps=10)
        assert progress.meter.seconds_left() == 10
        clock.now += 10
        progress.step(8, steps=10)
    lines = [line.split("  ")[2] for line in stream.getvalue().splitlines()]
    assert lines == ["step 20/30", "testing"]


def test_evaluation_counts_in_the_time_left_and_not_in_the_speed(clock: Clock) -> None:
    progress = Progress("fa", 3, 2, stream=io.StringIO(), clock=clock)
    with progress:
        for _ in range(2):
            clock.now += 1
            progress.step(10)
        clock.now += 7
        progress.epoch(ROW1)
    assert progress.meter.images_per_second() == 10.0
    assert progress.meter.seconds_left() == 2 * (2 + 7)


def test_feedback_that_is_trained_alone_counts_in_the_time_left_and_not_in_the_speed(clock: Clock) -> None:
    """A step of feedback alone takes 12 s and a training step 1 s; there are 2 steps of each per epoch."""
    stream = io.StringIO()
    progress = Progress("drl", 3, 2, feedback_epochs=1, stream=stream, clock=clock)
    left = []

    def feedback(step: int) -> None:
        clock.now += 12
        progress.feedback(1, 1, step)
        left.append(progress.meter.seconds_left())

    with progress:
        feedback(1)
        feedback(2)
        for epoch in range(3):
            if epoch:
                feedback(1)
                feedback(2)
            for _ in range(2):
                clock.now += 1
                progress.step(10)
                left.append(progress.meter.seconds_left())
            progress.epoch(ROW1 | {"epoch": epoch + 1})
    assert [*map(math.isnan, left[:2])] == [True, True]
    assert left[2:] == [53, 52, 40, 28, 27, 26, 14, 2, 1, 0]
    assert progress.meter.images_per_second() == 10.0
    assert stream.getvalue().splitlines()[-1].endswith("took 1:18")
    assert "drl  feedback alone, epoch 1/1  step 2/2  ETA 0:02" in stream.getvalue()


def test_until_it_is_timed_a_step_of_feedback_alone_is_taken_for_one_of_training(clock: Clock) -> None:
    """This is so if a run is resumed in the middle of an epoch."""
    stream = io.StringIO()
    progress = Progress("drl", 2, 20, feedback_epochs=1, steps_done=9, stream=stream, clock=clock)
    with progress:
        clock.now += 40
        progress.step(80, steps=10)
    forecast, line = stream.getvalue().splitlines()
    assert forecast == "drl  21 more steps × 4 s and 20 of feedback alone × 4 s: about 2:44 without evaluation"
    assert line.endswith("ETA 2:44")


@given(st.lists(st.tuples(st.integers(1, 500), st.floats(0, 10), st.floats(0, 100)), min_size=1, max_size=20))
def test_the_running_loss_is_the_mean_over_the_epochs_images(intervals: list[tuple[int, float, float]]) -> None:
    progress = Progress("fa", 1, 1000, stream=io.StringIO(), quiet=True)
    for images, loss, top1 in intervals:
        progress.step(images, loss=loss, top1=top1)
    total = sum(images for images, _, _ in intervals)
    assert progress.meter.loss == pytest.approx(sum(n * loss for n, loss, _ in intervals) / total)
    assert progress.meter.top1 == pytest.approx(sum(n * top1 for n, _, top1 in intervals) / total)


def test_steps_may_be_counted_in_intervals(clock: Clock) -> None:
    progress = Progress("fa", 1, 100, stream=io.StringIO(), clock=clock)
    progress.step(640, steps=5, loss=2.0, top1=30.0)
    assert (progress.meter.step, progress.meter.images) == (5, 640)


def test_each_epoch_starts_its_means_anew(clock: Clock) -> None:
    progress = Progress("fa", 2, 1, quiet=True, clock=clock)
    progress.step(100, loss=9.0, top1=0.0)
    progress.epoch(ROW1)
    progress.step(10, loss=1.0, top1=80.0)
    assert (progress.meter.loss, progress.meter.top1, progress.meter.test_top1) == (1.0, 80.0, 65.0)


@pytest.mark.parametrize("columns", [30, 60, 80, 120, 200])
def test_the_live_line_fits_the_terminal(clock: Clock, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    with Progress("gait-prop", 2, 100, stream=stream, clock=clock, test_top1=61.0) as progress:
        for _ in range(50):
            clock.now += 0.1
            progress.step(128, loss=1.0, top1=50.0)
        progress.say("checkpoint written")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    assert max(map(len, lines)) <= columns
    assert "checkpoint written" in lines
    assert lines[-1].startswith("gait-prop  epoch 1/2")
    assert ("━" in lines[-1]) == (columns >= 120)
    assert ("step 50/100" in lines[-1]) == (columns >= 120)
    assert ("1,280 images/s" in lines[-1]) == (columns >= 60)


def test_the_live_line_is_drawn_at_most_eight_times_a_second(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with Progress("fa", 1, 10_000, stream=stream, clock=clock) as progress:
        for _ in range(1000):
            clock.now += 0.001
            progress.step(1)
    assert stream.getvalue().count("epoch") <= 8 + 3


def test_the_display_closes_when_training_fails(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with pytest.raises(ArithmeticError), Progress("fa", 1, 2, stream=stream, clock=clock):
        raise ArithmeticError
    assert "\x1b[?25h" in stream.getvalue(), "the cursor is shown again"


def test_an_empty_run_says_nothing_wrong(clock: Clock) -> None:
    stream = io.StringIO()
    with Progress("fa", 0, 0, stream=stream, clock=clock) as progress:
        clock.now += 2
        progress.epoch(ROW0)
    assert stream.getvalue() == "fa  epoch 0/0  test loss 2.300  top-1 10.0 %  took 0:02\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (3725, "1:02:05"), (86400, "1 d 00:00"), (97440, "1 d 03:04")]
)
def test_durations_read_naturally(seconds: float, text: str) -> None:
    assert duration(seconds) == text


class _Gone(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


def test_a_reader_that_is_gone_does_not_stop_the_training():
    with Progress("fa", epochs=1, steps_per_epoch=1, stream=_Gone()) as progress:
        progress.step(8, loss=1.0, top1=50.0)
        progress.epoch({"epoch": 1, "train_loss": 1.0, "train_top1": 50.0, "test_loss": 1.0, "test_top1": 50.0})
        progress.say("done")

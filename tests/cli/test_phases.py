"""Every signal that ends a job, in every phase of a command, gives an exit status and one line, and loses nothing."""

import signal

import numpy as np
import pytest
from PIL import Image

from arraytp.data.writer import DatasetWriter
from arraytp.rules import feedback
from arraytp.training.experiment import Experiment

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGXCPU]
FEEDBACK = "feedback: {iterations: 3, sigma: 0.1, optimizer: {name: sgd, lr: 0.01, momentum: 0.9}}"
LDRL = ["--set", f"rule={{name: ldrl, {FEEDBACK}}}"]
DRL = ["--set", f"rule={{name: drl, {FEEDBACK}, pretrain_epochs: 1}}"]


@pytest.fixture(params=SIGNALS, ids=[number.name for number in SIGNALS])
def number(request):
    return request.param


@pytest.fixture
def after(monkeypatch):
    """Send a signal after the nth call of a function from now on."""

    def install(owner, name, nth, number):
        function, calls = getattr(owner, name), []

        def counted(*arguments, **named):
            found = function(*arguments, **named)
            calls.append(name)
            if len(calls) == nth:
                signal.raise_signal(number)
            return found

        monkeypatch.setattr(owner, name, counted)
        return lambda: len(calls)

    return install


PHASES = {
    "evaluation before training": (Experiment, "evaluate", 1, []),
    "evaluation after an epoch": (Experiment, "evaluate", 2, []),
    "a step": (Experiment, "apply", 2, []),
    "the iterations of the first step": (feedback, "step_feedback", 2, LDRL),
    "the iterations of a later step": (feedback, "step_feedback", 9, LDRL),
    "an epoch of feedback alone": (feedback, "step_feedback", 5, DRL),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_is_stopped_in_every_phase_and_goes_on_bit_for_bit(arraytp, place, numbers, after, number, phase):
    owner, name, nth, flags = PHASES[phase]
    calls = after(owner, name, nth, number)
    outcome = arraytp("run", "toy.yml", "--quiet", *flags)
    assert outcome.status == 128 + number
    assert len(outcome.err.splitlines()) == 1
    assert "results/toy/checkpoint.h5 is written; go on with: arraytp run --resume" in outcome.err
    assert calls() >= nth
    assert arraytp("run", "toy.yml", "--quiet", *flags, "--resume").status == 0
    arraytp("run", "toy.yml", "--quiet", *flags, "--out", "whole")
    assert numbers(place / "results/toy") == numbers(place / "whole")


@pytest.mark.parametrize("long", [True, False], ids=["long", "short"])
def test_a_long_step_is_left_in_its_middle(arraytp, after, monkeypatch, long):
    """A cluster leaves a job tens of seconds, but a step may take minutes; short steps are finished."""
    if not long:
        monkeypatch.setattr("arraytp.training.long_steps.math.inf", 0.0)
    calls = after(feedback, "step_feedback", 2, signal.SIGUSR1)
    assert arraytp("run", "toy.yml", "--quiet", *LDRL).status == 128 + signal.SIGUSR1
    # Two blocks with feedback, three iterations each.
    assert calls() == (2 if long else 6)


def test_a_study_is_stopped_in_the_middle_of_a_round(arraytp, place, after, number):
    (place / "study.yml").write_text(
        (place / "toy.yml").read_text().replace("rule: {name: fa}", f"rule: {{name: ldrl, {FEEDBACK}}}")
        + "study: {seeds: 2, rounds: 3}\n"
    )
    # A seed takes 18 feedback steps, so the 20th belongs to the second seed.
    after(feedback, "step_feedback", 20, number)
    outcome = arraytp("run", "study.yml", "--quiet")
    assert outcome.status == 128 + number
    assert outcome.err.startswith("study seed 2/2: stopped; the seeds before it are done; go on with: ")
    first = place / "results/study/seed-0/summary.json"
    before = first.read_bytes()
    assert arraytp("run", "study.yml", "--quiet", "--resume").status == 0
    assert first.read_bytes() == before


def test_a_trace_is_stopped_in_the_middle_of_its_iterations(arraytp, place, after, number):
    after(feedback, "step_feedback", 2, number)
    outcome = arraytp("trace", "toy.yml", "--out", "t.h5", *LDRL)
    assert (outcome.status, len(outcome.err.splitlines())) == (128 + number, 1)
    assert not list(place.glob("t.h5*"))


def test_a_pack_is_stopped_and_goes_on(arraytp, place, after, number):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
    for n, image in enumerate(pixels):
        path = place / f"images/{'train' if n < 8 else 'test'}/a/{n:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    words = ["data", "pack", "folder", "images"]
    after(DatasetWriter, "add", 1, number)
    outcome = arraytp(*words, "packed", "--shard-images", 3)
    assert outcome.status == 128 + number
    assert outcome.err == "packed: interrupted; the same pack goes on where it stopped\n"
    assert {path.name for path in (place / "packed").iterdir()} >= {".arraytp-pack", "train-00000.h5"}
    assert arraytp(*words, "packed", "--shard-images", 3).status == 0
    assert arraytp(*words, "whole", "--shard-images", 3).status == 0
    for path in (place / "whole").iterdir():
        assert path.read_bytes() == (place / "packed" / path.name).read_bytes()


def test_signals_before_the_command_has_begun_are_one_line(arraytp, monkeypatch, number):
    """The signal may arrive while the config is still being read."""
    monkeypatch.setattr("arraytp.commands.run.load_config", lambda *_: signal.raise_signal(number))
    outcome = arraytp("run", "toy.yml", "--quiet")
    assert outcome.status == 128 + number
    assert len(outcome.err.strip().splitlines()) == 1

"""Real processes that are stopped by signals and resumed as they say; full disks; numbers of threads."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from arraytp.cli import main
from arraytp.signals import StopRequest
from arraytp.training.loop import Run

MAIN = "import sys; from arraytp.cli import main; sys.exit(main())"
LONG = ["--set", "train.epochs=4000", "--set", "data={dataset: toy, flip: 0.5, crop_padding: 1}"]
QUICK_CHECKPOINTS = ["--set", "train.checkpoint_minutes=0.0005"]


@contextmanager
def process(*arguments, code=MAIN, **environment):
    """Start `arraytp` as its entry point does, or by other code; kill it at the end of the block."""
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def when(condition, process, seconds=60):
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.005)


def epochs_trained(folder):
    path = folder / "metrics.csv"
    return max(path.read_text().count("\n") - 2, 0) if path.exists() else 0


def epochs(count):
    return ["--set", f"train.epochs={count}"]


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    ids=["int", "term", "hup"],
)
def test_a_signal_saves_and_says_how_to_go_on(arraytp, place, numbers, number, status):
    folder = place / "results/toy"
    with process("run", "toy.yml", "--fresh", *LONG) as running:
        when(lambda: epochs_trained(folder) >= 3, running)
        running.send_signal(number)
        out, err = running.communicate(timeout=30)
    assert running.returncode == status
    assert out == ""
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    assert re.match(r"toy: stopped in epoch \d+, step \d+; results/toy/checkpoint\.h5 is written; go on with: ", last)
    assert not list(place.rglob("*.partial"))
    assert not (folder / "summary.json").exists()
    # The printed command is run as it is, but with only two more epochs, to keep the test short.
    count = epochs_trained(folder) + 2
    command = shlex.split(last.partition("go on with: ")[2])
    assert command[:2] == ["arraytp", "run"]
    shorter = [word.replace("train.epochs=4000", f"train.epochs={count}") for word in command[1:]]
    assert arraytp(*shorter).status == 0
    assert epochs_trained(folder) == count
    arraytp("run", "toy.yml", "--quiet", "--out", "whole", *LONG, *epochs(count))
    assert numbers(folder) == numbers(place / "whole")


def test_a_script_that_calls_run_is_what_goes_on(place, stop_variant, monkeypatch, capsys):
    """`arraytp run` would resume without the script's changes to a rule (runs/benchmarks/drl_code.py)."""
    stop_variant("toy")
    monkeypatch.setattr("sys.argv", ["scripts/own rule.py", "toy.yml", "--fresh", "--quiet"])
    assert main(["run", "toy.yml", "--fresh", "--quiet"]) == 143
    line = capsys.readouterr().err
    assert line.endswith("; go on with: python 'scripts/own rule.py' --resume toy.yml --quiet\n")


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    ids=["int", "term", "hup"],
)
def test_a_signal_leaves_nothing_of_a_trace(place, number, status):
    iterations = "rule={name: ldrl, feedback: {iterations: 100000}}"
    with process("trace", "toy.yml", "--out", "t.h5", "--set", iterations) as running:
        when((place / "t.h5.partial").exists, running)
        running.send_signal(number)
        out, err = running.communicate(timeout=30)
    assert (running.returncode, out, len(err.strip().splitlines())) == (status, "", 1)
    assert not list(place.glob("t.h5*"))


def test_a_signal_that_is_ignored_stays_ignored():
    """`nohup` makes a run ignore SIGHUP, so that it outlives its terminal."""
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, former)


def test_a_killed_run_goes_on_from_its_last_checkpoint(arraytp, place, numbers):
    folder = place / "results/toy"
    with process("run", "toy.yml", "--quiet", *LONG, *QUICK_CHECKPOINTS) as running:
        when(lambda: epochs_trained(folder) >= 3 and (folder / "checkpoint.h5").exists(), running)
        running.kill()
    assert running.returncode == -signal.SIGKILL
    count = epochs_trained(folder) + 2
    outcome = arraytp("run", "toy.yml", "--quiet", "--resume", *LONG, *epochs(count))
    assert (outcome.status, outcome.err) == (0, "")
    assert not list(place.rglob("*.partial"))
    arraytp("run", "toy.yml", "--quiet", "--out", "whole", *LONG, *epochs(count))
    assert numbers(folder) == numbers(place / "whole")


def test_a_second_signal_ends_a_process_that_does_not_come_to_the_next_step(place):
    """The first request waits for the step to end; a user who does not want to wait asks twice."""
    code = """
import os, signal, sys
from arraytp.training import loop as train
from arraytp.cli import main

def hang(run, *rest):
    print("hanging", flush=True)
    while True:
        signal.pause()

train.Run._train_epoch = hang
sys.exit(main())
"""
    with process("run", "toy.yml", "--quiet", code=code) as running:
        assert running.stdout.readline() == "hanging\n"
        running.send_signal(signal.SIGINT)
        time.sleep(0.2)
        assert running.poll() is None
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=30)
    assert running.returncode == 130
    assert err.endswith("arraytp: error: interrupted\n")


@pytest.fixture
def stop_variant(monkeypatch):
    """Stop the training of one variant at its first check for a stop, as SIGTERM would."""
    train = Run.train

    def install(label):
        def stopping(run, stop):
            if run.label == label:
                stop.signal = signal.SIGTERM
            train(run, stop)

        monkeypatch.setattr(Run, "train", stopping)
        return monkeypatch

    return install


def go_on(arraytp, message):
    return arraytp(*shlex.split(message.partition("go on with: ")[2])[1:])


def test_stopped_variants_go_on_with_the_one_that_was_stopped(arraytp, place, stop_variant, numbers):
    stop_variant("dfa")
    stopped = arraytp("run", "variants.yml", "--quiet", "--set", "seed=5")
    assert stopped.status == 143
    assert (place / "results/variants/bp/summary.json").exists()
    stop_variant("none of them")
    assert go_on(arraytp, stopped.err).status == 0
    arraytp("run", "variants.yml", "--quiet", "--set", "seed=5", "--out", "whole")
    for name in ("bp", "dfa"):
        assert numbers(place / "results/variants" / name) == numbers(place / "whole" / name)


@pytest.mark.parametrize("former", ["seed=1", "seed=0"])
def test_a_fresh_start_that_is_stopped_can_go_on(arraytp, place, stop_variant, numbers, former):
    """Old results of variants that were not reached must neither pass for new ones nor block the resumed run."""
    arraytp("run", "variants.yml", "--quiet", "--set", former)
    stop_variant("bp")
    stopped = arraytp("run", "variants.yml", "--quiet", "--fresh")
    assert stopped.status == 143
    assert not (place / "results/variants/dfa/summary.json").exists()
    stop_variant("none of them")
    resumed = go_on(arraytp, stopped.err)
    assert (resumed.status, resumed.err) == (0, "")
    arraytp("run", "variants.yml", "--quiet", "--out", "whole")
    assert numbers(place / "results/variants/dfa") == numbers(place / "whole/dfa")


def test_the_command_to_go_on_survives_blanks_quotes_and_a_double_dash(arraytp, place, stop_variant):
    name = "it's a toy.yml"
    (place / name).write_text((place / "toy.yml").read_text())
    stop_variant("it's a toy")
    stopped = arraytp("run", "--quiet", "--fresh", "--out", "my results", "--", name)
    assert stopped.err.endswith("""arraytp run --resume --quiet --out 'my results' -- 'it'"'"'s a toy.yml'\n""")
    stop_variant("none of them")
    assert go_on(arraytp, stopped.err).status == 0


def test_signals_are_given_back_after_a_run(arraytp):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    arraytp("run", "toy.yml", "--quiet")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


FULL_DISK = """
import resource, sys
from arraytp.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), resource.RLIM_INFINITY))
sys.exit(main())
"""


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint_as_it_was(arraytp, place, numbers):
    """Files are limited to 5 kB, so that the checkpoint of some 12 kB cannot be written, as on a full disk."""
    folder = place / "results/toy"
    arraytp("run", "toy.yml", "--quiet")
    before = (folder / "checkpoint.h5").read_bytes()
    assert len(before) > 10000
    words = ["run", "toy.yml", "--quiet", "--resume", *epochs(2)]
    with process("5000", *words, code=FULL_DISK) as full:
        _, err = full.communicate(timeout=60)
    assert (full.returncode, err) == (2, "arraytp: error: results/toy: cannot be written: File too large\n")
    assert (folder / "checkpoint.h5").read_bytes() == before
    assert not list(place.rglob("*.partial"))
    assert arraytp(*words).status == 0
    arraytp("run", "toy.yml", "--quiet", "--out", "whole", *epochs(2))
    assert numbers(folder) == numbers(place / "whole")


WIDE = {
    "tasks": "data: {dataset: large, flip: 0.5}\n"
    "network: {blocks: [{type: conv, channels: 16, kernel: 5, activation: elu, pool: {kernel: 2, stride: 2}},"
    " {type: dense, units: 300, activation: tanh}, {type: dense, units: 3}]}\nrule: {name: fa}\n",
    "products with R, which are no tasks": "data: {dataset: fashion-mnist-10k}\n"
    "network: {blocks: [{type: dense, units: 64, activation: tanh}, {type: dense, units: 10}]}\n"
    "rule: {name: drl, hidden: 512, feedback: {iterations: 1}}\n",
}


@pytest.mark.parametrize("work", WIDE)
def test_the_number_of_threads_changes_no_bit(place, pack, numbers, work):
    """Shapes alone decide how work is cut into tasks; these are large enough for several tasks and BLAS threads."""
    pack(place / "large", train=256, shape=(20, 20, 1))
    (place / "wide.yml").write_text(
        WIDE[work] + "optimizer: {name: adam, lr: 0.001}\ntrain: {epochs: 1, batch_size: 128}\n"
    )
    code = """
import sys
from arraytp.training import loop as train
from arraytp.cli import main

collect = train.Run._collect
def stopping(run, score, progress):
    collect(run, score, progress)
    if run.position.step == 2:
        run._save()
        sys.exit(0)
train.Run._collect = stopping
train.Run._evaluate = lambda *_: None
main()
"""
    for threads in ("1", "2"):
        given = {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        with process("run", "wide.yml", "--quiet", "--out", threads, code=code, **given) as running:
            _, err = running.communicate(timeout=60)
        assert (running.returncode, err) == (0, "")
    one, two = numbers(place / "1"), numbers(place / "2")
    assert one[3] == 2
    assert one == two

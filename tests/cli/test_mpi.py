"""`mpiexec -n R arraytp run`, with real processes, compared with a run of one process.

Skipped unless mpi4py is installed and mpiexec lies beside this Python: `pip install -e '.[mpi,mpich]'`.
"""

import csv
import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import h5py
import numpy as np
import pytest

MPIEXEC = Path(sys.executable).parent / "mpiexec"
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("mpi4py") is None or not MPIEXEC.exists(), reason="needs arraytp[mpi,mpich]"
    ),
]
SETTINGS = ["--set", "train.epochs=3", "--dtype", "float64", "--quiet"]


def command(ranks, *words):
    program = [sys.executable, "-m", "arraytp", *map(str, words)]
    return ([str(MPIEXEC), "-n", str(ranks)] if ranks else []) + program


def run(ranks, *words, **environment):
    """Run to the end; return status, output, and the lines on standard error, by arraytp and by MPI."""
    return finished(command(ranks, *words), **environment)


def finished(program, **environment):
    done = subprocess.run(
        program, capture_output=True, text=True, check=False, timeout=120, env=os.environ | environment
    )
    return done.returncode, done.stdout, done.stderr.splitlines()


def numbers(folder):
    with h5py.File(folder / "checkpoint.h5") as file:
        arrays = [file[f"network/{n}/{part}"][()] for n in range(3) for part in ("weight", "bias")]
    with (folder / "metrics.csv").open() as file:
        rows = [[float(row[key]) for key in row if key != "seconds"] for row in csv.DictReader(file)]
    return [*arrays, np.array(rows)]


def assert_same(folder, other):
    for mine, theirs in zip(numbers(folder), numbers(other), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9)


@pytest.fixture
def one(place):
    """The folder of a run on one process."""
    assert run(0, "run", "toy.yml", *SETTINGS, "--out", "one")[0] == 0
    return place / "one"


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_run_on_ranks_is_that_of_one(place, one, ranks):
    status, out, said = run(ranks, "run", "toy.yml", *SETTINGS, "--out", "some")
    assert (status, out.count("results: some"), said) == (0, 1, [])
    assert_same(place / "some", one)
    before = (place / "some/checkpoint.h5").read_bytes()
    run(ranks, "run", "toy.yml", *SETTINGS, "--out", "some", "--fresh")
    again, there = (place / "some/checkpoint.h5"), place / "first.h5"
    there.write_bytes(before)
    with h5py.File(there) as first, h5py.File(again) as second:
        for name in ("network/0/weight", "optimizer/2/0"):
            np.testing.assert_array_equal(first[name][()], second[name][()])


def test_exact_runs_have_the_same_bits_on_1_2_4_and_8_ranks(place):
    """In single precision; the runs on 2 and 8 ranks resume what 4 ranks and 1 rank began."""
    rule = "rule={name: ldrl, feedback: {iterations: 2}}"
    words = ("run", "toy.yml", "--quiet", "--set", rule, "--set", "train.exact=true", "--out")
    stopped = {8: 1, 2: 4}
    for ranks in (1, 2, 4, 8):
        if ranks in stopped:
            assert run(stopped[ranks], *words, f"on-{ranks}", "--set", "train.steps=2")[0] == 0
        assert run(ranks, *words, f"on-{ranks}", "--resume")[0] == 0
    for ranks in (2, 4, 8):
        for mine, theirs in zip(numbers(place / f"on-{ranks}"), numbers(place / "on-1"), strict=True):
            np.testing.assert_array_equal(mine, theirs)
        for table in ("angles.csv", "feedback.csv"):
            assert (place / f"on-{ranks}" / table).read_bytes() == (place / "on-1" / table).read_bytes()


def test_groups_of_ranks_take_the_runs_that_are_left(place):
    assert run(0, "run", "variants.yml", *SETTINGS, "--seeds", "2", "--out", "one")[0] == 0
    words = ("run", "variants.yml", *SETTINGS, "--seeds", "2", "--out", "some", "--ranks-per-run", "2")
    status, out, said = run(4, *words)
    assert (status, out.count("±: standard"), said) == (0, 1, [])
    for seed in ("bp/seed-0", "bp/seed-1", "dfa/seed-0", "dfa/seed-1"):
        assert_same(place / "some" / seed, place / "one" / seed)
    assert run(1, *words[:-2], "--resume")[0] == 0


@pytest.mark.parametrize("groups", [(), ("--ranks-per-run", "1")])
def test_ranks_share_studies(place, groups):
    study = ("--set", "study={rounds: 1, seeds: 2}", "--set", "rule.name=ldrl", "--quiet", "--out", "some")
    status, out, said = run(2, "run", "variants.yml", *study, *groups)
    assert (status, out.count("results: some"), said) == (0, 1, [])
    for variant in ("bp", "dfa"):
        assert (place / "some" / variant / "summary.json").exists()
        assert (place / "some" / variant / "seed-1/summary.json").exists()


def test_a_run_that_fails_in_a_group_is_named_once_and_the_others_go_on(place):
    text = (place / "toy.yml").read_text().replace("lr: 0.05", "lr: 1e308")
    (place / "bad.yml").write_text(text + "variants: {bad: {}, good: {optimizer: {lr: 0.05}}}\n")
    status, _, said = run(2, "run", "bad.yml", *SETTINGS, "--seeds", "2", "--ranks-per-run", "1", "--out", "some")
    assert status == 1
    assert sorted(line.split(":")[2] for line in said) == [" bad seed 0", " bad seed 1"]
    assert (place / "some/good/seed-1/summary.json").exists()


FAILING = """\
import os, sys
from arraytp.__main__ import main
from arraytp.errors import UserError
from arraytp.training.experiment import Experiment

forward = Experiment.forward

def fails(self, *given):
    at = self.config.seed, self.optimizer_state.step
    if os.environ["PMI_RANK"] in os.environ["FAILS"].split() and at == (1, 2):
        raise UserError("toy: cannot be read")
    return forward(self, *given)

Experiment.forward = fails
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("ranks", "groups", "fails", "where"), [(2, (), "0", ""), (4, ("--ranks-per-run", "2"), "1 3", "rank 1: ")]
)
def test_a_rank_that_fails_alone_ends_its_run_and_no_other(place, ranks, groups, fails, where):
    """The rank fails in the middle of an epoch, while the others wait for its sum; MPI must print nothing.

    Either of two groups may get the seed that fails, so the second rank of each is made to fail at it.
    """
    (place / "failing.py").write_text(FAILING)
    words = ["run", "toy.yml", "--quiet", "--seeds", "3", *groups, "--out", "some"]
    program = [str(MPIEXEC), "-n", str(ranks), sys.executable, "failing.py", *words]
    status, _, said = finished(program, FAILS=fails)
    assert (status, said) == (2, [f"arraytp: error: toy seed 1: {where}toy: cannot be read"])
    assert [(place / f"some/seed-{n}/summary.json").exists() for n in range(3)] == [True, False, True]
    assert run(ranks, *words, "--resume")[0] == 0


UNCLEARED = """\
import sys
from arraytp.__main__ import main
from arraytp.commands import run

clear = run._clear

def refuses(job):
    if job.folder.name == "seed-1":
        raise PermissionError(13, "Permission denied", str(job.folder / "summary.json"))
    clear(job)

run._clear = refuses
sys.exit(main())
"""


def test_what_cannot_be_cleared_fails_in_its_group_and_no_other(place):
    words = ["run", "toy.yml", "--quiet", "--seeds", "3", "--ranks-per-run", "1", "--out", "some"]
    assert run(2, *words)[0] == 0
    before = [(place / f"some/seed-{n}/summary.json").stat().st_mtime_ns for n in range(3)]
    (place / "uncleared.py").write_text(UNCLEARED)
    status, _, said = finished([str(MPIEXEC), "-n", "2", sys.executable, "uncleared.py", *words, "--fresh"])
    assert (status, said) == (
        2,
        ["arraytp: error: toy seed 1: some/seed-1/summary.json: cannot be written: Permission denied"],
    )
    after = [(place / f"some/seed-{n}/summary.json").stat().st_mtime_ns for n in range(3)]
    assert [new > old for new, old in zip(after, before, strict=True)] == [True, False, True]


def test_the_only_run_of_two_groups_may_fail(place):
    """The group that has nothing to do must not hang when the other one fails."""
    words = ["run", "toy.yml", "--quiet", "--ranks-per-run", "1", "--set", "optimizer.lr=1e30"]
    status, _, (line,) = run(2, *words)
    assert status == 1
    assert line.startswith("arraytp: error: toy: not finite at step")


def test_variants_go_on_on_all_ranks_when_one_fails(place):
    path = place / "variants.yml"
    path.write_text(path.read_text().replace("{bp: {rule: {name: bp}}", "{bp: {optimizer: {lr: 1e30}}"))
    status, out, (line,) = run(2, "run", "variants.yml", "--quiet", "--out", "some")
    assert status == 1
    assert line.startswith("arraytp: error: bp: not finite at step")
    assert (place / "some/dfa/summary.json").exists()
    assert "dfa" in out


def test_a_process_that_has_heard_of_a_failure_ends_in_silence():
    """It has no pending receive left to cancel, and MPI treats cancelling a null request as an error."""
    code = (
        "from array import array; from mpi4py import MPI; from arraytp.mpi_ranks import Mpi\n"
        "ranks = Mpi(MPI, MPI.COMM_WORLD); ranks._errors.Send(array('b', [1]), 0); ranks._cry.Wait()"
    )
    assert finished([sys.executable, "-c", code]) == (0, "", [])


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("--ranks-per-run", "3"), 2, "2 ranks were launched, which is not a multiple"),
        (("--set", "train.batch_size=1"), 2, "a batch has 1 images, fewer than the 2 ranks"),
        (("--set", "study={}", "--set", "train.exact=true"), 2, "train.exact: true: a study takes its batch"),
        (("--set", "optimizer.lr=1e308", "--set", "dtype=float64"), 1, "not finite at step 1"),
        (("--resume", "--fresh"), 2, "exclude each other"),
        (("--set", "rule.name=nothing"), 2, "rule.name"),
    ],
)
def test_a_mistake_is_told_once(place, words, status, message):
    found, out, said = run(2, "run", "toy.yml", "--quiet", "--out", "some", *words)
    assert (found, out, len(said)) == (status, "", 1)
    assert message in said[0]


def test_without_mpi4py_one_line_says_what_to_install(place, tree):
    hidden = place / "hidden/mpi4py"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('No module named mpi4py')")
    before = tree()
    path = os.pathsep.join([str(hidden.parent), os.environ.get("PYTHONPATH", "")])
    status, out, said = run(2, "run", "toy.yml", "--quiet", PYTHONPATH=path, PYTHONDONTWRITEBYTECODE="1")
    assert (status, out, len(said)) == (2, "", 1)
    assert "2 processes were launched (PMI_SIZE), but mpi4py cannot be imported" in said[0]
    assert tree() == before


@pytest.mark.parametrize(
    ("folder", "setting", "message"),
    [
        ("elsewhere", "train.epochs=1", "other images or labels in data.dataset toy"),
        (".", "train.epochs=2", "train.epochs is 1 there and 2 here"),
    ],
)
def test_ranks_that_see_different_data_or_settings_are_told_once(place, pack, folder, setting, message):
    """Machines may have different files under the same names."""
    pack(place / "elsewhere/toy", train=44)
    shutil.copy(place / "toy.yml", place / "elsewhere/toy.yml")
    program = command(0, "run", "toy.yml", "--quiet")
    second = ["-n", "1", "-wdir", str(place / folder), *program, "--set", setting]
    status, out, said = finished([str(MPIEXEC), "-n", "1", *program, ":", *second])
    assert (status, out) == (2, "")
    assert said == [f"arraytp: error: rank 1 was given something different from rank 0: {message}"]
    assert not (place / "results").exists()


RUN = ("run", "toy.yml", "--quiet")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*RUN, "--plain"), "rank 1 was given something different from rank 0: --plain is True there and False here"),
        ((*RUN, "--seeds", "2", "--ranks-per-run", "1"), "--seeds is 2 there and None here"),
        (("bench", "toy.yml"), "the command is bench there and run here"),
        ((*RUN, "--bogus"), "rank 1: No such option '--bogus'"),
        (("run", "nothing.yml", "--quiet"), "rank 1: nothing.yml"),
    ],
)
def test_ranks_that_are_given_different_commands_are_told_once(place, words, message):
    """Otherwise, rank 0 would wait for rank 1 for ever."""
    first, second = command(0, *RUN), command(0, *words)
    status, out, said = finished([str(MPIEXEC), "-n", "1", *first, ":", "-n", "1", *second])
    lines = [line for line in said if line.startswith("arraytp")]
    assert (status, out, len(lines)) == (2, "", 1)
    assert message in lines[0]
    assert not (place / "results").exists()


def test_a_host_where_mpi_cannot_start_ends_the_others(place):
    """The others wait for it inside MPI, and the launcher ignores that its process has ended."""
    hidden = place / "hidden/mpi4py"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text("raise ImportError('No module named mpi4py')")
    path, program = os.pathsep.join([str(hidden.parent), os.environ.get("PYTHONPATH", "")]), command(0, *RUN)
    second = ["env", f"PYTHONPATH={path}", "MPI_LOCALRANKID=0", *program]
    # The launcher's own messages go to standard output.
    status, _, said = finished([str(MPIEXEC), "-n", "1", *program, ":", "-n", "1", *second])
    lines = [line for line in said if line.startswith("arraytp")]
    assert status != 0
    assert len(lines) == 1
    assert "rank 1: 2 processes were launched (PMI_SIZE), but mpi4py cannot be imported" in lines[0]
    assert not (place / "results").exists()


@pytest.mark.parametrize("words", [(), ("--version",), ("run", "--help")])
def test_what_a_command_says_of_itself_comes_once(place, words):
    alone, together = run(0, *words), run(2, *words)
    assert together == alone


@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS"])
def test_processes_that_do_not_see_each_other_write_nothing(place, tree, variable):
    """With mpi4py for another MPI than the launcher's, each sees only itself, and all would write into one folder."""
    before = tree()
    rank = {"OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK", "SLURM_NTASKS": "SLURM_PROCID"}[variable]
    statuses, lines = [], []
    for number in ("0", "1"):
        status, _, said = run(0, "run", "toy.yml", "--quiet", **{variable: "2", rank: number})
        statuses.append(status)
        lines += said
    assert statuses == [2, 2]
    assert len(lines) == 1
    assert "each sees only itself" in lines[0]
    assert tree() == before


def ranks_of(place):
    """Return, by rank, the ids of processes in a folder that an mpiexec started, even if it has left them behind."""
    found = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal() and os.readlink(entry / "cwd") == str(place):
                given = dict(each.partition(b"=")[::2] for each in (entry / "environ").read_bytes().split(b"\0"))
                if b"PMI_RANK" in given and b"arraytp" in (entry / "cmdline").read_bytes().split(b"\0"):
                    found[int(given[b"PMI_RANK"])] = int(entry.name)
    return found


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def started(ranks, *words):
    return subprocess.Popen(
        command(ranks, "run", "toy.yml", *SETTINGS, *LONG, *words, "--out", "some"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


LONG = ("--set", "train.epochs=100", "--set", "train.checkpoint_minutes=0.002")
GROUPS = ("--seeds", "2", "--ranks-per-run", "1", "--set", "train.epochs=1000")


@pytest.mark.slow
@pytest.mark.parametrize("words", [(), GROUPS], ids=["one run", "groups"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_any_rank_stops_all_with_one_checkpoint_per_run(place, number, rank, words):
    folders = [place / "some" / seed for seed in (("seed-0", "seed-1") if words else ("",))]
    process = started(2, *words)
    wait_for(lambda: all((folder / "checkpoint.h5").exists() for folder in folders))
    os.kill(ranks_of(place)[rank], number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    (line,) = (line for line in said.splitlines() if "stopped in" in line)
    assert line.count("stopped in") == len(folders)
    assert "; go on with: mpiexec -n 2 arraytp run --resume toy.yml " in line
    assert not any((folder / "summary.json").exists() for folder in folders)


@pytest.fixture(scope="module")
def undisturbed():
    """The numbers of an undisturbed run on one process; empty until a test has computed them."""
    return []


@pytest.mark.slow
@pytest.mark.parametrize("time_of_death", range(int(os.environ.get("KILLS", "5"))))
def test_a_killed_rank_ends_the_others_and_any_number_goes_on(place, undisturbed, time_of_death):
    """Ranks are killed at random moments, even while they start; KILLS=50 tries 50 moments."""
    generator = random.Random(time_of_death)
    process = started(2)
    wait_for(lambda: len(ranks_of(place)) == 2)
    time.sleep(generator.uniform(0, 4))
    killed = time.monotonic()
    with suppress(ProcessLookupError):
        os.kill(generator.choice([*ranks_of(place).values()] or [process.pid]), signal.SIGKILL)
    process.communicate(timeout=30)
    assert time.monotonic() - killed < 10, "the others wait for the sums of a rank that is no more"
    assert ranks_of(place) == {}
    words = ("run", "toy.yml", *SETTINGS, "--set", "train.epochs=100")
    status, _, said = run(generator.choice([0, 2, 3]), *words, "--resume", "--out", "some")
    assert (status, said) == (0, [])
    if not undisturbed:
        assert run(0, *words, "--out", "undisturbed")[0] == 0
        undisturbed += numbers(place / "undisturbed")
    for mine, theirs in zip(numbers(place / "some"), undisturbed, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-9)

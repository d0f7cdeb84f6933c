"""`mpiexec -n R arraytp run`, with real processes, held against the run of one.

Skipped without mpi4py and the mpiexec that stands beside this Python: `pip install -e '.[mpi,mpich]'`.
"""

import csv
import importlib.util
import os
import random
import signal
import subprocess
import sys
import time
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
    """Run to the end; return status, output, and what was said on standard error by arraytp."""
    done = subprocess.run(
        command(ranks, *words), capture_output=True, text=True, check=False, timeout=120, env=os.environ | environment
    )
    return done.returncode, done.stdout, [line for line in done.stderr.splitlines() if line.startswith("arraytp")]


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
    """The run of one process."""
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


def test_groups_of_ranks_take_the_runs_that_are_left(place):
    assert run(0, "run", "variants.yml", *SETTINGS, "--seeds", "2", "--out", "one")[0] == 0
    words = ("run", "variants.yml", *SETTINGS, "--seeds", "2", "--out", "some", "--ranks-per-run", "2")
    status, out, said = run(4, *words)
    assert (status, out.count("±: standard"), said) == (0, 1, [])
    for seed in ("bp/seed-0", "bp/seed-1", "dfa/seed-0", "dfa/seed-1"):
        assert_same(place / "some" / seed, place / "one" / seed)
    assert run(1, *words[:-2], "--resume")[0] == 0


def test_a_run_that_fails_in_a_group_is_named_once_and_the_others_go_on(place):
    text = (place / "toy.yml").read_text().replace("lr: 0.05", "lr: 1e200")
    (place / "bad.yml").write_text(text + "variants: {bad: {}, good: {optimizer: {lr: 0.05}}}\n")
    status, _, said = run(2, "run", "bad.yml", *SETTINGS, "--seeds", "2", "--ranks-per-run", "1", "--out", "some")
    assert status == 1
    assert sorted(line.split(":")[2] for line in said) == [" bad seed 0", " bad seed 1"]
    assert (place / "some/good/seed-1/summary.json").exists()


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (("--ranks-per-run", "3"), 2, "2 ranks were launched, which is not a multiple"),
        (("--set", "train.batch_size=1"), 2, "a batch has 1 images, fewer than the 2 ranks"),
        (("--set", "optimizer.lr=1e200", "--set", "dtype=float64"), 1, "not finite at step 1"),
        (("--resume", "--fresh"), 2, "exclude each other"),
        (("--set", "rule.name=nothing"), 2, "rule.name"),
    ],
)
def test_a_mistake_is_told_once(place, words, status, message):
    found, out, said = run(2, "run", "toy.yml", "--quiet", "--out", "some", *words)
    assert (found, out, len(said)) == (status, "", 1)
    assert message in said[0]


@pytest.mark.parametrize("variable", ["OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS"])
def test_processes_that_do_not_see_each_other_write_nothing(place, tree, variable):
    """An mpi4py of another MPI than the launcher's: each would be the only one, and write into the same folder."""
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


def children(pid):
    """Return the Python processes that an mpiexec has started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                line = (entry / "cmdline").read_bytes().split(b"\0")
                group = os.getpgid(int(entry.name))
            except OSError:
                continue
            started_by = group == pid or _parent_chain(int(entry.name), pid)
            if started_by and b"arraytp" in line and b"mpiexec" not in line[0]:
                found.append(int(entry.name))
    return sorted(found)


def _parent_chain(pid, ancestor):
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            return False
    return False


def started(place, ranks, *words):
    """Start a long run on ranks; return it when its first step is done."""
    process = subprocess.Popen(
        command(ranks, "run", "toy.yml", *SETTINGS, *words, "--out", "some"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (place / "some/metrics.csv").exists():
        time.sleep(0.02)
    return process


LONG = ("--set", "train.epochs=100", "--set", "train.checkpoint_minutes=0.002")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_any_rank_stops_all_with_one_checkpoint(place, number, rank):
    process = started(place, 2, *LONG)
    time.sleep(1)
    os.kill(children(process.pid)[rank], number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert len([line for line in said.splitlines() if "stopped in" in line]) == 1
    assert (place / "some/checkpoint.h5").exists()


@pytest.mark.slow
@pytest.mark.parametrize("time_of_death", range(int(os.environ.get("KILLS", "10"))))
def test_a_killed_rank_ends_the_others_and_any_number_goes_on(place, time_of_death):
    """At random moments; the run of one process that nothing disturbed has the same numbers in the end."""
    generator = random.Random(time_of_death)
    process = started(place, 2, *LONG)
    time.sleep(generator.uniform(0, 3))
    killed = time.monotonic()
    os.kill(generator.choice(children(process.pid)), signal.SIGKILL)
    process.communicate(timeout=30)
    assert time.monotonic() - killed < 10, "the others wait for the sums of a rank that is no more"
    assert process.returncode != 0
    assert children(process.pid) == []
    words = ("run", "toy.yml", *SETTINGS, "--set", "train.epochs=100", "--resume", "--out", "some")
    status, _, said = run(generator.choice([0, 2, 3]), *words)
    assert (status, said) == (0, [])
    assert run(0, "run", "toy.yml", *SETTINGS, "--set", "train.epochs=100", "--out", "undisturbed")[0] == 0
    for mine, theirs in zip(numbers(place / "some"), numbers(place / "undisturbed"), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-9)

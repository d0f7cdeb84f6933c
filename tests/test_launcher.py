"""What is read from the variables that MPICH, Open MPI and Slurm set, and how a process ends the others."""

import io
import os
import pty
import subprocess
import sys
import threading
import time

import pytest

from arraytp import launcher
from arraytp.cli import COMMANDS, main
from arraytp.errors import UserError

VARIABLES = [name for pair in launcher.LAUNCHERS for name in pair]
VARIABLES += [*launcher.LOCAL_RANKS, "SLURM_JOB_ID", "SLURM_STEP_ID"]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    launcher.world.cache_clear()
    yield
    launcher.world.cache_clear()


def set_all(monkeypatch, text):
    for setting in text.split():
        monkeypatch.setenv(*setting.split("="))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", (1, 0)),
        ("PMI_SIZE=4 PMI_RANK=3", (4, 3)),
        ("OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=1", (2, 1)),
        ("SLURM_NTASKS=8 SLURM_PROCID=5 SLURM_JOB_ID=1 SLURM_STEP_ID=0", (8, 5)),
        # In an interactive shell, in a batch script itself, and under mpiexec in a batch script.
        ("SLURM_NTASKS=8 SLURM_PROCID=0 SLURM_JOB_ID=1 SLURM_STEP_ID=4294967290 SLURM_STEP_NUM_TASKS=1", (1, 0)),
        ("SLURM_NTASKS=8 SLURM_PROCID=0 SLURM_JOB_ID=1", (1, 0)),
        ("SLURM_NTASKS=8 SLURM_PROCID=0 SLURM_JOB_ID=1 PMI_SIZE=2 PMI_RANK=1", (2, 1)),
    ],
)
def test_the_launcher_says_how_many_there_are(monkeypatch, text, wanted):
    set_all(monkeypatch, text)
    assert launcher.launched() == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", 0),
        ("MPI_LOCALRANKID=3", 0),
        ("PMI_SIZE=8 PMI_RANK=5 MPI_LOCALRANKID=1", 1),
        ("OMPI_COMM_WORLD_SIZE=8 OMPI_COMM_WORLD_LOCAL_RANK=2", 2),
        ("SLURM_NTASKS=8 SLURM_PROCID=5 SLURM_LOCALID=3", 3),
    ],
)
def test_the_launcher_says_which_process_of_the_host_this_is(monkeypatch, text, wanted):
    """The ranks of a host take its devices in turn."""
    set_all(monkeypatch, text)
    assert launcher.local_rank() == wanted


@pytest.mark.parametrize(("sharing", "wanted"), [(2, 4), (16, 1), (1, None)])
def test_a_rank_uses_its_share_of_the_cores_whatever_run_it_is_of(monkeypatch, sharing, wanted):
    """Otherwise, each group of one rank would use all cores."""
    everyone = object.__new__(launcher.Mpi)
    everyone.sharing = sharing
    monkeypatch.setattr(launcher, "_known_world", lambda: everyone)
    monkeypatch.setattr(launcher.os, "sched_getaffinity", lambda _: range(8))
    assert launcher.threads_of(launcher.ALONE) == wanted


def test_launched_without_mpi4py_says_what_to_install(monkeypatch):
    set_all(monkeypatch, "PMI_SIZE=2 PMI_RANK=0")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UserError, match=r"2 processes were launched \(PMI_SIZE\), .* install arraytp\[mpi\]"):
        launcher.world()


def test_only_the_first_of_the_processes_speaks(monkeypatch):
    """Otherwise, every rank would print the same line."""
    for rank, speaks in ((0, True), (1, False)):
        set_all(monkeypatch, f"PMI_SIZE=2 PMI_RANK={rank}")
        assert launcher.speaks() is speaks


@pytest.mark.parametrize("name", sorted({*COMMANDS} - {"run", "bench"}))
def test_a_command_for_one_process_is_refused_to_several_in_one_line(monkeypatch, capsys, name):
    """Otherwise, each process would do all the work and write the same files."""
    for rank, lines in ((0, 1), (1, 0)):
        set_all(monkeypatch, f"PMI_SIZE=2 PMI_RANK={rank}")
        assert main([name]) == 2
        said = capsys.readouterr().err.splitlines()
        assert len(said) == lines
        assert all(f"{name}: runs in one process, not in 2" in line for line in said)


def test_who_ends_the_others_waits_until_its_last_words_are_read(monkeypatch):
    """Otherwise, mpiexec loses what it has not read when a rank aborts, about once in 20 times."""
    reading, writing = os.pipe()
    heard, aborted = [], []
    reader = threading.Timer(0.3, lambda: heard.append(os.read(reading, 99)))
    world = object.__new__(launcher.Mpi)
    world.abort = lambda status: aborted.append((status, [*heard]))
    monkeypatch.setattr(launcher, "_known_world", lambda: world)
    # Shorten and disarm what follows `abort`, which does not return in reality.
    monkeypatch.setattr(launcher.time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, launcher.PAUSE)))
    monkeypatch.setattr(launcher.os, "kill", lambda *_: None)
    with open(reading), open(writing, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        stream.write("words")
        reader.start()
        launcher.end_all(2)
        reader.join()
    assert aborted == [(2, [b"words"])]


def test_who_ends_the_others_does_not_wait_forever_for_a_reader(monkeypatch):
    monkeypatch.setattr(launcher, "PATIENCE", 0.1)
    reading, writing = os.pipe()
    with open(reading), open(writing, "w") as stream:
        stream.write("words")
        stream.flush()
        launcher._await_reader(stream)
        assert os.read(reading, 99) == b"words"


def test_who_ends_the_others_does_not_wait_where_there_is_no_reader(monkeypatch, tmp_path):
    monkeypatch.setattr(launcher.time, "sleep", lambda _: pytest.fail("waited"))
    with (tmp_path / "errors.txt").open("w") as stream:
        stream.write("words")
        stream.flush()
        launcher._await_reader(stream)
    launcher._await_reader(io.StringIO())


def test_what_is_typed_ahead_at_a_terminal_is_nothing_unread(monkeypatch):
    monkeypatch.setattr(launcher.time, "sleep", lambda _: pytest.fail("waited"))
    keyboard, screen = pty.openpty()
    os.write(keyboard, b"words\n")
    with open(keyboard), open(screen, "w") as stream:
        launcher._await_reader(stream)


def test_without_a_launcher_nothing_of_mpi_is_imported():
    code = "import sys; from arraytp import cli, launcher; launcher.world(); print('mpi4py' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

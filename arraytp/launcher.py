"""The processes that a launcher (mpiexec, srun) has started. Without a launcher, MPI is not imported."""

import fcntl
import functools
import importlib
import os
import signal
import stat
import sys
import termios
import time
import warnings
from array import array
from contextlib import suppress
from typing import Any, TextIO

from arraytp.errors import UserError
from arraytp.mpi_ranks import PATIENCE, PAUSE, Mpi
from arraytp.ranks import ALONE, Ranks

# For each launcher: the variables that hold the number of processes and the number of this one.
LAUNCHERS = (
    ("PMI_SIZE", "PMI_RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("SLURM_NTASKS", "SLURM_PROCID"),
)
LOCAL_RANKS = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID")


def launched() -> tuple[int, int]:
    """Return the number of processes that the launcher reports, and the number of this one; 1 and 0 without a launcher.

    A Slurm batch script or shell is not a process of a job step, although the job's number of tasks is set there.
    """
    for size, rank in LAUNCHERS:
        if size == "SLURM_NTASKS" and "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" not in os.environ:
            continue
        if os.environ.get(size, "").isdecimal():
            place = os.environ.get(rank, "")
            return int(os.environ[size]), int(place) if place.isdecimal() else 0
    return 1, 0


def local_rank() -> int:
    """Return this process's number among those on this host, as the launcher reports it; 0 without a launcher."""
    given = (os.environ.get(name, "") for name in LOCAL_RANKS) if launched()[0] > 1 else ()
    return next((int(value) for value in given if value.isdecimal()), 0)


@functools.cache
def world() -> Ranks:
    """Return all processes that the launcher has started; imports MPI if there are several.

    UserError if mpi4py is missing, or the processes do not see each other.
    """
    size, _ = launched()
    if size == 1:
        return ALONE
    (says, *_) = (name for name, _ in LAUNCHERS if os.environ.get(name) == str(size))
    try:
        with warnings.catch_warnings():
            # mpi4py warns of a launcher that belongs to another MPI, in seven lines per process.
            warnings.simplefilter("ignore", RuntimeWarning)
            mpi: Any = importlib.import_module("mpi4py.MPI")
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"{size} processes were launched ({says}), but mpi4py cannot be imported ({error}); install arraytp[mpi] "
            "for this machine's MPI, or arraytp[mpi,mpich] where it has none"
        ) from error
    if mpi.COMM_WORLD.size == 1:
        library = " ".join(mpi.Get_library_version().split("\n")[0].split())
        raise UserError(
            f"{size} processes were launched ({says}), but each sees only itself and would write into one folder: "
            f"mpi4py speaks {library}, another MPI than the launcher's; use the mpiexec that belongs to it or another "
            "srun --mpi, or build mpi4py with the launcher's MPI"
        )
    return Mpi(mpi, mpi.COMM_WORLD)


@functools.cache
def failed_alone(met: bool = False) -> bool:
    """Tell whether this process ends by an error while others do not, which must then be ended.

    With `met`, only a world that this process has already joined counts. Otherwise it joins now: a rank with a wrong
    option fails before joining, and the others wait for it. If mpi4py cannot be imported, it is taken to be missing on
    this host alone: then the first process of every host but rank 0's answers yes.
    """
    if met and not world.cache_info().currsize:
        return False
    try:
        ranks = world()
    except UserError:
        missing = "mpi4py.MPI" not in sys.modules
        return missing and launched()[1] > 0 and any(os.environ.get(name) == "0" for name in LOCAL_RANKS)
    return isinstance(ranks, Mpi) and not ranks.all_end()


def speaks() -> bool:
    """Tell whether this process is the first."""
    return launched()[1] == 0


def end_all(status: int) -> None:
    """End all processes, since the others would wait for this one."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        # A launcher that is told to end everything drops the output that it has not read yet.
        _await_reader(stream)
    ranks = _known_world()
    if isinstance(ranks, Mpi):
        ranks.abort(status)
    # A launcher ends processes that wait for MPI to start only after one has died by a signal. Those that fail, too,
    # are done after this pause.
    time.sleep(PATIENCE)
    os.kill(os.getpid(), signal.SIGKILL)


def _await_reader(stream: TextIO) -> None:
    """Wait, for some seconds at most, until the pipe that this stream writes to has been read empty."""
    unread, deadline = array("i", [0]), time.monotonic() + PATIENCE
    # Streams in tests and notebooks have no file descriptor.
    with suppress(OSError):
        while stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode) and time.monotonic() < deadline:
            fcntl.ioctl(stream.fileno(), termios.FIONREAD, unread)
            if not unread[0]:
                break
            time.sleep(PAUSE)


def _known_world() -> Ranks:
    """Return the world if this process has joined it, otherwise `ALONE`."""
    return world() if world.cache_info().currsize else ALONE


def threads_of(ranks: Ranks) -> int | None:
    """Return how many threads a rank should use: its share of the cores that it and other ranks on its host may use.

    None if no other rank uses these cores. Ranks of other runs take their share, too.
    """
    everyone = _known_world()
    sharing = everyone.sharing if isinstance(everyone, Mpi) else ranks.size
    return None if sharing == 1 else max(1, len(os.sched_getaffinity(0)) // sharing)

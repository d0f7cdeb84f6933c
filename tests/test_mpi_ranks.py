"""Ranks that communicate by MPI, after one has failed; skipped without mpi4py and an mpiexec beside this Python."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

MPIEXEC = Path(sys.executable).parent / "mpiexec"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None or not MPIEXEC.exists(), reason="needs arraytp[mpi,mpich]"
)

# Rank 0 begins many sums, as a step of a deep network does, and rank 1 fails before the first of them.
FAR_BEHIND = """
import numpy as np
from mpi4py import MPI
from arraytp.errors import FailedElsewhereError
from arraytp.mpi_ranks import Mpi
ranks, own = Mpi(MPI, MPI.COMM_WORLD), None
if ranks.rank:
    own = "failed"
else:
    ends = [ranks.begin_sum(np.zeros(5 + number)) for number in range(200)]
    try:
        ends[0]()
    except FailedElsewhereError:
        pass
assert ranks.problems(own) == [None, "failed"]
assert ranks.gather(ranks.rank) == [0, 1]
"""


def test_a_rank_that_failed_hundreds_of_sums_behind_joins_all_of_them():
    program = [str(MPIEXEC), "-n", "2", sys.executable, "-c", FAR_BEHIND]
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

"""Compare the time of two ranks of one thread with one process of two threads, on a machine with two idle cores.

    mpiexec -n 3 python runs/benchmarks/ranks.py
    mpiexec -n 3 python runs/benchmarks/ranks.py --rounds 3 --steps 5

Ranks 0 and 1 share a run, and rank 2 has its own. The two sides take turns, so that other load on the machine affects
both: in every round each side trains the same number of steps while the other sleeps. Times are medians over rounds,
and the ratio is the median of the rounds' ratios; above 1, the ranks are slower.
"""

import argparse
import statistics
import time
from contextlib import closing
from pathlib import Path

from mpi4py import MPI

from arraytp.config import load_one
from arraytp.mpi_ranks import Mpi
from arraytp.ranks import ALONE
from arraytp.training.build import build_planned
from arraytp.training.plan import plan

RUNS = Path(__file__).parents[1]
LARGE = [f"network.blocks.{n}.units=1024" for n in range(3)]
SETTINGS = (
    ("BP, LeNet", "quickstart.yml", "bp"),
    ("L-DRL in closed form, LeNet", "quickstart.yml", "ldrl"),
    ("L-DRL by noise, LeNet", "quickstart.yml", "ldrl-noise"),
    ("GAIT-prop, 256 units, batch 64", "quickstart-gait-prop.yml", "gp"),
    ("GAIT-prop, 1024 units, batch 256", "quickstart-gait-prop.yml", "gp", "train.batch_size=256", *LARGE),
)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=8, help="of each side and round")
    given, everyone = parser.parse_args(), MPI.COMM_WORLD
    if everyone.size != 3:
        parser.error(f"needs mpiexec -n 3, got {everyone.size} ranks")
    side = everyone.rank // 2
    group = everyone.Split(side)
    ranks = Mpi(MPI, group) if side == 0 else ALONE
    if everyone.rank == 0:
        print(
            "| | 2 ranks, ms per step | 1 process | ratio | smallest | largest |\n|---|---|---|---|---|---|", flush=True
        )
    for name, file, variant, *overrides in SETTINGS:
        experiment = build_planned(plan(load_one(RUNS / file, overrides, variant)), ranks=ranks)
        batch, seconds = experiment.config.train.batch_size, []
        with closing(experiment.train_loader.batches(0)) as batches:
            images, labels = (array.copy() for array in next(batches))
        for turn in range(given.rounds + 1):
            for now in (0, 1) if turn % 2 else (1, 0):
                asleep_until_all_come(everyone)
                if now == side:
                    started = time.perf_counter()
                    for _ in range(given.steps):
                        experiment.step(images, labels, size=batch)
                    seconds.append((time.perf_counter() - started) / given.steps)
        both = everyone.gather(seconds[1:])
        if everyone.rank == 0:
            ratios = [shared / alone for shared, alone in zip(both[0], both[2], strict=True)]
            shared, alone, ratio = (statistics.median(values) for values in (both[0], both[2], ratios))
            print(f"| {name} | {1e3 * shared:.1f} | {1e3 * alone:.1f} | {ratio:.2f} | {min(ratios):.2f} | "
                  f"{max(ratios):.2f} |", flush=True)  # fmt: skip


def asleep_until_all_come(everyone: MPI.Comm) -> None:
    """Wait like MPI's own barrier, but leave the cores to the ranks that compute."""
    request = everyone.Ibarrier()
    while not request.Test():
        time.sleep(0.002)


if __name__ == "__main__":
    main()

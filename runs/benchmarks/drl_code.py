"""Train DRL's feedback as the DRL code does where it differs from arraytp: a block's last gradient is applied again.

The code has one Adam for the Q^n of all blocks, clears gradients once per batch, and steps all blocks in each
iteration. After its own iterations on a batch, Q^n is therefore stepped further with its last, noisy gradient while the
blocks above are trained.

    python runs/benchmarks/drl_code.py CONFIG [options of arraytp run]
"""

import sys
from collections.abc import Mapping

from arraytp.backend import Array
from arraytp.cli import main as arraytp
from arraytp.rules import feedback
from arraytp.rules.protocol import Descent, State

step_feedback = feedback.step_feedback
# For each block that has been trained on the batch: its descent settings and its last gradient.
Last = tuple[Descent, Mapping[str, Array]]
last: dict[int, Last] = {}


def step_all(descent: Descent, state: State, n: int, k: int, gradients: Mapping[str, Array]) -> None:
    """Take step k on Q^n, and one step on every block below with the gradient of that block's last iteration."""
    if n == 1 and k == 0:
        last.clear()
    step_feedback(descent, state, n, k, gradients)
    last[n] = descent, {part: gradient.copy() for part, gradient in gradients.items()}
    for below in range(1, n):
        its, stale = last[below]
        iterations = sum(last[block][0].iterations for block in range(below, n))
        step_feedback(its, state, below, iterations + k, stale)


if __name__ == "__main__":
    feedback.step_feedback = step_all
    sys.exit(arraytp(["run", *sys.argv[1:]]))

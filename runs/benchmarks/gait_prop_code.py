"""Train as the GP authors' code does where it differs from arraytp: FA's matrices, and the order of the images.

FA: B^n is the initial W^{n+1} wherever the two have the same shape. Order: a window of 1,000 images moves along a fixed
order, and the next image is drawn at random from the window (tf.data's `shuffle`).

    python runs/benchmarks/gait_prop_code.py CONFIG [--own-feedback] [--window 1000] [options of arraytp run]

`--own-feedback` leaves FA's matrices as arraytp draws them; `--window 0` shuffles all images, as arraytp does. A
streamed data set (`data.in_memory_mb`) keeps arraytp's order.
"""

import argparse
import sys
from dataclasses import replace
from functools import partial

import numpy as np

from arraytp.backend import Backend
from arraytp.cli import main as arraytp
from arraytp.data import loader
from arraytp.data.order import Rows
from arraytp.model.blocks import Network
from arraytp.rules import RULES, fa
from arraytp.rules.protocol import State
from arraytp.streams import stream


def next_weights(options: fa.Options, network: Network, seed: int, backend: Backend) -> State:
    """Return FA's state with B^n = W^{n+1} where the shapes agree."""
    state = fa.init_state(options, network, seed, backend)
    for n in range(1, len(network) - 1):
        if network.weights[n].shape == network.weights[n + 1].shape:
            state.weights[n] = network.weights[n + 1].copy()
    return state


def windowed_order(window: int, count: int, seed: int, epoch: int, *, shuffle: bool) -> Rows:
    """Shuffle in a window, replacing `arraytp.data.order.memory_order`: no image is more than `window` places early."""
    if not shuffle:
        return np.arange(count)
    waiting, draws = list(range(min(window, count))), stream(seed, "shuffle", epoch).random(count)
    order = np.empty(count, np.int64)
    for position, draw in enumerate(draws):
        place = int(draw * len(waiting))
        order[position] = waiting[place]
        waiting[place] = position + window
        if position + window >= count:
            waiting[place] = waiting[-1]
            waiting.pop()
    return order


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--own-feedback", action="store_true")
    parser.add_argument("--window", type=int, default=1000)
    given, rest = parser.parse_known_args()
    if given.window < 0:
        parser.error(f"--window {given.window}: give a number of images, or 0 for all")
    if not given.own_feedback:
        RULES["fa"] = replace(fa.RULE, init_state=next_weights)
    if given.window:
        loader.memory_order = partial(windowed_order, given.window)
    sys.exit(arraytp(["run", *rest]))

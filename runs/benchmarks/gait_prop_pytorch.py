"""Time a GAIT-prop step of fc-deep against PyTorch written like the authors' code, and against arraytp's own BP step.

The PyTorch side is float64, inverts every square weight matrix with torch.linalg.inv, and takes the gradients of the
local losses by autograd. A step is forward, targets, updates, orthogonality regulariser and Adam. Each side has a
process of its own and they take turns, as in compare_pytorch.py.

    python runs/benchmarks/gait_prop_pytorch.py [--rounds 5] [--steps 2] [--batch 256] [--threads 2] [--json FILE]
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

# Rule, form, dtype and λ of the regulariser; None is PyTorch.
SIDES = {
    "torch gp float64": None,
    "gp literal float64": ("gait-prop", "literal", "float64", 100.0),
    "gp difference float32": ("gait-prop", "difference", "float32", 100.0),
    "gp difference float32, no regulariser": ("gait-prop", "difference", "float32", 0.0),
    "bp float32": ("bp", None, "float32", 0.0),
    "bp float64": ("bp", None, "float64", 0.0),
}
HIDDEN, UNITS, INPUTS, CLASSES = 6, 1024, 3072, 10
LR, ETA, SLOPE, STRENGTH = 1.9e-5, 1e-7, 0.1, 100.0


def arraytp_step(side: str, batch: int, threads: int) -> Any:
    from ownstep import make_step

    from arraytp import options
    from arraytp.rules import gait_prop

    name, form, dtype, strength = SIDES[side]
    adam = options.Adam(lr=LR, epsilon=1e-6, epsilon_form="keras", orthogonality=strength)
    network = options.NetworkOptions(name="fc-deep", square=True)
    rule_options = gait_prop.Options(form=form) if form else None
    return make_step(network, adam, name, rule_options, batch=batch, init="orthogonal", dtype=dtype, reduction="sum",
                     threads=threads)  # fmt: skip


def torch_step(batch: int, threads: int) -> Any:
    """Normalised GP, Algorithm 1 line by line."""
    import torch
    from torch.nn.functional import cross_entropy, leaky_relu

    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    widths = [INPUTS, *[UNITS] * (HIDDEN + 1)]
    weights = [torch.nn.init.orthogonal_(torch.empty(i, o)) for i, o in itertools.pairwise(widths)]
    biases = [torch.zeros(UNITS) for _ in weights]
    theta = [parameter.requires_grad_() for pair in zip(weights, biases, strict=True) for parameter in pair]
    x, y = torch.rand(batch, INPUTS), torch.randint(0, CLASSES, (batch,))
    adam = torch.optim.Adam(theta, lr=LR, eps=1e-6)
    last = len(weights) - 1

    def layer(n: int, a: torch.Tensor) -> torch.Tensor:
        z = a @ weights[n] + biases[n]
        return z if n == last else leaky_relu(z, SLOPE)

    def step() -> float:
        adam.zero_grad()
        with torch.no_grad():
            inputs = [x]
            for n in range(len(weights)):
                inputs.append(layer(n, inputs[-1]))
        logits = inputs[-1][:, :CLASSES].clone().requires_grad_()
        loss = cross_entropy(logits, y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, logits)
        t = inputs[-1].clone()
        t[:, :CLASSES] -= 0.5 * gradient
        m = torch.ones(batch, 1)
        for n in reversed(range(len(weights))):
            a = layer(n, inputs[n])
            (m * (t - a).square()).sum().backward()
            if n == 0:
                break
            with torch.no_grad():
                gamma = ETA * UNITS**0.5 / (a - t).norm(dim=1, keepdim=True)
                m = m / gamma
                derivative = torch.ones_like(a) if n == last else torch.where(a < 0, SLOPE, 1.0)
                epsilon = gamma * derivative.square()
                moved = (1 - epsilon) * a + epsilon * t
                z = moved if n == last else torch.where(moved < 0, moved / SLOPE, moved)
                t = (z - biases[n]) @ torch.linalg.inv(weights[n])
        with torch.no_grad():
            for w in weights[1:]:
                w.grad += STRENGTH * 4 * (w @ w.T - torch.eye(UNITS)) @ w
        adam.step()
        return loss.item()

    return step


def worker(side: str, batch: int, threads: int, pipe: Connection) -> None:
    """Send the loss of a first step; then time as many steps as each number received, and send their seconds."""
    step = torch_step(batch, threads) if SIDES[side] is None else arraytp_step(side, batch, threads)
    pipe.send(step())
    while (count := pipe.recv()) > 0:
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        pipe.send(seconds)


def ratio(mine: list[list[float]], reference: list[list[float]]) -> float:
    """Return the median over the rounds of the ratio of medians: within a round, both sides saw the same machine."""
    return statistics.median(statistics.median(a) / statistics.median(b) for a, b in zip(mine, reference, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    seconds: dict[str, list[list[float]]] = {side: [] for side in SIDES}
    for side in SIDES:
        pipes[side], far = context.Pipe()
        context.Process(target=worker, args=(side, arguments.batch, arguments.threads, far), daemon=True).start()
        # Without a copy of the far end, this process gets an error when the worker fails.
        far.close()
        pipes[side].recv()
    for _ in range(arguments.rounds):
        for side in SIDES:
            pipes[side].send(arguments.steps)
            seconds[side].append(pipes[side].recv())
    for side in SIDES:
        pipes[side].send(0)
    medians = {side: 1e3 * statistics.median(itertools.chain(*rounds)) for side, rounds in seconds.items()}
    print(f"fc-deep, square, batch {arguments.batch}, {arguments.threads} threads\n")
    print(f"{'side':38} {'median ms':>9} {'min ms':>8} {'/ torch':>8} {'/ own bp':>8}")
    for side, rounds in seconds.items():
        own = "bp float64" if "64" in side else "bp float32"
        print(
            f"{side:38} {medians[side]:9.1f} {1e3 * min(itertools.chain(*rounds)):8.1f} "
            f"{ratio(rounds, seconds['torch gp float64']):8.2f} {ratio(rounds, seconds[own]):8.2f}"
        )
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(medians, file, indent=2)


if __name__ == "__main__":
    main()

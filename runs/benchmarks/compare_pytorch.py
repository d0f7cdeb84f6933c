"""Time arraytp's BP step against PyTorch eager: same network, batch, optimiser and threads, in one run.

Each side has a process of its own and they take turns, so that both see the same machine and neither's idle threads
disturb the other. A step is forward, loss, backward and optimiser. Prints a table; --json writes the figures.

    python runs/benchmarks/compare_pytorch.py [--networks lenet vgg] [--rounds 7] [--threads 2] [--json FILE]
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

CASES: dict[str, tuple[tuple[int, int, int], int]] = {
    "fc-shallow": ((32, 32, 3), 256),
    "fc-deep": ((32, 32, 3), 256),
    "lenet": ((32, 32, 3), 128),
    "vgg": ((32, 32, 3), 128),
}
CLASSES = 10
LR, MOMENTUM = 1e-3, 0.9


def arraytp_step(name: str, optimizer: str, threads: int) -> Any:
    from ownstep import make_step

    from arraytp import options

    shape, batch = CASES[name]
    settings = options.SGD(lr=LR, momentum=MOMENTUM) if optimizer == "sgd" else options.Adam(lr=LR)
    return make_step(options.NetworkOptions(name=name), settings, shape=shape, batch=batch, threads=threads)


def torch_step(name: str, optimizer: str, threads: int, channels_last: bool) -> Any:
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    (height, width, channels), batch = CASES[name]
    model = torch_model(name)
    x, y = torch.randn(batch, channels, height, width), torch.randint(0, CLASSES, (batch,))
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
        x = x.contiguous(memory_format=torch.channels_last)
    loss_function = torch.nn.CrossEntropyLoss()
    if optimizer == "sgd":
        rule: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    else:
        rule = torch.optim.Adam(model.parameters(), lr=LR)

    def step() -> float:
        rule.zero_grad()
        loss = loss_function(model(x), y)
        loss.backward()
        rule.step()
        return loss.item()

    return step


def torch_model(name: str) -> Any:
    from torch import nn

    layers: list[nn.Module] = []
    if name.startswith("fc-"):
        layers.append(nn.Flatten())
        width = 3072
        for _ in range(3 if name == "fc-shallow" else 6):
            layers += [nn.Linear(width, 1024), nn.LeakyReLU(0.1)]
            width = 1024
        layers.append(nn.Linear(width, CLASSES))
    elif name == "lenet":
        layers += [nn.Conv2d(3, 32, 5, padding=2), nn.ELU(), nn.MaxPool2d(3, 2, 1)]
        layers += [nn.Conv2d(32, 64, 5, padding=2), nn.ELU(), nn.MaxPool2d(3, 2, 1)]
        layers += [nn.Flatten(), nn.Linear(4096, 512), nn.ELU(), nn.Linear(512, CLASSES)]
    else:
        channels = 3
        for width in (128, 128, 256, 256, 512):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ELU(), nn.MaxPool2d(2, 2)]
            channels = width
        layers += [nn.Flatten(), nn.Linear(512, CLASSES)]
    return nn.Sequential(*layers)


def worker(side: str, name: str, optimizer: str, threads: int, pipe: Connection) -> None:
    """Time as many steps as each number received and send their seconds; for 0, send peak memory and growth in MB."""
    if side == "arraytp":
        step = arraytp_step(name, optimizer, threads)
    else:
        step = torch_step(name, optimizer, threads, channels_last=side.endswith("last"))
    before = rss_mb()
    step()
    while (count := pipe.recv()) > 0:
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
        pipe.send(seconds)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    pipe.send((peak, peak - before))


def rss_mb() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def compare(name: str, optimizer: str, rounds: int, steps: int, threads: int, sides: list[str]) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    pipes, seconds = {}, {side: [] for side in sides}
    for side in sides:
        pipes[side], far = context.Pipe()
        context.Process(target=worker, args=(side, name, optimizer, threads, far), daemon=True).start()
        # Without a copy of the far end, this process gets an error when the worker fails.
        far.close()
        pipes[side].send(1)
        pipes[side].recv()
    for _ in range(rounds):
        for side in sides:
            pipes[side].send(steps)
            seconds[side] += pipes[side].recv()
    figures: dict[str, Any] = {"network": name, "optimizer": optimizer, "batch": CASES[name][1], "threads": threads}
    for side in sides:
        pipes[side].send(0)
        peak, used = pipes[side].recv()
        figures[side] = {
            "median_ms": 1e3 * statistics.median(seconds[side]),
            "min_ms": 1e3 * min(seconds[side]),
            "peak_mb": peak,
            "step_mb": used,
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--optimizers", nargs="+", choices=["sgd", "adam"], default=["sgd", "adam"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--channels-last", action="store_true", help="time PyTorch in channels-last layout, too")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    sides = ["arraytp", "torch"] + (["torch channels-last"] if arguments.channels_last else [])
    print(
        f"{'network':11} {'optimizer':9} {'side':20} {'median ms':>9} {'min ms':>8} {'peak MB':>8} {'step MB':>8} ratio"
    )
    results = []
    for name in arguments.networks:
        for optimizer in arguments.optimizers:
            figures = compare(name, optimizer, arguments.rounds, arguments.steps, arguments.threads, sides)
            results.append(figures)
            for side in sides:
                f = figures[side]
                ratio = figures["arraytp"]["median_ms"] / f["median_ms"]
                print(
                    f"{name:11} {optimizer:9} {side:20} {f['median_ms']:9.1f} {f['min_ms']:8.1f} "
                    f"{f['peak_mb']:8.0f} {f['step_mb']:8.0f} {ratio:5.2f}",
                    flush=True,
                )
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()

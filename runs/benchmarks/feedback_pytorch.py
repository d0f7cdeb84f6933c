"""Time a training step of the rules with trained feedback against PyTorch eager, written the straightforward way.

The PyTorch side follows the published code: `randn_like`, module forward passes, autograd, one optimiser step per
iteration, the angle between ω and θ after each. Each side has a process of its own and they take turns.

    python runs/benchmarks/feedback_pytorch.py [--rule ldrl] [--network lenet] [--batch N] [--sides …] [--rounds 3]
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

# Images 32x32x3, 10 classes; batch, K and σ as in the DTP paper's Tables 6 to 9, learning rates small enough for noise.
SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("ldrl", "lenet"): {"batch": 100, "iterations": (41, 51, 24), "sigma": (0.42, 0.38, 0.14), "lr": 1e-4},
    ("ldrl", "vgg"): {"batch": 32, "iterations": (20, 30, 35, 55, 20), "sigma": (0.4, 0.4, 0.2, 0.2, 0.08), "lr": 1e-4},
    ("dtp", "lenet"): {"batch": 100, "iterations": (41, 51, 24), "sigma": (0.42, 0.38, 0.14), "lr": 1e-4},
    ("drl", "lenet"): {"batch": 190, "iterations": (24, 35, 36), "sigma": (0.01, 0.01, 0.01), "lr": 1e-4},
}
BETA, FORWARD_LR, MOMENTUM = 0.4655, 0.01, 0.9
# arraytp's rule by noise and in closed form, and its backpropagation; PyTorch's rule by noise and its backpropagation.
SIDES = ("noise", "closed form", "bp", "torch", "torch bp")


def arraytp_step(side: str, rule: str, network: str, batch: int, threads: int) -> Any:
    from ownstep import make_step

    from arraytp import options
    from arraytp.rules import RULES

    setting = SETTINGS[rule, network]
    sgd = options.SGD(lr=FORWARD_LR, momentum=MOMENTUM)
    net = options.NetworkOptions(name=network, activation="tanh" if rule == "drl" else None)
    if side == "bp":
        return make_step(net, sgd, batch=batch, threads=threads)
    optimizer = options.Adam(lr=setting["lr"]) if rule == "drl" else options.SGD(lr=setting["lr"], momentum=MOMENTUM)
    training = options.FeedbackTraining(iterations=setting["iterations"], sigma=setting["sigma"], optimizer=optimizer)
    special = {} if rule == "drl" else {"beta": BETA}
    if side == "closed form":
        special["expected"] = True
    return make_step(net, sgd, rule, RULES[rule].options(feedback=training, **special), batch=batch, threads=threads)


def torch_bp_step(network: str, rule: str, batch: int, threads: int) -> Any:
    import torch
    from torch import nn
    from torch.nn import functional

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    blocks = (_torch_lenet if network == "lenet" else _torch_vgg)(nn, nn.Tanh if rule == "drl" else nn.ELU)
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    sgd = torch.optim.SGD([p for b in blocks for p in b.affine.parameters()], lr=FORWARD_LR, momentum=MOMENTUM)

    def step() -> float:
        s = x
        for block in blocks:
            s, _ = block(s)
        sgd.zero_grad()
        loss = functional.cross_entropy(s, y)
        loss.backward()
        sgd.step()
        return float(loss.detach())

    return step


def torch_step(rule: str, network: str, batch: int, threads: int) -> Any:
    import torch
    from torch import nn
    from torch.nn import functional

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    setting = SETTINGS[rule, network]
    blocks = (_torch_lenet if network == "lenet" else _torch_vgg)(nn, nn.Tanh if rule == "drl" else nn.ELU)
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    forward_parameters = [p for block in blocks for p in block.affine.parameters()]
    sgd = torch.optim.SGD(forward_parameters, lr=FORWARD_LR, momentum=MOMENTUM)
    if rule == "drl":
        return _torch_drl_step(torch, functional, blocks, x, y, sgd, setting)
    feedback_sgd = [
        torch.optim.SGD(block.back.parameters(), lr=setting["lr"], momentum=MOMENTUM) for block in blocks[1:]
    ]

    def train_feedback(n: int, s: Any, s_next: Any, index: Any, sigma: float, optimizer: Any) -> None:
        block = blocks[n]
        epsilon = sigma * torch.randn_like(s)
        with torch.no_grad():
            noisy, noisy_index = block(s + epsilon)
        optimizer.zero_grad()
        if rule == "dtp":
            loss = ((s + epsilon - block.feedback(noisy, noisy_index, s.shape)) ** 2).sum() / len(s)
        else:
            eta = sigma * torch.randn_like(s_next)
            r = block.feedback(s_next, index, s.shape)
            r_epsilon = block.feedback(noisy, noisy_index, s.shape)
            r_eta = block.feedback(s_next + eta, index, s.shape)
            loss = (-2 * (epsilon * (r_epsilon - r)).sum() + ((r_eta - r) ** 2).sum()) / len(s)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            cosine = functional.cosine_similarity(block.back.weight.flatten(), block.paired().flatten(), dim=0)
            torch.rad2deg(torch.acos(cosine)).item()

    def step() -> float:
        with torch.no_grad():
            s, indices = [x], []
            for block in blocks:
                out, index = block(s[-1])
                s.append(out)
                indices.append(index)
        for n in range(1, len(blocks)):
            for _ in range(setting["iterations"][n - 1]):
                train_feedback(n, s[n], s[n + 1], indices[n], setting["sigma"][n - 1], feedback_sgd[n - 1])
        logits = s[-1].clone().requires_grad_()
        loss = functional.cross_entropy(logits, y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, logits)
        targets = [s[-1] - BETA * gradient]
        with torch.no_grad():
            for n in range(len(blocks) - 1, 0, -1):
                block, t = blocks[n], targets[0]
                back = block.feedback(t, indices[n], s[n].shape) - block.feedback(s[n + 1], indices[n], s[n].shape)
                targets.insert(0, s[n] + back)
        sgd.zero_grad()
        for n, block in enumerate(blocks):
            (0.5 * ((block(s[n])[0] - targets[n]) ** 2).sum() / len(x)).backward()
        sgd.step()
        return float(loss.detach()) / len(x)

    return step


def _torch_drl_step(torch: Any, functional: Any, blocks: Any, x: Any, y: Any, sgd: Any, setting: Any) -> Any:
    """Direct linear feedback from the logits to every hidden layer; targets and losses as in docs/math/dtp.md."""
    eta = 0.02
    with torch.no_grad():
        shapes, s = [], x
        for block in blocks[:-1]:
            s, _ = block(s)
            shapes.append(s[0].numel())
    direct = [torch.nn.Linear(10, size, bias=False) for size in shapes]
    adams = [torch.optim.Adam(layer.parameters(), lr=setting["lr"]) for layer in direct]

    def run_on(n: int, s: Any) -> Any:
        for block in blocks[n:]:
            s, _ = block(s)
        return s

    def step() -> float:
        with torch.no_grad():
            s = [x]
            for block in blocks:
                s.append(block(s[-1])[0])
        for n, layer in enumerate(direct):
            sigma = setting["sigma"][n]
            for _ in range(setting["iterations"][n]):
                epsilon = sigma * torch.randn_like(s[n + 1])
                with torch.no_grad():
                    moved = run_on(n + 1, s[n + 1] + epsilon)
                adams[n].zero_grad()
                hidden = s[n + 1].flatten(1)
                loss = ((layer(moved) + hidden - layer(s[-1]) - hidden - epsilon.flatten(1)) ** 2).mean() / sigma**2
                loss.backward()
                adams[n].step()
        logits = s[-1].clone().requires_grad_()
        loss = functional.cross_entropy(logits, y)
        (gradient,) = torch.autograd.grad(loss, logits)
        with torch.no_grad():
            output = s[-1] - eta * gradient
            targets = [
                (t.flatten(1) + layer(output) - layer(s[-1])).view_as(t)
                for t, layer in zip(s[1:-1], direct, strict=True)
            ]
        sgd.zero_grad()
        for n, (block, t) in enumerate(zip(blocks, [*targets, output], strict=True)):
            ((block(s[n])[0] - t) ** 2).mean().backward()
        sgd.step()
        return float(loss.detach())

    return step


def _torch_block(nn: Any, affine: Any, back: Any, activation: Any, pool: Any) -> Any:
    class Block(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.affine, self.back = affine, back
            self.activation = activation() if activation else nn.Identity()
            self.pool = nn.MaxPool2d(*pool, return_indices=True) if pool else None
            self.unpool = nn.MaxUnpool2d(*pool) if pool else None

        def forward(self, x: Any) -> Any:
            s = self.activation(self.affine(x.flatten(1) if isinstance(self.affine, nn.Linear) else x))
            return self.pool(s) if self.pool else (s, None)

        def feedback(self, t: Any, index: Any, shape: Any) -> Any:
            if self.unpool:
                t = self.unpool(t, index, output_size=shape[-2:])
            return self.back(self.activation(t)).view(shape)

        def paired(self) -> Any:
            """Return θ in the layout of the feedback weight."""
            weight = self.affine.weight
            return weight.T if isinstance(self.affine, nn.Linear) else weight

    return Block()


def _torch_lenet(nn: Any, activation: Any) -> list[Any]:
    pool = (3, 2, 1)
    return [
        _torch_block(nn, nn.Conv2d(3, 32, 5, 1, 2), None, activation, pool),
        _torch_block(nn, nn.Conv2d(32, 64, 5, 1, 2), nn.ConvTranspose2d(64, 32, 5, 1, 2), activation, pool),
        _torch_block(nn, nn.Linear(4096, 512), nn.Linear(512, 4096), activation, None),
        _torch_block(nn, nn.Linear(512, 10), nn.Linear(10, 512), None, None),
    ]


def _torch_vgg(nn: Any, activation: Any) -> list[Any]:
    blocks, before = [], 3
    for width in (128, 128, 256, 256, 512):
        back = nn.ConvTranspose2d(width, before, 3, 1, 1)
        blocks.append(_torch_block(nn, nn.Conv2d(before, width, 3, 1, 1), back, activation, (2, 2, 0)))
        before = width
    return [*blocks, _torch_block(nn, nn.Linear(512, 10), nn.Linear(10, 512), None, None)]


def _serve(connection: Connection, side: str, rule: str, network: str, batch: int, threads: int) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if side == "torch bp":
        step = torch_bp_step(network, rule, batch, threads)
    elif side == "torch":
        step = torch_step(rule, network, batch, threads)
    else:
        step = arraytp_step(side, rule, network, batch, threads)
    step()
    connection.send(None)
    while connection.recv():
        started = time.perf_counter()
        step()
        seconds = time.perf_counter() - started
        connection.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def main() -> None:
    """Print seconds per step and peak memory of every side, and the ratios of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", choices=sorted({rule for rule, _ in SETTINGS}), default="ldrl")
    parser.add_argument("--network", choices=sorted({network for _, network in SETTINGS}), default="lenet")
    parser.add_argument("--batch", type=int, help="Default: the paper's.")
    parser.add_argument("--sides", default=",".join(SIDES), help="Comma-separated, of: " + ", ".join(SIDES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    if (arguments.rule, arguments.network) not in SETTINGS:
        parser.error(f"no settings for {arguments.rule} on {arguments.network}")
    batch = arguments.batch or SETTINGS[arguments.rule, arguments.network]["batch"]
    sides = [side.strip() for side in arguments.sides.split(",")]
    if unknown := [side for side in sides if side not in SIDES]:
        parser.error(f"--sides: {unknown[0]!r} is none of {', '.join(SIDES)}")
    sides = [side for side in sides if not (side == "closed form" and arguments.rule == "dtp")]
    context = multiprocessing.get_context("spawn")
    connections = {}
    for side in sides:
        own, other = context.Pipe()
        settings = (other, side, arguments.rule, arguments.network, batch, arguments.threads)
        context.Process(target=_serve, args=settings, daemon=True).start()
        # Without a copy of the other end, this process gets an error when the worker fails.
        other.close()
        own.recv()
        connections[side] = own
    seconds: dict[str, list[float]] = {side: [] for side in connections}
    memory: dict[str, float] = {}
    for _ in range(arguments.rounds):
        for side, connection in connections.items():
            connection.send(True)
            took, memory[side] = connection.recv()
            seconds[side].append(took)
    for connection in connections.values():
        connection.send(False)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    print(
        f"{arguments.rule} {arguments.network}, batch {batch}, {arguments.threads} threads, {arguments.rounds} rounds"
    )
    for side, median in medians.items():
        ratios = ", ".join(f"{median / other:.3g} of {name}" for name, other in medians.items() if name != side)
        print(f"  {side:12s} {median:8.3f} s per step, peak memory {memory[side]:.0f} MiB; {ratios}")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"rule": arguments.rule, "network": arguments.network, "batch": batch, "seconds": medians,
                       "memory_mib": memory}, file, indent=2)  # fmt: skip


if __name__ == "__main__":
    main()

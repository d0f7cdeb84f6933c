"""Time the loader against a bare copy and conversion, PyTorch's DataLoader, and training steps.

Files are in the page cache. All parts of a run take turns, round by round, so that they see the same machine; the best
round counts. The images are random bytes in shards made for the run, because their content does not matter.

    python runs/benchmarks/data.py small|large [--rounds 3] [--threads N] [--json FILE]
    python runs/benchmarks/data.py torch [--rounds 3] [--json FILE]
    python runs/benchmarks/data.py steps [--json FILE]
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from arraytp.data.dataset import Dataset, open_dataset
from arraytp.data.loader import Loader
from arraytp.data.shards import range_checksum
from arraytp.data.writer import Description, writing

SETS = {"small": ((32, 32, 3), 51_200, 256), "large": ((224, 224, 3), 7_680, 32)}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AUGMENTED = {"flip": 0.5, "crop_padding": 4}
MODES = {"in memory": 2**32, "streamed": 0}
Job = Callable[[int], int]


def random_set(folder: Path, shape: tuple[int, int, int], count: int) -> Dataset:
    generator = np.random.default_rng(0)
    with writing(folder, Description("random", shape, ("a", "b"))) as writer:
        for start in range(0, count, 256):
            images = generator.integers(0, 256, (min(256, count - start), *shape), dtype=np.uint8)
            writer.add("train", images, generator.integers(0, 2, len(images)))
        writer.add("test", images, generator.integers(0, 2, len(images)))
    return open_dataset(folder)


def bare(dataset: Dataset, batch: int) -> Job:
    """Convert the images in stored order to float32, batch by batch, on one thread: no shuffling, no scaling."""
    images, _ = dataset.load("train")
    outs = [np.empty((batch, *dataset.shape), np.float32) for _ in range(4)]

    def job(_epoch: int) -> int:
        for number, start in enumerate(range(0, len(images), batch)):
            np.copyto(outs[number % 4], images[start : start + batch])
        return len(images)

    return job


def loading(dataset: Dataset, batch: int, threads: int | None, **options: Any) -> Job:
    # A pool much smaller than the set, so that most images are read while others are taken.
    pool = dataset.counts["train"] // 5
    loader = Loader(dataset, "train", batch, seed=0, shuffle=True, pool_images=pool, **options)
    if threads is not None:
        loader._threads = threads

    def job(epoch: int) -> int:
        with closing(loader.batches(epoch)) as batches:
            return sum(len(labels) for _, labels in batches)

    return job


def torch_loading(dataset: Dataset, batch: int, augment: bool) -> Job:
    """Load in the usual PyTorch way: a map-style data set that transforms image by image, with two worker processes."""
    import torch

    images, labels = dataset.load("train")
    pixels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))

    class Images(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(pixels)

        def __getitem__(self, row: int) -> tuple[Any, int]:
            x = pixels[row]
            if augment:
                x = x.flip(2) if torch.rand(()) < 0.5 else x
                top, left = torch.randint(0, 9, (2,)).tolist()
                x = torch.nn.functional.pad(x.float(), (4, 4, 4, 4), mode="replicate")
                x = x[:, top : top + pixels.shape[2], left : left + pixels.shape[3]]
            return (x.float() / 255 - mean) / std, int(labels[row])

    loader = torch.utils.data.DataLoader(Images(), batch, shuffle=True, num_workers=2, persistent_workers=True)

    def job(_epoch: int) -> int:
        return sum(len(y) for _, y in loader)

    return job


def take_turns(jobs: dict[str, Job], rounds: int) -> dict[str, dict[str, float]]:
    """Return each job's best images per second, and its CPU µs per image in that round (this process only)."""
    best: dict[str, dict[str, float]] = {name: {"images_per_s": 0.0, "cpu_us": 0.0} for name in jobs}
    for epoch in range(rounds):
        for name, job in jobs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            count = job(epoch)
            rate = count / (time.perf_counter() - wall)
            if rate > best[name]["images_per_s"]:
                best[name] = {"images_per_s": rate, "cpu_us": 1e6 * (time.process_time() - cpu) / count}
    return best


def loader_jobs(dataset: Dataset, batch: int, threads: int | None) -> Iterator[tuple[str, Job]]:
    normalised = {"mean": MEAN, "std": STD}
    for mode, in_memory in MODES.items():
        for name, options in (("normalised", normalised), ("flip, crop", normalised | AUGMENTED)):
            yield f"{mode}, {name}", loading(dataset, batch, threads, in_memory_bytes=in_memory, **options)


def checksum_us(dataset: Dataset) -> float:
    """Return the CPU time of a range's checksum per image, in microseconds; best of 50."""
    images, labels = dataset.read("train", 0, dataset.chunks("train")[0][1])
    seconds = []
    for _ in range(50):
        start = time.process_time_ns()
        range_checksum(images, labels)
        seconds.append(time.process_time_ns() - start)
    return min(seconds) / 1e3 / len(images)


# As in the configs of the papers: images of 224 x 224 are not augmented. GAIT-prop's network is square, in float64.
STEPS: dict[str, tuple[str, str, str | None, list[str], dict[str, Any]]] = {
    "vgg, bp": ("small", "runs/quickstart.yml", "bp", ["network.name=vgg", "train.batch_size=128"], AUGMENTED),
    "conv-imagenet, bp": (
        "large", "runs/quickstart.yml", "bp", ["network.name=conv-imagenet", "train.batch_size=32"], {},
    ),
    "conv-imagenet, gait-prop": ("large", "runs/gait-prop/imagenet-gp.yml", None, ["train.batch_size=32"], {}),
}  # fmt: skip


def steps() -> dict[str, dict[str, float]]:
    """Compare the loader's CPU time for a batch with that of a training step on the batch."""
    from arraytp.config import load_one
    from arraytp.training.build import build

    shares = {}
    for name, (size, path, variant, settings, augmentation) in STEPS.items():
        shape, count, _ = SETS[size]
        with tempfile.TemporaryDirectory() as folder:
            dataset = random_set(Path(folder) / "d", shape, count)
            config = load_one(path, [f"data.dataset={folder}/d", *settings], variant)
            step = step_ms(build(config))
            for mode, in_memory in MODES.items():
                options = {"mean": MEAN, "std": STD, "dtype": config.dtype, **augmentation}
                batch = config.train.batch_size
                job = {mode: loading(dataset, batch, None, in_memory_bytes=in_memory, **options)}
                load = take_turns(job, rounds=4)[mode]["cpu_us"] * batch / 1e3
                shares[f"{name}, {mode}"] = {"step_cpu_ms": step, "load_cpu_ms": load, "share": load / step}
                print(
                    f"{name + ', ' + mode:36} ms CPU: step {step:7.1f}, loader {load:6.2f} ({load / step:.2%})",
                    flush=True,
                )
    return shares


def step_ms(experiment: Any) -> float:
    with closing(experiment.train_loader.batches(0)) as batches:
        images, labels = next(batches)
    images, labels = images.copy(), labels.copy()
    times = []
    for _ in range(4):
        cpu = time.process_time()
        experiment.step(images, labels)
        times.append(1e3 * (time.process_time() - cpu))
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["small", "large", "torch", "steps"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of the loader; as many as it takes by itself unless given")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    if arguments.part == "steps":
        results: dict[str, Any] = steps()
    else:
        shape, count, batch = SETS["large" if arguments.part == "large" else "small"]
        with tempfile.TemporaryDirectory() as folder:
            dataset = random_set(Path(folder) / "d", shape, count)
            jobs = {"bare copy and convert": bare(dataset, batch)}
            jobs |= dict(loader_jobs(dataset, batch, arguments.threads))
            if arguments.part == "torch":
                jobs["PyTorch, normalised"] = torch_loading(dataset, batch, augment=False)
                jobs["PyTorch, flip, crop"] = torch_loading(dataset, batch, augment=True)
            results = take_turns(jobs, arguments.rounds)
            checksum = checksum_us(dataset)
        reference = results["bare copy and convert"]["images_per_s"]
        for name, f in results.items():
            share = f["images_per_s"] / reference
            print(f"{name:28} {f['images_per_s']:9,.0f} images/s {f['cpu_us']:8.2f} µs CPU  {share:5.2f} of bare")
        print(f"checksum {checksum:.2f} µs CPU an image")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()

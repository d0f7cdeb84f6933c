"""Time `arraytp data pack folder --size 224` against bare decoding, conversion and resizing of the same images.

The images are those of a tar archive split/class/image, repeated several times. Bare decoding reads them from memory,
on as many threads as packing. Both take turns; on a machine with other load, CPU time tells more than wall time.

    python runs/benchmarks/packing.py ARCHIVE [--times 8] [--rounds 5] [--json FILE]
"""

import argparse
import io
import json
import os
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from arraytp.data_prep.files import is_image
from arraytp.data_prep.folder import pack
from arraytp.data_prep.options import PackOptions

SIZE = 224


def contents(archive: str) -> dict[str, bytes]:
    files = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            file = tar.extractfile(member)
            if file is not None and is_image(member.name):
                files[member.name] = file.read()
    return files


def write_many(path: Path, images: dict[str, bytes], times: int) -> None:
    with tarfile.open(path, "w") as tar:
        for number in range(times):
            for name, content in images.items():
                member = tarfile.TarInfo(f"{name[: name.rindex('/')]}/{number}-{name.rpartition('/')[2]}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def bare(files: list[bytes], pool: ThreadPoolExecutor, workers: int) -> None:
    def decode(first: int) -> None:
        for content in files[first::workers]:
            image = Image.open(io.BytesIO(content)).convert("RGB")
            image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)

    list(pool.map(decode, range(workers)))


def timed(work: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive")
    parser.add_argument("--times", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    images = contents(arguments.archive)
    workers = len(os.sched_getaffinity(0))
    seconds: dict[str, list[tuple[float, float]]] = {"bare": [], "pack": []}
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(workers) as pool:
        source = Path(name) / "source.tar"
        write_many(source, images, arguments.times)
        files = list(images.values()) * arguments.times
        options = PackOptions(size=(SIZE, SIZE))
        for number in range(arguments.rounds):
            seconds["bare"].append(timed(lambda: bare(files, pool, workers)))
            target = Path(name) / str(number)
            seconds["pack"].append(timed(lambda target=target: pack(source, target, options)))
            shutil.rmtree(target)
    for side, times in seconds.items():
        print(f"{side}: {len(files) / min(wall for wall, _ in times):6.0f} images/s at best")
    shares = [
        statistics.median(b[kind] / p[kind] for b, p in zip(seconds["bare"], seconds["pack"], strict=True))
        for kind in (0, 1)
    ]
    print(f"of bare decoding, median of {arguments.rounds} pairs: {shares[0]:.0%} by time, {shares[1]:.0%} by CPU time")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(seconds, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()

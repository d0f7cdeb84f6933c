"""Compare ways to store images in HDF5, and JPEG: size, and images per second when chunks are read in random order.

Files are in the page cache. The images are those of a data set's train split. A chunk is what the loader reads at once:
256 images, or 8 of 224 × 224. Layouts take turns; the best of nine rounds counts. Needs hdf5plugin. JPEG has
quality 90, which changes pixels, and is decoded by Pillow on two threads.

    python runs/benchmarks/layouts.py DATASET [--images 10000] [--json FILE]
"""

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
from PIL import Image

from arraytp.data.dataset import open_dataset
from arraytp.data.shards import range_checksum

CHUNK_BYTES = 2**20
ROUNDS = 9
Read = Callable[[int, int, Any], None]


def filters(chunk: int) -> dict[str, dict[str, Any]]:
    """Return the options of each layout, for chunks of `chunk` images."""
    layouts: dict[str, dict[str, Any]] = {"contiguous, h5py": {}}
    for images in dict.fromkeys((1, max(2, chunk // 16), chunk, 4 * chunk)):
        layouts[f"chunks of {images}"] = {"chunks": images}
    for name, codec in (("LZ4", "lz4"), ("Zstd", "zstd")):
        layouts[f"Blosc2 {name}, chunks of {chunk}"] = {"chunks": chunk, **hdf5plugin.Blosc2(cname=codec, clevel=5)}
    layouts[f"gzip 4, chunks of {chunk}"] = {"chunks": chunk, "compression": "gzip", "compression_opts": 4}
    return layouts


def write(folder: Path, number: int, images: Any, options: dict[str, Any]) -> Path:
    path = folder / f"{number}.h5"
    options = dict(options)
    if "chunks" in options:
        options["chunks"] = (min(options["chunks"], len(images)), *images.shape[1:])
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        file.create_dataset("images", data=images, **options)
    return path


def through_h5py(path: Path) -> Read:
    stored = h5py.File(path)["images"]
    return lambda first, last, out: stored.read_direct(out, np.s_[first:last])


def at_offset(path: Path, image_bytes: int) -> Read:
    with h5py.File(path) as file:
        offset = file["images"].id.get_offset()
    raw = path.open("rb", buffering=0)

    def read(first: int, last: int, out: Any) -> None:
        raw.seek(offset + first * image_bytes)
        raw.readinto(out)

    return read


def mapped(path: Path, shape: tuple[int, ...]) -> Read:
    with h5py.File(path) as file:
        offset = file["images"].id.get_offset()
    rows = np.memmap(path, np.uint8, "r", offset, shape)
    return lambda first, last, out: np.copyto(out, rows[first:last])


def jpegs(images: Any) -> tuple[int, Read]:
    def encode(image: Any) -> bytes:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=90)
        return file.getvalue()

    files = [encode(image) for image in images]
    pool = ThreadPoolExecutor(2)

    def decode(first: int, out: Any) -> None:
        for row in range(len(out)):
            out[row] = Image.open(io.BytesIO(files[first + row]))

    def read(first: int, last: int, out: Any) -> None:
        half = (last - first) // 2
        list(pool.map(decode, (first, first + half), (out[:half], out[half:])))

    return sum(map(len, files)), read


def verified(read: Read, checksums: dict[int, int], labels: Any) -> Read:
    def read_and_check(first: int, last: int, out: Any) -> None:
        read(first, last, out)
        checksum = range_checksum(out, labels[first:last])
        if checksums.setdefault(first, checksum) != checksum:
            raise ValueError(f"rows {first} to {last - 1} are damaged")

    return read_and_check


def seconds(read: Read, starts: Any, chunk: int, count: int, out: Any) -> float:
    begin = time.perf_counter()
    for first in starts:
        last = min(first + chunk, count)
        read(first, last, out[: last - first])
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    dataset = open_dataset(arguments.dataset)
    images, labels = dataset.read("train", 0, min(arguments.images, dataset.counts["train"]))
    # A small set is repeated, because images that fit into the processor's caches would be read too fast.
    images = np.concatenate([images] * -(-arguments.images // len(images)))[: arguments.images]
    labels = np.resize(labels, len(images))
    chunk = min(256, max(8, CHUNK_BYTES // images[0].nbytes))
    with tempfile.TemporaryDirectory() as name:
        paths = {
            layout: write(Path(name), number, images, options)
            for number, (layout, options) in enumerate(filters(chunk).items())
        }
        reads = {layout: through_h5py(path) for layout, path in paths.items()}
        sizes = {layout: path.stat().st_size for layout, path in paths.items()}
        contiguous = paths["contiguous, h5py"]
        reads["contiguous, read at its offset"] = at_offset(contiguous, images[0].nbytes)
        reads["contiguous, memory map"] = mapped(contiguous, images.shape)
        reads["contiguous, at its offset, verified"] = verified(at_offset(contiguous, images[0].nbytes), {}, labels)
        size, reads["JPEG 90, 2 threads"] = jpegs(images)
        sizes["JPEG 90, 2 threads"] = size
        best = dict.fromkeys(reads, float("inf"))
        out = np.empty((chunk, *images.shape[1:]), np.uint8)
        starts = np.arange(0, len(images), chunk)
        for number in range(ROUNDS):
            order = np.random.default_rng(number).permutation(starts)
            for layout, read in reads.items():
                best[layout] = min(best[layout], seconds(read, order, chunk, len(images), out))
    results = {}
    for layout, time_taken in best.items():
        share = sizes.get(layout, sizes["contiguous, h5py"]) / images.nbytes
        rate, speed = len(images) / time_taken, images.nbytes / time_taken / 1e9
        results[layout] = {"images_per_s": rate, "gb_per_s": speed, "size": share}
        print(f"{layout:36} {rate:11,.0f} images/s {speed:6.2f} GB/s  size {share:.2f}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()

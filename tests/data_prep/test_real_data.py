"""Real archives, packed and compared with readers that share no code with the packers.

The environment variable ARRAYTP_REAL_DATA names the folder of the archives; tests of missing archives are skipped.
"""

import gzip
import hashlib
import io
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arraytp.cli import main
from arraytp.data.dataset import open_dataset

FOLDER = Path(os.environ.get("ARRAYTP_REAL_DATA", "nowhere"))
FASHION = Path("/usr/share/datasets/fashion-mnist")
pytestmark = pytest.mark.slow


def there(path):
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


def digest(label, image):
    return label, hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()


def packed_rows(folder):
    """Return a packed data set, and how often each (split, label, digest of the pixels) occurs in it."""
    dataset = open_dataset(folder)
    rows = Counter()
    for split, count in dataset.counts.items():
        for start in range(0, count, 1000):
            images, labels = dataset.read(split, start, min(start + 1000, count))
            rows.update((split, *digest(int(label), image)) for image, label in zip(images, labels, strict=True))
    return dataset, rows


def check_statistics(dataset):
    images, _ = dataset.load("train")
    pixels = images.reshape(-1, images.shape[3])
    for channel in range(pixels.shape[1]):
        values = pixels[:, channel] / np.float64(255)
        assert abs(values.mean() - dataset.mean[channel]) < 1e-12
        assert abs(values.std() - dataset.std[channel]) < 1e-12


def idx(path):
    content = gzip.decompress(path.read_bytes())
    dimensions = content[3]
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
    return np.frombuffer(content[4 + 4 * dimensions :], np.uint8).reshape(shape)


def idx_rows(folder):
    rows = Counter()
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = idx(folder / f"{prefix}-images-idx3-ubyte.gz"), idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
        rows.update((split, *digest(int(label), image)) for image, label in zip(images, labels, strict=True))
    return rows


@pytest.mark.parametrize("source", ["mnist", "fashion-mnist"])
def test_mnist_and_fashion_mnist(tmp_path, source):
    src = FASHION
    if source == "mnist":
        src = tmp_path / "s"
        with tarfile.open(there(FOLDER / "mnist-idx.tar")) as tar:
            tar.extractall(src, filter="data")
    assert main(["data", "pack", source, str(there(src)), str(tmp_path / "d")]) == 0
    dataset, rows = packed_rows(tmp_path / "d")
    assert dataset.counts == {"train": 60000, "test": 10000}
    assert rows == idx_rows(src)
    check_statistics(dataset)


def tar_rows(path, size):
    """Count an archive's images like `packed_rows`, decoded by Pillow; also return class labels. `size` is (H, W)."""
    rows, classes = Counter(), set()
    with tarfile.open(path) as tar:
        for member in tar:
            if not member.name.endswith((".jpg", ".JPEG", ".png")):
                continue
            split, name, _ = member.name.split("/")
            image = Image.open(io.BytesIO(tar.extractfile(member).read()))
            # EXIF orientation 6: the image is stored rotated by 90°.
            image = image.rotate(-90, expand=True) if image.getexif().get(274) == 6 else image
            image = image.convert("RGB")
            image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR) if size else image
            rows[(split, *digest(name, np.asarray(image)))] += 1
            classes.add(name)
    labels = {name: label for label, name in enumerate(sorted(classes))}
    return Counter({(split, labels[name], found): count for (split, name, found), count in rows.items()}), labels


@pytest.mark.parametrize(
    ("archive", "source", "options", "size", "counts"),
    [
        ("cifar10-png.tar.xz", "folder", [], None, {"train": 50000, "test": 10000}),
        ("cifar10-jpeg.tar.xz", "folder", [], None, {"train": 50000, "test": 10000}),
        ("tiny-imagenet-100.tar.xz", "folder", [], None, {"train": 20000, "val": 5000}),
        ("tiny-imagenet-100.tar.xz", "folder", ["--size=32"], (32, 32), {"train": 20000, "val": 5000}),
        ("imagenet-sample.tar", "imagenet", [], (224, 224), {"train": 125}),
    ],
)
def test_archives_of_image_files(tmp_path, archive, source, options, size, counts):
    path = there(FOLDER / archive)
    assert main(["data", "pack", source, str(path), str(tmp_path / "d"), *options]) == 0
    dataset, rows = packed_rows(tmp_path / "d")
    expected, labels = tar_rows(path, size)
    assert dataset.counts == counts
    assert dataset.classes == tuple(labels)
    assert rows == expected
    check_statistics(dataset)

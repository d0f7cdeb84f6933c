"""The data set that comes with the package, compared with the official files if their Debian package is installed."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

import arraytp.data
from arraytp.data.dataset import embedded_names, open_dataset

OFFICIAL = Path("/usr/share/datasets/fashion-mnist")
EMBEDDED = Path(arraytp.data.__file__).parent / "embedded"


@pytest.fixture(scope="module")
def dataset():
    return open_dataset("fashion-mnist-10k")


def test_it_has_the_stated_counts_evenly_by_class(dataset):
    assert embedded_names() == ("fashion-mnist-10k",)
    assert dataset.counts == {"train": 10000, "test": 2000}
    for split, each in (("train", 1000), ("test", 200)):
        images, labels = dataset.load(split)
        assert images.shape == (10 * each, 28, 28, 1)
        assert np.bincount(labels).tolist() == [each] * 10


def test_its_name_means_it_where_a_folder_has_the_same(dataset, tiny, tmp_path, monkeypatch):
    """A config with this name trains on the same images everywhere."""
    (tmp_path / dataset.name).symlink_to(tiny.folder)
    monkeypatch.chdir(tmp_path)
    assert open_dataset(dataset.name).digest == dataset.digest
    assert open_dataset(f"./{dataset.name}").digest == tiny.digest


def test_it_is_whole_and_under_six_megabytes_with_its_licence(dataset):
    assert list(dataset.problems()) == []
    assert sum(path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file()) < 6e6
    licence = (EMBEDDED / "LICENSE-fashion-mnist.txt").read_text()
    assert "Copyright (c) 2017 Zalando SE, https://tech.zalando.com" in licence
    assert "Permission is hereby granted, free of charge" in licence


def test_its_train_images_are_shuffled(dataset):
    labels = dataset.load("train")[1]
    # A tenth of neighbouring images have the same class; 0.012 is four standard deviations of that share.
    assert abs(np.mean(labels[1:] == labels[:-1]) - 0.1) < 0.012


def test_its_statistics_are_those_of_its_train_images(dataset):
    images = dataset.load("train")[0] / 255
    np.testing.assert_allclose(dataset.mean, [images.mean()], rtol=1e-12)
    np.testing.assert_allclose(dataset.std, [images.std()], rtol=1e-12)


def official(prefix):
    """Read image bytes and labels from two official files without using arraytp."""
    with gzip.open(OFFICIAL / f"{prefix}-labels-idx1-ubyte.gz") as file:
        assert struct.unpack(">2B2B", file.read(4)) == (0, 0, 8, 1)
        (count,) = struct.unpack(">I", file.read(4))
        labels = list(file.read())
    with gzip.open(OFFICIAL / f"{prefix}-images-idx3-ubyte.gz") as file:
        assert struct.unpack(">2B2B3I", file.read(16)) == (0, 0, 8, 3, count, 28, 28)
        images = [file.read(784) for _ in range(count)]
    return images, labels


@pytest.mark.skipif(not OFFICIAL.is_dir(), reason=f"needs the Debian package dataset-fashion-mnist ({OFFICIAL})")
@pytest.mark.parametrize(("split", "prefix", "each"), [("train", "train", 1000), ("test", "t10k", 200)])
def test_it_is_the_first_official_images_of_each_class(dataset, split, prefix, each):
    official_images, official_labels = official(prefix)
    expected, taken = [], [0] * 10
    for image, label in zip(official_images, official_labels, strict=True):
        if taken[label] < each:
            taken[label] += 1
            expected.append((image, label))
    images, labels = dataset.load(split)
    found = [(image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)]
    assert sorted(found) == sorted(expected)
    if split == "test":
        assert found == expected


def test_one_known_image_looks_right(dataset):
    """The first test image is an ankle boot: toe low on the left, shaft high on the right."""
    images, labels = dataset.load("test")
    boot = images[0, :, :, 0]
    assert dataset.classes[labels[0]] == "Ankle boot"
    assert boot[:7].max() == boot[22:].max() == 0
    assert boot[8:12, :10].max() == 0
    assert boot[10:13, 18:24].min() > 50
    assert boot[19:21, 1:12].min() > 50

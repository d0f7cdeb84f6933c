"""Images held out for validation: which ones, how many of each class, and that both parts are read correctly."""

import shutil

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arraytp.data.dataset import open_dataset
from arraytp.data.division import divide, held_out
from arraytp.data.loader import Loader
from arraytp.data.writer import Description, writing
from arraytp.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 train images whose pixels all equal their row number, in shards of 7."""
    path = tmp_path_factory.mktemp("held") / "data"
    with writing(path, Description("rows", (3, 2, 1), ("a", "b", "c")), shard_images=7) as writer:
        for split, count in (("train", 40), ("test", 5)):
            images = np.repeat(np.arange(count, dtype=np.uint8), 6).reshape(count, 3, 2, 1)
            writer.add(split, images, np.arange(count) % 5 % 3)
    return path


@given(labels=st.lists(st.integers(0, 4), min_size=2, max_size=60), data=st.data())
def test_so_many_rows_are_held_out_and_of_every_class_its_share(labels, data):
    """A class's share that is not a whole number is rounded up or down."""
    count = data.draw(st.integers(1, len(labels) - 1))
    rows = held_out(np.array(labels), count)
    assert len(set(rows.tolist())) == len(rows) == count
    assert rows.tolist() == sorted(rows)
    share = count * np.bincount(labels) / len(labels)
    assert (np.abs(np.bincount(np.array(labels)[rows], minlength=len(share)) - share) < 1).all()


def test_the_rows_are_those_of_always():
    """Pinned, so that runs of all versions are tuned on the same held-out images."""
    assert held_out(np.arange(30) % 3, 6).tolist() == PINNED


PINNED = [4, 5, 12, 27, 28, 29]


def test_the_rows_are_drawn_and_not_the_first_or_last():
    rows = held_out(np.zeros(1000, np.int64), 500)
    assert 0.4 < (rows < 500).mean() < 0.6


def test_more_rows_keep_those_of_fewer():
    labels = np.arange(40) % 4
    assert set(held_out(labels, 8)) < set(held_out(labels, 20))


@pytest.mark.parametrize("count", [1, 9, 39])
def test_the_parts_have_every_image_once_with_its_label(folder, count):
    dataset = open_dataset(folder)
    division = divide(dataset, count)
    assert division.counts == {"train": 40 - count, "validation": count}
    found = {}
    for split, rows in division.rows.items():
        images, labels = division.load(split)
        assert images[:, 0, 0, 0].tolist() == rows.tolist()
        assert labels.tolist() == (rows % 5 % 3).tolist()
        found |= dict(zip(rows.tolist(), labels.tolist(), strict=True))
        for start, stop in division.chunks(split):
            np.testing.assert_array_equal(division.read(split, start, stop)[0], images[start:stop])
    assert sorted(found) == list(range(40))


@pytest.mark.parametrize("memory", [0, 2**20])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_epoch_in_memory_or_streamed_takes_each_image_of_a_part_once(folder, split, memory):
    division = divide(open_dataset(folder), 12)
    loader = Loader(division, split, 5, seed=1, shuffle=True, in_memory_bytes=memory, pool_images=10)
    assert loader.streamed == (memory == 0)
    seen = np.concatenate([np.round(images[:, 0, 0, 0] * 255) for images, _ in loader.batches(3)])
    assert sorted(seen.tolist()) == division.rows[split].tolist()


def test_large_images_are_read_only_near_those_that_are_wanted(tmp_path):
    """A checksum range of 1 MiB holds two of these images; reading 2 of 30 images must skip most ranges."""
    shape = (600, 800, 1)
    with writing(tmp_path / "data", Description("large", shape, ("a",))) as writer:
        for split in ("train", "test"):
            writer.add(split, np.zeros((30, *shape), np.uint8), np.zeros(30, np.int64))
    dataset, read = open_dataset(tmp_path / "data"), []
    division = divide(dataset, 2)
    original = type(dataset).read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(dataset), "read", lambda *call: read.append(call[3] - call[2]) or original(*call))
        division.load("validation")
    assert sum(read) < 12


@pytest.mark.parametrize("label", [3, -1, 2**40, 2**62])
def test_a_damaged_label_is_told_as_where_it_is_read(folder, tmp_path, label):
    shutil.copytree(folder, tmp_path / "data")
    with h5py.File(tmp_path / "data" / "train-00002.h5", "r+") as file:
        file["labels"][4] = label
    with pytest.raises(UserError, match=rf"train-00002\.h5: row 4 has label {label}, expected 0 to 2"):
        divide(open_dataset(tmp_path / "data"), 5)

import threading
import time
from contextlib import closing, contextmanager

import h5py
import numpy as np
import pytest
import strict_device
from hypothesis import given, settings
from hypothesis import strategies as st

from arraytp.backend import Backend
from arraytp.data import augment, shards
from arraytp.data.loader import Loader
from arraytp.errors import UserError

IN_MEMORY, STREAMED = 2**32, 0
modes = pytest.mark.parametrize("in_memory_bytes", [IN_MEMORY, STREAMED], ids=["in-memory", "streamed"])


def copies(batches):
    """Copy batches, because the loader reuses its arrays."""
    return [(images.copy(), labels.copy()) for images, labels in batches]


def equal(some, others):
    return len(some) == len(others) and all(
        np.array_equal(a, c) and np.array_equal(b, d) for (a, b), (c, d) in zip(some, others, strict=True)
    )


@settings(max_examples=25, deadline=None)
@given(
    batch_size=st.integers(1, 700),
    in_memory_bytes=st.sampled_from([IN_MEMORY, STREAMED]),
    pool_images=st.sampled_from([1, 260, 10**6]),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_an_epoch_takes_every_image_once_with_its_label(
    tiny, row_numbers, batch_size, in_memory_bytes, pool_images, shuffle, epoch
):
    loader = Loader(
        tiny,
        "train",
        batch_size,
        seed=1,
        shuffle=shuffle,
        in_memory_bytes=in_memory_bytes,
        pool_images=pool_images,
        dtype=np.float64,
    )
    batches = copies(loader.batches(epoch))
    assert loader.streamed == (in_memory_bytes == STREAMED)
    assert len(batches) == loader.steps_per_epoch == -(-600 // batch_size)
    assert all(len(images) == len(labels) == batch_size for images, labels in batches[:-1])
    rows = [row for images, _ in batches for row in row_numbers(images)]
    assert sorted(rows) == list(range(600))
    assert (rows == list(range(600))) == (not shuffle)
    images, labels = tiny.load("train")
    assert np.array_equal(np.concatenate([batch[1] for batch in batches]), labels[rows])
    np.testing.assert_allclose(np.concatenate([batch[0] for batch in batches]), images[rows] / 255, rtol=1e-15)


@settings(max_examples=25, deadline=None)
@given(
    batch_size=st.sampled_from([7, 100, 256, 600]),
    in_memory_bytes=st.sampled_from([IN_MEMORY, STREAMED]),
    pool_images=st.sampled_from([1, 260]),
    data=st.data(),
)
def test_an_epoch_entered_later_goes_on_with_the_same_batches(tiny, batch_size, in_memory_bytes, pool_images, data):
    loader = Loader(
        tiny,
        "train",
        batch_size,
        seed=1,
        shuffle=True,
        flip=0.5,
        crop_padding=2,
        mean=tiny.mean,
        std=tiny.std,
        in_memory_bytes=in_memory_bytes,
        pool_images=pool_images,
    )
    start = data.draw(st.integers(0, loader.steps_per_epoch))
    assert equal(copies(loader.batches(2, start)), copies(loader.batches(2))[start:])


@settings(max_examples=12, deadline=None)
@given(
    batch_size=st.integers(1, 300),
    ranks=st.integers(1, 5),
    in_memory_bytes=st.sampled_from([IN_MEMORY, STREAMED]),
    pool_images=st.sampled_from([1, 260]),
    start=st.integers(0, 2),
)
def test_the_ranks_share_every_batch(tiny, batch_size, ranks, in_memory_bytes, pool_images, start):
    def batches(share):
        loader = Loader(
            tiny,
            "train",
            batch_size,
            seed=1,
            shuffle=True,
            flip=0.5,
            crop_padding=2,
            in_memory_bytes=in_memory_bytes,
            pool_images=pool_images,
            share=share,
        )
        assert loader.steps_per_epoch == -(-600 // batch_size)
        return copies(loader.batches(2, start))

    whole = batches((0, 1))
    parts = [batches((rank, ranks)) for rank in range(ranks)]
    joined = [tuple(map(np.concatenate, zip(*batch, strict=True))) for batch in zip(*parts, strict=True)]
    assert equal(joined, whole)
    for batch in zip(*parts, strict=True):
        sizes = [len(labels) for _, labels in batch]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_a_rank_reads_the_checksum_ranges_of_its_own_rows_alone_and_once(
    tmp_path, pack, row_numbers, monkeypatch, ranks, shuffle
):
    monkeypatch.setattr(shards, "RANGE_BYTES", 240)
    dataset, read = pack(tmp_path / "d"), []
    reader = shards._reader

    @contextmanager
    def counted(shard):
        first_row = 250 * int(shard.path.stem[-5:])
        with reader(shard) as rows:
            yield lambda first, last, out: (read.append(first_row + first), rows(first, last, out))

    monkeypatch.setattr(shards, "_reader", counted)
    for rank in range(ranks):
        read.clear()
        options = {"seed": 1, "shuffle": shuffle, "in_memory_bytes": 0, "pool_images": 260, "share": (rank, ranks)}
        batches = copies(Loader(dataset, "train", 24, **options).batches(0, 1))
        own = {row - row % 250 % 4 for images, _ in batches for row in row_numbers(images)}
        assert sorted(read) == sorted(own)


@modes
def test_the_order_does_not_depend_on_the_batch_size(tiny, row_numbers, in_memory_bytes):
    orders = []
    for size in (1, 64, 600):
        loader = Loader(tiny, "train", size, seed=0, shuffle=True, flip=0.5, in_memory_bytes=in_memory_bytes)
        orders.append(np.concatenate([images for images, _ in copies(loader.batches(0))]))
    assert np.array_equal(orders[0], orders[1])
    assert np.array_equal(orders[0], orders[2])


@modes
def test_epochs_and_seeds_differ_and_repeat(tiny, in_memory_bytes):
    def epoch(seed, number):
        loader = Loader(tiny, "train", 50, seed=seed, shuffle=True, flip=0.5, in_memory_bytes=in_memory_bytes)
        return copies(loader.batches(number))

    assert equal(epoch(1, 0), epoch(1, 0))
    assert not equal(epoch(1, 0), epoch(1, 1))
    assert not equal(epoch(1, 0), epoch(2, 0))


@modes
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("flip", "padding"), [(0, 0), (0.5, 0), (0, 2), (0.5, 2)])
def test_batches_are_augmented_and_normalised_as_defined(tiny, in_memory_bytes, dtype, flip, padding):
    options = {"seed": 3, "in_memory_bytes": in_memory_bytes, "shuffle": False}
    loader = Loader(
        tiny, "train", 128, flip=flip, crop_padding=padding, mean=tiny.mean, std=tiny.std, dtype=dtype, **options
    )
    images, labels = tiny.load("train")
    draws = augment.draw(3, 1, 600, flip, padding)
    images = augment.crop_images(augment.flip_images(images, draws.flips), draws.rows, draws.columns, padding)
    expected = (images / 255 - np.array(tiny.mean)) / np.array(tiny.std)
    batches = copies(loader.batches(1))
    assert {batch[0].dtype for batch in batches} == {np.dtype(dtype)}
    assert {batch[1].dtype for batch in batches} == {np.dtype(np.int64)}
    np.testing.assert_allclose(
        np.concatenate([batch[0] for batch in batches]), expected, atol=16 * np.finfo(dtype).eps, rtol=0
    )
    assert np.array_equal(np.concatenate([batch[1] for batch in batches]), labels)


AUGMENTED = {"seed": 3, "shuffle": True, "flip": 0.5, "crop_padding": 2}


@modes
def test_what_a_device_computes_equals_the_host(tiny, in_memory_bytes):
    options = {**AUGMENTED, "mean": tiny.mean, "std": tiny.std, "in_memory_bytes": in_memory_bytes}
    host = Loader(tiny, "train", 64, **options)
    device = Loader(tiny, "train", 64, backend=Backend("strict", strict_device), **options)
    for start in (0, 2):
        # All batches are kept: on a device, their memory is not reused.
        found = list(device.batches(1, start))
        assert {images.dtype for images, _ in found} == {np.dtype(np.float32)}
        assert equal([tuple(map(strict_device.asnumpy, batch)) for batch in found], copies(host.batches(1, start)))


@pytest.fixture
def streams(monkeypatch):
    """Collect the streams that are created on the test double of a device."""
    made = []

    class Stream(strict_device.Stream):
        def __init__(self, *arguments, **keywords):
            super().__init__(*arguments, **keywords)
            made.append(self)

    monkeypatch.setattr(strict_device.cuda, "Stream", Stream)
    return made


def test_a_copy_to_the_device_waits_for_what_uses_its_place_and_for_nothing_else(tiny, streams):
    device = Loader(tiny, "train", 64, backend=Backend("strict", strict_device), **AUGMENTED)
    before = strict_device.reads.total()
    steps = len(list(device.batches(0)))
    assert len(streams) == 1
    # For each batch, the copies of images and labels each wait until their device memory is free.
    assert streams[0].waited == 2 * steps * [strict_device.current_stream]
    assert strict_device.reads.total() == before


def test_an_epoch_that_is_left_early_leaves_no_copy_on_its_way(tiny, streams):
    """A copy still in progress could overwrite memory that has been reused by then."""
    device = Loader(tiny, "train", 8, backend=Backend("strict", strict_device), **AUGMENTED)
    for epoch in range(2):
        with closing(device.batches(epoch)) as batches:
            next(batches)
            # Until images and labels of the requested batch, and of some later ones, are being copied.
            while len(streams[0]._work) < 6 * (epoch + 1):
                time.sleep(0.001)
        assert streams[0]._done == len(streams[0]._work)
    assert len(streams) == 1


def test_batches_go_round_in_four_buffers(tiny):
    loader = Loader(tiny, "train", 10, seed=0, shuffle=True)
    places = [images.__array_interface__["data"][0] for images, _ in loader.batches(0)]
    assert len(places) == 60
    assert len(set(places)) <= 4


@modes
def test_an_epoch_works_in_the_memory_of_the_one_before(tiny, in_memory_bytes):
    def loader():
        return Loader(tiny, "train", 10, seed=0, shuffle=True, in_memory_bytes=in_memory_bytes, pool_images=600)

    fresh = [copies(loader().batches(epoch)) for epoch in range(2)]
    used = loader()
    *_, last = used.batches(0)
    buffers, pools = list(used._spare_buffers), list(used._spare_memory)
    assert (len(buffers), len(pools)) == (3, used.streamed)
    assert equal(copies(used.batches(1)), fresh[1])
    assert sum(any(buffer is other for other in used._spare_buffers) for buffer in buffers) >= 2
    assert all(memory.images is before.images for memory, before in zip(used._spare_memory, pools, strict=True))
    # The last batch of an epoch stays valid: the next epoch does not reuse its memory.
    assert equal([last], fresh[0][-1:])


@modes
def test_two_epochs_at_once_share_no_memory(tiny, in_memory_bytes):
    def loader():
        return Loader(tiny, "train", 10, seed=0, shuffle=True, in_memory_bytes=in_memory_bytes, pool_images=600)

    used = loader()
    list(used.batches(0))
    found = [(copies([a])[0], copies([b])[0]) for a, b in zip(used.batches(1), used.batches(2), strict=True)]
    for epoch, batches in enumerate(zip(*found, strict=True), 1):
        assert equal(batches, copies(loader().batches(epoch)))


@modes
def test_leaving_the_loop_early_leaves_no_thread(tiny, in_memory_bytes):
    loader = Loader(tiny, "train", 10, seed=0, shuffle=True, in_memory_bytes=in_memory_bytes)
    with closing(loader.batches(0)) as batches:
        next(batches)
    assert [thread for thread in threading.enumerate() if thread.name.startswith("arraytp-loader")] == []


def test_damage_is_reported_before_any_batch_in_memory(tmp_path, pack):
    dataset = pack(tmp_path / "d")
    with h5py.File(dataset.folder / "train-00002.h5", "r+") as file:
        file["images"][99] ^= 1
    with pytest.raises(UserError, match=r"train-00002.h5: rows 0 to 99 do not match"):
        Loader(dataset, "train", 10, seed=0, shuffle=True)


def test_damage_met_while_streaming_stops_the_epoch_before_the_damaged_rows(tmp_path, pack, row_numbers):
    dataset = pack(tmp_path / "d")
    with h5py.File(dataset.folder / "train-00002.h5", "r+") as file:
        file["images"][99] ^= 1
    loader = Loader(dataset, "train", 10, seed=0, shuffle=False, in_memory_bytes=0, pool_images=1)
    seen = []

    def consume():
        for images, _ in loader.batches(0):
            seen.extend(row_numbers(images))

    with pytest.raises(UserError, match=r"train-00002.h5: rows 0 to 99 do not match"):
        consume()
    assert seen == list(range(len(seen)))
    assert 0 < len(seen) <= 500


def test_a_damaged_header_is_reported_before_streaming_begins(tmp_path, pack):
    dataset = pack(tmp_path / "d")
    path = dataset.folder / "train-00001.h5"
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train-00001.h5"):
        Loader(dataset, "train", 10, seed=0, shuffle=True, in_memory_bytes=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mean": (0.5,)}, "1 values of mean, expected 3"),
        ({"std": (0.5, 0.5)}, "2 values of std, expected 3"),
        ({"std": (0.5, 0.5, 0.0)}, "expected numbers above 0"),
        ({"mean": (0.5, 0.5, float("nan"))}, "expected finite numbers"),
    ],
)
def test_a_normalisation_that_cannot_be_is_refused(tiny, options, message):
    with pytest.raises(UserError, match=message):
        Loader(tiny, "train", 10, seed=0, shuffle=True, **options)


def test_an_unknown_split_is_refused(tiny):
    with pytest.raises(UserError, match="no split 'val'"):
        Loader(tiny, "val", 10, seed=0, shuffle=True)


def test_a_start_outside_the_epoch_is_a_programming_error(tiny):
    loader = Loader(tiny, "train", 100, seed=0, shuffle=True)
    assert list(loader.batches(0, 6)) == []
    for start in (-1, 7):
        with pytest.raises(ValueError, match="of an epoch with 6"):
            loader.batches(0, start)

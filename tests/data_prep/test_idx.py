"""IDX files in the exact official layout, good and bad."""

import gzip
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arraytp.cli import main
from arraytp.data.dataset import open_dataset
from arraytp.data_prep.idx import pack, read_idx
from arraytp.data_prep.options import PackOptions, chosen_rows, take_evenly
from arraytp.errors import UserError

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx_bytes(array):
    return struct.pack(f">2x2B{array.ndim}I", 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def official(train=50, test=20):
    """The contents of the four files; labels are 0 to 9 in turn, and 0 for the last ten images."""
    generator = np.random.default_rng(0)
    contents = {}
    for prefix, count in (("train", train), ("t10k", test)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.where(np.arange(count) < count - 10, np.arange(count) % 10, 0)
        contents[f"{prefix}-images-idx3-ubyte"] = idx_bytes(images)
        contents[f"{prefix}-labels-idx1-ubyte"] = idx_bytes(labels)
    return contents


def write(folder, contents, *, dot=False, zipped=False):
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        spelled = name.replace("-idx", ".idx") if dot else name
        if zipped:
            (folder / f"{spelled}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / spelled).write_bytes(content)
    return folder


def arrays(contents, prefix):
    images = np.frombuffer(contents[f"{prefix}-images-idx3-ubyte"], np.uint8, offset=16).reshape(-1, 28, 28, 1)
    return images, np.frombuffer(contents[f"{prefix}-labels-idx1-ubyte"], np.uint8, offset=8)


@pytest.mark.parametrize("dot", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("source", ["mnist", "fashion-mnist", "kmnist"])
def test_all_images_are_packed_with_their_labels(tmp_path, source, dot, zipped):
    contents = official()
    src = write(tmp_path / "src", contents, dot=dot, zipped=zipped)
    pack(source, src, tmp_path / "d", PackOptions(limits={}))
    dataset = open_dataset(tmp_path / "d")
    assert (dataset.name, dataset.shape, len(dataset.classes)) == (source, (28, 28, 1), 10)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = arrays(contents, prefix)
        packed_images, packed_labels = dataset.load(split)
        expected = sorted((image.tobytes(), label) for image, label in zip(images, labels, strict=True))
        found = [(image.tobytes(), label) for image, label in zip(packed_images, packed_labels, strict=True)]
        assert sorted(found) == expected
        in_order = [image.tobytes() for image in images] == [image for image, _ in found]
        assert in_order == (split == "test")


def test_the_seed_decides_the_order_of_the_train_images_only(tmp_path):
    src = write(tmp_path / "src", official())
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pack("mnist", src, tmp_path / name, PackOptions(limits={}, seed=seed, shard_images=20))
    a, b, c = (open_dataset(tmp_path / name) for name in "abc")
    assert [shard.count for shard in a.manifest.splits["train"].shards] == [20, 20, 10]
    assert a.manifest == b.manifest
    assert not np.array_equal(a.load("train")[1], c.load("train")[1])
    assert np.array_equal(a.load("test")[0], c.load("test")[0])


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.data())
def test_limits_are_taken_as_evenly_as_the_classes_allow_and_first_in_the_file(labels, data):
    labels = np.array(labels)
    limit = data.draw(st.integers(1, len(labels)))
    rows = take_evenly(labels, limit)
    assert len(rows) == limit
    assert (np.diff(rows) > 0).all()
    taken, there = np.bincount(labels[rows], minlength=5), np.bincount(labels, minlength=5)
    for label in range(5):
        assert rows[labels[rows] == label].tolist() == np.flatnonzero(labels == label)[: taken[label]].tolist()
        # A class has fewer rows than another only if all its rows are taken, or by one if there is a remainder.
        assert taken[label] == there[label] or taken[label] >= taken.max() - 1


def test_more_shards_than_there_are_names_for_are_refused_before_one_is_written():
    labels = np.zeros(300_001, np.int64)
    assert len(chosen_rows("val", labels[1:], PackOptions(shard_images=3))) == 300_000
    assert len(chosen_rows("val", labels, PackOptions(shard_images=3, limits={"val": 300_000}))) == 300_000
    with pytest.raises(UserError, match=r"--shard-images 3: 300,001 val images are more than 100,000 .* at least 4$"):
        chosen_rows("val", labels, PackOptions(shard_images=3))


def test_a_limit_beyond_the_files_is_refused(tmp_path):
    src = write(tmp_path / "src", official())
    with pytest.raises(UserError, match=r"--limit test=21: there are only 20 test images"):
        pack("mnist", src, tmp_path / "d", PackOptions(limits={"test": 21}))
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("missing", NAMES)
def test_a_missing_file_is_named_with_its_spellings(tmp_path, missing):
    contents = official()
    del contents[missing]
    with pytest.raises(UserError, match=rf"no {missing} \(also looked for .*\.gz"):
        pack("mnist", write(tmp_path / "src", contents), tmp_path / "d", PackOptions(limits={}))


def changed(name, change):
    contents = official()
    contents[name] = change(contents[name])
    return contents


TRAIN_IMAGES, TRAIN_LABELS = NAMES[:2]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (changed(TRAIN_IMAGES, lambda c: b""), "is empty; fetch it again"),
        (changed(TRAIN_IMAGES, lambda c: b"\x00\x00\x0d\x03" + c[4:]), "starts with 0x00000d03"),
        (changed(TRAIN_IMAGES, lambda c: official()[TRAIN_LABELS]), "starts with 0x00000801, expected"),
        (changed(TRAIN_LABELS, lambda c: official()[TRAIN_IMAGES]), "expected the IDX magic 0x00000801"),
        (changed(TRAIN_IMAGES, lambda c: c[:10]), "ends within its header, 10 bytes of 16"),
        (changed(TRAIN_IMAGES, lambda c: c[:-1]), "truncated: 39215 bytes"),
        (changed(TRAIN_IMAGES, lambda c: c + b"x"), "too long: 39217 bytes"),
        (changed(TRAIN_IMAGES, lambda c: c[:4] + b"\xff" * 12 + c[16:]), r"images of \(4294967295, "),
        (changed(TRAIN_IMAGES, lambda c: c[:4] + b"\xff" * 4 + c[8:]), "its header promises 4,294,967,295 entries"),
        (changed(TRAIN_IMAGES, lambda c: b"\n<!DOCTYPE html>" + c), "a web page, not the file itself; fetch it again"),
        (changed(TRAIN_LABELS, lambda c: c[:-1]), r"train-labels-idx1-ubyte(\.gz)?: truncated"),
        (changed(TRAIN_LABELS, lambda c: idx_bytes(np.zeros(49))), "49 labels for the 50 images of train-images"),
        (changed(TRAIN_LABELS, lambda c: c[:-1] + b"\x0a"), "label 49 .from 0. is 10, expected 0 to 9"),
        (changed(TRAIN_IMAGES, lambda c: idx_bytes(np.zeros((50, 28, 27)))), r"images of \(28, 27\) pixels"),
        (official(train=0) | {TRAIN_LABELS: idx_bytes(np.zeros(0))}, "holds no image"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_a_bad_file_is_named_with_what_is_wrong_and_nothing_is_written(tmp_path, contents, message, zipped):
    src = write(tmp_path / "src", contents, zipped=zipped)
    with pytest.raises(UserError, match=message) as caught:
        pack("mnist", src, tmp_path / "d", PackOptions(limits={}))
    assert "train-" in str(caught.value)
    assert not (tmp_path / "d").exists()


def test_a_damaged_gzip_file_is_named(tmp_path):
    whole = gzip.compress(official()[TRAIN_IMAGES])
    path = tmp_path / "train-images-idx3-ubyte.gz"
    flipped = whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]
    for content, message in [
        (whole[: len(whole) // 2], "truncated gzip file"),
        (whole[:-3], "truncated gzip file"),
        (flipped, "damaged gzip file"),
        (b"no gzip", "starts with 0x6e6f2067, expected the IDX magic"),
        (whole[:200] + b"\xff" * 40 + whole[240:], "damaged gzip file"),
    ]:
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"train-images-idx3-ubyte\.gz: {message}"):
            read_idx(path, (28, 28))


@pytest.mark.parametrize("kind", ["images", "labels"])
def test_the_content_tells_what_is_gzipped_and_labels_may_be_named_as_images(tmp_path, kind):
    contents = official()
    name = f"t10k-{kind}-idx{3 if kind == 'images' else 1}-ubyte"
    cases = [(name, gzip.compress), (f"{name}.gz", bytes)]
    for changed_name, change in cases + [("t10k-labels-idx3-ubyte", bytes)] * (kind == "labels"):
        src = write(tmp_path / changed_name, contents)
        content = (src / name).read_bytes()
        (src / name).unlink()
        (src / changed_name).write_bytes(change(content))
        pack("mnist", src, tmp_path / f"{changed_name} packed", PackOptions(limits={}))
        whole = open_dataset(tmp_path / f"{changed_name} packed").load("test")
        np.testing.assert_array_equal(whole[1], arrays(contents, "t10k")[1])


def test_the_command_packs_and_describes_what_it_made(tmp_path, capsys):
    src = write(tmp_path / "src", official())
    options = ["--limit", "train=20", "--compression", "gzip", "--shard-images", "15", "--name", "little"]
    assert main(["data", "pack", "kmnist", str(src), str(tmp_path / "d"), *options]) == 0
    text = capsys.readouterr().out
    assert "little" in text
    assert "20 images in 2 shards" in text
    dataset = open_dataset(tmp_path / "d")
    assert dataset.counts == {"train": 20, "test": 20}
    assert dataset.classes == ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
    assert np.bincount(dataset.load("train")[1]).tolist() == [2] * 10


def test_the_command_refuses_a_folder_that_is_not_empty(tmp_path, capsys):
    src = write(tmp_path / "src", official())
    assert main(["data", "pack", "mnist", str(src), str(src)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert len(list(src.iterdir())) == 4

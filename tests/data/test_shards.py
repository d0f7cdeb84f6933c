import hashlib
import json
import shutil

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arraytp.data.dataset import find_dataset, open_dataset
from arraytp.data.manifest import Manifest, manifest_text
from arraytp.data.shards import range_checksum
from arraytp.data.writer import Description, writing
from arraytp.errors import UserError


def random_rows(count, shape, classes=10):
    generator = np.random.default_rng(1)
    return generator.integers(0, 256, (count, *shape), dtype=np.uint8), generator.integers(0, classes, count)


@pytest.mark.parametrize("compression", [False, True])
@pytest.mark.parametrize(("count", "shard_images"), [(1, 1), (256, 256), (257, 300), (700, 300)])
def test_what_is_written_is_read_back(tmp_path, compression, count, shard_images):
    images, labels = random_rows(count, (4, 3, 2))
    description = Description("x", (4, 3, 2), tuple("abcdefghij"))
    with writing(tmp_path / "d", description, compression=compression, shard_images=shard_images) as writer:
        for part in np.array_split(np.arange(count), 3):
            writer.add("train", images[part], labels[part])
    dataset = open_dataset(tmp_path / "d")
    read_images, read_labels = dataset.load("train")
    assert np.array_equal(read_images, images)
    assert np.array_equal(read_labels, labels)
    assert read_labels.dtype == np.int64
    assert (dataset.name, dataset.shape, dataset.classes) == ("x", (4, 3, 2), tuple("abcdefghij"))
    assert dataset.counts == {"train": count}
    np.testing.assert_allclose(dataset.mean, (images / 255).mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(dataset.std, (images / 255).std((0, 1, 2)), rtol=1e-9)


@pytest.mark.parametrize("compression", [False, True])
def test_any_range_of_rows_equals_the_same_rows_of_the_whole(tmp_path, pack, compression):
    dataset = pack(tmp_path / "d", train=900, shard_images=400, compression=compression)
    images, labels = dataset.load("train")
    for start, stop in [(0, 0), (0, 1), (255, 257), (399, 401), (10, 890), (256, 512), (899, 900), (900, 900)]:
        some_images, some_labels = dataset.read("train", start, stop)
        assert np.array_equal(some_images, images[start:stop])
        assert np.array_equal(some_labels, labels[start:stop])


def test_a_shard_has_the_layout_of_the_contract(tiny):
    with h5py.File(tiny.folder / "train-00000.h5") as file:
        assert file.attrs["format"] == "arraytp-shard"
        assert file.attrs["version"] == 1
        assert (file["images"].shape, file["images"].dtype) == ((250, 5, 4, 3), np.uint8)
        assert file["labels"].shape == (250,)
        assert file["labels"].dtype.kind == "i"
        images, labels, checksums = file["images"][()], file["labels"][()], file["checksums"][()]
        offset = file["images"].id.get_offset()
    assert range_checksum(images, labels) == checksums[0]
    mapped = np.memmap(tiny.folder / "train-00000.h5", np.uint8, "r", offset, images.shape)
    assert np.array_equal(mapped, images)


@pytest.mark.parametrize("compression", [False, True])
def test_packing_twice_gives_the_same_bytes(tmp_path, pack, compression):
    for name in "ab":
        pack(tmp_path / name, compression=compression)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["dataset.json", "test-00000.h5", "train-00000.h5", "train-00001.h5", "train-00002.h5"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_large_images_have_small_checksum_ranges_and_chunks_of_many(tmp_path):
    images = np.zeros((3, 700, 1000, 1), np.uint8)
    with writing(tmp_path / "d", Description("x", (700, 1000, 1), ("a",))) as writer:
        writer.add("train", images, np.zeros(3, np.int64))
    dataset = open_dataset(tmp_path / "d")
    with h5py.File(tmp_path / "d" / "train-00000.h5") as file:
        assert len(file["checksums"]) == 3
    assert dataset.chunks("train") == [(0, 3)]


def test_chunks_cover_each_row_once_and_never_cross_shards(tiny):
    assert tiny.chunks("train") == [(0, 250), (250, 500), (500, 600)]


def test_an_unknown_split_names_those_there_are(tiny):
    with pytest.raises(UserError, match="no split 'val', it has train, test"):
        tiny.load("val")


def test_an_unknown_name_lists_the_embedded_sets(tmp_path):
    with pytest.raises(UserError, match=r"'nothing': no such folder.*fashion-mnist-10k"):
        open_dataset("nothing")


# Damage: `copy` is a data set of the test's own, in which it spoils something.


@pytest.fixture(params=[False, True], ids=["plain", "gzip"])
def copy(request, tmp_path, pack):
    return pack(tmp_path / "d", train=600, shape=(3, 4, 1), compression=request.param).folder


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "gzip"])
def spoilt(request, tmp_path_factory, pack):
    """A data set's folder and the content of its train shard: (folder, file's bytes, images, labels)."""
    folder = tmp_path_factory.mktemp("spoilt") / "d"
    dataset = pack(folder, train=300, test=3, shape=(3, 4, 1), compression=request.param, shard_images=300)
    return folder, (folder / "train-00000.h5").read_bytes(), *dataset.load("train")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_anywhere_in_a_shard_is_noticed_or_does_not_matter(spoilt, data):
    folder, whole, images, labels = spoilt
    position = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    (folder / "train-00000.h5").write_bytes(damaged)
    message, read_images, read_labels = "", images, labels
    try:
        read_images, read_labels = open_dataset(folder).load("train")
    except UserError as error:
        message = str(error)
    assert not message or ("train-00000.h5" in message and "rows" in message)
    assert np.array_equal(read_images, images)
    assert np.array_equal(read_labels, labels)


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(["images", "labels"]), row=st.integers(0, 299), bit=st.integers(0, 7))
def test_a_flipped_bit_in_an_image_or_label_is_always_noticed_with_its_rows(
    tmp_path_factory, kind, row, bit, spoilt_plain
):
    folder, whole, offsets = spoilt_plain
    damaged = bytearray(whole)
    damaged[offsets[kind] + row * {"images": 12, "labels": 8}[kind]] ^= 1 << bit
    (folder / "train-00000.h5").write_bytes(damaged)
    dataset = open_dataset(folder)
    rows = "rows 0 to 255" if row < 256 else "rows 256 to 299"
    with pytest.raises(UserError, match=rf"train-00000.h5: {rows} do not match their checksum"):
        dataset.load("train")
    other = (256, 300) if row < 256 else (0, 256)
    dataset.read("train", *other)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "row_bytes"), [("images", 12), ("labels", 8)])
def test_each_of_a_thousand_flipped_bits_is_noticed(spoilt_plain, kind, row_bytes):
    folder, whole, offsets = spoilt_plain
    noticed = 0
    bits = np.random.default_rng(0).choice(300 * row_bytes * 8, 1000, replace=False)
    for byte, bit in zip(*np.divmod(bits, 8), strict=True):
        damaged = bytearray(whole)
        damaged[offsets[kind] + byte] ^= 1 << bit
        (folder / "train-00000.h5").write_bytes(damaged)
        with pytest.raises(UserError, match=r"train-00000\.h5: rows .* do not match their checksum"):
            open_dataset(folder).load("train")
        noticed += 1
    assert noticed == 1000


@pytest.fixture(scope="module")
def spoilt_plain(tmp_path_factory, pack):
    folder = tmp_path_factory.mktemp("plain") / "d"
    pack(folder, train=300, test=3, shape=(3, 4, 1), shard_images=300)
    path = folder / "train-00000.h5"
    with h5py.File(path) as file:
        offsets = {key: file[key].id.get_offset() for key in ("images", "labels")}
    return folder, path.read_bytes(), offsets


def test_two_shards_that_changed_places_are_noticed(copy):
    first, second = copy / "train-00000.h5", copy / "train-00001.h5"
    first.rename(copy / "x")
    second.rename(first)
    (copy / "x").rename(second)
    with pytest.raises(UserError, match=r"train-0000[01].h5"):
        open_dataset(copy).load("train")


def test_two_shards_of_equal_length_that_changed_places_are_noticed_by_their_checksums(tmp_path, pack):
    folder = pack(tmp_path / "d", train=400, shard_images=200).folder
    first, second = folder / "train-00000.h5", folder / "train-00001.h5"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(UserError, match=r"not the shard that dataset.json names"):
        open_dataset(folder).load("train")


def test_a_missing_shard_is_named_when_the_data_set_is_opened(copy):
    (copy / "train-00001.h5").unlink()
    with pytest.raises(UserError, match=r"train-00001.h5: shard is missing \(rows 0 to 249\)"):
        open_dataset(copy)


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_truncated_shard_is_noticed_when_the_data_set_is_opened(copy, keep):
    path = copy / "train-00002.h5"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"train-00002.h5: shard is truncated"):
        open_dataset(copy)


def test_a_shard_truncated_after_it_was_opened_is_an_error_and_not_a_crash(tmp_path, pack):
    dataset = pack(tmp_path / "d")
    dataset.chunks("train")
    path = dataset.folder / "train-00002.h5"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"train-00002.h5: shard is damaged, rows 0 to 99 cannot be read"):
        dataset.load("train")


def test_a_shard_deleted_after_it_was_opened_is_named(copy):
    dataset = open_dataset(copy)
    dataset.chunks("train")
    (copy / "train-00002.h5").unlink()
    with pytest.raises(UserError, match=r"train-00002.h5"):
        dataset.load("train")


def test_a_shard_that_became_longer_is_noticed(copy):
    with (copy / "test-00000.h5").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"test-00000.h5: shard is not the one that was packed"):
        open_dataset(copy)


def test_a_file_that_is_not_hdf5_is_named(copy):
    path = copy / "train-00000.h5"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(UserError, match=r"train-00000.h5: shard is damaged"):
        open_dataset(copy).load("train")


def rewrite(folder, change):
    """Change the content of a shard and record its new size in dataset.json."""
    path = folder / "train-00000.h5"
    with h5py.File(path, "r+") as file:
        change(file)
    document = json.loads((folder / "dataset.json").read_text())
    del document["checksum"]
    document["splits"]["train"]["shards"][0]["bytes"] = path.stat().st_size
    (folder / "dataset.json").write_text(manifest_text(Manifest(**document)))


def test_a_shard_of_another_version_is_refused(copy):
    rewrite(copy, lambda file: file.attrs.modify("version", 2))
    with pytest.raises(UserError, match=r"train-00000.h5: shard version 2 is unknown, this arraytp reads version 1"):
        open_dataset(copy).load("train")


@pytest.mark.parametrize("name", ["images", "labels", "checksums"])
def test_a_shard_that_lacks_something_is_refused(copy, name):
    rewrite(copy, lambda file: file.__delitem__(name))
    with pytest.raises(UserError, match=r"train-00000.h5"):
        open_dataset(copy).load("train")


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("images", np.zeros((250, 4, 3, 1), np.uint8)),
        ("images", np.zeros((249, 3, 4, 1), np.uint8)),
        ("images", np.zeros((250, 3, 4, 1), np.int16)),
        ("labels", np.zeros(249, np.int64)),
        ("labels", np.zeros(250, np.float64)),
        ("checksums", np.zeros(1, np.uint32)),
        ("checksums", np.zeros(2, np.uint32)),
    ],
)
def test_a_shard_of_another_shape_or_type_is_refused(copy, name, array):
    def change(file):
        del file[name]
        file[name] = array

    rewrite(copy, change)
    with pytest.raises(UserError, match=r"train-00000.h5"):
        open_dataset(copy).load("train")


def test_another_range_length_does_not_pass(tmp_path, pack):
    folder = pack(tmp_path / "d", train=600, shard_images=600).folder
    rewrite(folder, lambda file: file.attrs.modify("range_rows", 257))
    with pytest.raises(UserError, match="rows 0 to 256 do not match"):
        open_dataset(folder).load("train")


def test_a_label_out_of_range_is_named_with_its_row(tmp_path, pack):
    folder = pack(tmp_path / "d", classes=10).folder
    document = json.loads((folder / "dataset.json").read_text())
    del document["checksum"]
    document["classes"] = document["classes"][:9]
    (folder / "dataset.json").write_text(manifest_text(Manifest(**document)))
    with pytest.raises(UserError, match=r"train-00000.h5: row \d+ has label 9, expected 0 to 8 \(rows 0 to 249\)"):
        open_dataset(folder).load("train")


def test_every_byte_of_the_manifest_counts(tiny, tmp_path):
    folder = tmp_path / "d"
    shutil.copytree(tiny.folder, folder)
    text = (folder / "dataset.json").read_text()
    document = json.loads(text)
    changes = [
        lambda d: d.update(mean=[0.5, 0.5, 0.5]),
        lambda d: d.update(classes=d["classes"][::-1]),
        lambda d: d["splits"]["train"].update(count=599),
        lambda d: d["splits"]["train"]["shards"].reverse(),
        lambda d: d["splits"].pop("test"),
        lambda d: d.update(extra=1),
        lambda d: d.pop("checksum"),
    ]
    for change in changes:
        changed = json.loads(text)
        change(changed)
        assert changed != document
        (folder / "dataset.json").write_text(json.dumps(changed))
        with pytest.raises(UserError, match=r"dataset.json: its content does not match its own checksum"):
            open_dataset(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "holds a list, expected a JSON object"),
        ('{"format": "other"}', "format is 'other', expected 'arraytp-dataset'"),
        ('{"format": "arraytp-dataset", "version": 2}', "version 2 is unknown, this arraytp reads version 1"),
    ],
)
def test_a_manifest_that_is_none_is_refused(tmp_path, text, message):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=message):
        open_dataset(tmp_path)


def test_a_folder_without_a_manifest_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"dataset.json: not found"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": [5, 4]}, "shape"),
        ({"shape": [5, 4, 0]}, "shape.2"),
        ({"mean": [0.5]}, "mean has 1 values for 3 channels"),
        ({"std": [0.1, 0.1, -0.1]}, "std.2"),
        ({"classes": ["a", "a"]}, "named twice"),
        ({"classes": []}, "classes"),
        ({"splits": {}}, "splits"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(tiny, tmp_path, change, message):
    document = tiny.manifest.model_dump(mode="json") | change
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    document["checksum"] = hashlib.sha256(canonical.encode()).hexdigest()
    (tmp_path / "dataset.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=message):
        open_dataset(tmp_path)


def test_a_shard_outside_the_folder_cannot_be_named(tiny):
    document = tiny.manifest.model_dump(mode="json")
    document["splits"]["train"]["shards"][0]["file"] = "../train-00000.h5"
    with pytest.raises(ValueError, match="file"):
        Manifest(**document)


def test_all_damage_is_listed_at_once(copy):
    (copy / "test-00000.h5").unlink()
    path = copy / "train-00001.h5"
    path.write_bytes(path.read_bytes()[:-1])
    with h5py.File(copy / "train-00002.h5", "r+") as file:
        file["images"][0] ^= 1
    assert len(list(find_dataset(copy).problems())) == 3

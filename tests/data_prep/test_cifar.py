"""CIFAR and ImageNet 32×32 files in the exact official layouts, good and hostile."""

import errno
import io
import os
import pickle
import struct
import tarfile

import numpy as np
import pytest
from limits import limited_memory

from arraytp.cli import main
from arraytp.data.dataset import open_dataset
from arraytp.data_prep import cifar, files, imagenet32
from arraytp.data_prep.batches import read_batch
from arraytp.data_prep.options import PackOptions
from arraytp.errors import UserError


def python2_string(text):
    return b"U" + bytes([len(text)]) + text if len(text) < 256 else b"T" + struct.pack("<i", len(text)) + text


def python2_pickle(rows, **lists):
    """A batch as Python 2 with NumPy 1 wrote it, opcode by opcode: protocol 2, text as byte strings."""
    array = b"".join(
        [
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R",
            b"(K\x01" + struct.pack("<cicH", b"J", len(rows), b"M", 3072) + b"\x86",
            b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb",
            b"\x89" + python2_string(rows.tobytes()) + b"tb",
        ]
    )
    items = [(b"batch_label", python2_string(b"a batch")), (b"data", array)]
    for key, values in lists.items():
        numbers = b"".join(b"M" + struct.pack("<H", value) for value in values)
        items.append((key.encode(), b"](" + numbers + b"e"))
    items.append((b"filenames", b"](" + b"".join(python2_string(b"leptodactylus_s.png") for _ in rows) + b"e"))
    return b"\x80\x02}(" + b"".join(python2_string(key) + value for key, value in items) + b"u."


def batch(seed, count, classes, first=0):
    generator = np.random.default_rng(seed)
    labels = [first, first + classes - 1, *generator.integers(first, first + classes, count - 2).tolist()]
    return generator.integers(0, 256, (count, 3072), dtype=np.uint8), labels


def pixel(row, y, x):
    """The official definition: 1024 red, 1024 green, 1024 blue values, row by row."""
    return [row[1024 * channel + 32 * y + x] for channel in range(3)]


CIFAR10 = {name: batch(i, 12, 10) for i, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"])}
CIFAR100 = {name: batch(i, 30, 100) for i, name in enumerate(["train", "test"])}


def files10(version):
    if version == "python":
        return {f"cifar-10-batches-py/{name}": python2_pickle(r, labels=l) for name, (r, l) in CIFAR10.items()}
    rows = {
        name: b"".join(bytes([y]) + x.tobytes() for x, y in zip(*part, strict=True)) for name, part in CIFAR10.items()
    }
    return {f"cifar-10-batches-bin/{name}.bin": content for name, content in rows.items()}


def files100(version):
    if version == "python":
        return {
            f"cifar-100-python/{name}": python2_pickle(r, fine_labels=l, coarse_labels=[7] * len(l))
            for name, (r, l) in CIFAR100.items()
        }
    return {
        f"cifar-100-binary/{name}.bin": b"".join(bytes([7, y]) + x.tobytes() for x, y in zip(*part, strict=True))
        for name, part in CIFAR100.items()
    }


def write(root, contents):
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def check(dataset, split, parts):
    images, labels = dataset.load(split)
    rows = np.concatenate([part[0] for part in parts])
    wanted = [label for part in parts for label in part[1]]
    # The first two pixels identify a row, so it can be found again after shuffling.
    place = {tuple(pixel(row, 0, 0) + pixel(row, 0, 1)): i for i, row in enumerate(rows)}
    order = [place[(*image[0, 0].tolist(), *image[0, 1].tolist())] for image in images]
    assert sorted(order) == list(range(len(rows)))
    assert (order == sorted(order)) == (split != "train")
    for image, label, i in zip(images, labels, order, strict=True):
        assert label == wanted[i]
        for y, x in ((0, 31), (31, 0), (17, 5)):
            assert image[y, x].tolist() == pixel(rows[i], y, x)


def split_parts(batches):
    test = [name for name in batches if name.startswith("test")]
    return [batches[name] for name in batches if name not in test], [batches[name] for name in test]


@pytest.mark.parametrize("version", ["python", "binary"])
@pytest.mark.parametrize("form", ["tar.gz", "parent", "folder"])
@pytest.mark.parametrize("source", ["cifar10", "cifar100"])
def test_all_images_are_packed_with_their_labels(tmp_path, source, version, form):
    contents = (files10 if source == "cifar10" else files100)(version)
    src = write(tmp_path / "s", contents)
    if form == "folder":
        (src,) = src.iterdir()
    if form == "tar.gz":
        with tarfile.open(tmp_path / "s.tar.gz", "w:gz") as tar:
            for path in src.iterdir():
                tar.add(path, path.name)
        src = tmp_path / "s.tar.gz"
    cifar.pack(source, src, tmp_path / "d", PackOptions())
    dataset = open_dataset(tmp_path / "d")
    train, test = split_parts(CIFAR10 if source == "cifar10" else CIFAR100)
    check(dataset, "train", train)
    check(dataset, "test", test)
    assert dataset.classes[0] == ("airplane" if source == "cifar10" else "apple")
    assert dataset.classes == tuple(sorted(dataset.classes))


def test_the_two_versions_give_the_same_shards(tmp_path):
    for version in ("python", "binary"):
        cifar.pack("cifar10", write(tmp_path / "s" / version, files10(version)), tmp_path / version, PackOptions())
    for name in ("train-00000.h5", "test-00000.h5"):
        assert (tmp_path / "python" / name).read_bytes() == (tmp_path / "binary" / name).read_bytes()


def changed10(version, name, content):
    contents = files10(version)
    if content is None:
        del contents[name]
    else:
        contents[name] = content(contents[name]) if callable(content) else content
    return contents


PY, BIN = "cifar-10-batches-py/data_batch_2", "cifar-10-batches-bin/data_batch_2.bin"
ROWS, LABELS = CIFAR10["data_batch_2"]


class System:
    def __reduce__(self):
        return os.system, ("exit 1",)


@pytest.mark.parametrize(
    ("version", "name", "content", "message"),
    [
        ("python", PY, None, "no cifar-10-batches-py/data_batch_2, but other batches are there"),
        ("binary", BIN, None, r"no cifar-10-batches-bin/data_batch_2\.bin, but other"),
        ("python", PY, lambda c: c[:-1], "damaged or truncated pickle"),
        ("python", PY, lambda c: c[:5000], "damaged or truncated pickle"),
        ("python", PY, b"", "damaged or truncated pickle"),
        ("python", PY, pickle.dumps([1]), "holds a list, expected a batch"),
        ("python", PY, pickle.dumps({"data": b"x", "labels": []}), "expected an array 'data' and a list 'labels'"),
        ("python", PY, python2_pickle(ROWS, fine_labels=LABELS), "found 'batch_label', 'data', 'fine_labels'"),
        ("python", PY, python2_pickle(ROWS, labels=LABELS[:-1]), "11 labels for 12 images"),
        (
            "python",
            PY,
            python2_pickle(ROWS, labels=[*LABELS[:-1], 10]),
            r"label 11 \(from 0\) is '10', expected 0 to 9",
        ),
        ("python", PY, python2_pickle(ROWS[:, :3071], labels=LABELS), "'data' is not a row-major array of bytes"),
        (
            "python",
            PY,
            pickle.dumps({"data": ROWS.astype(np.uint16), "labels": LABELS}, 2),
            "'data' is not a row-major",
        ),
        (
            "python",
            PY,
            pickle.dumps({"data": np.asfortranarray(ROWS), "labels": LABELS}, 2),
            "'data' is not a row-major",
        ),
        ("python", PY, pickle.dumps({"data": ROWS, "labels": [True] * 12}, 2), "label 0 .* is 'True'"),
        ("binary", BIN, lambda c: c[:-1], "36875 bytes are not a whole number of rows of 3073"),
        ("binary", BIN, b"", "0 bytes are not a whole number"),
        ("binary", BIN, lambda c: b"\x0a" + c[1:], r"label 0 \(from 0\) is '10', expected 0 to 9"),
        ("python", PY, pickle.dumps(System()), r"refused: the pickle names (posix|os)\.system"),
        ("python", PY, pickle.dumps({"data": System()}, 0), r"refused: the pickle names (posix|os)\.system"),
        ("python", PY, b"cbuiltins\neval\n(S'1'\ntR.", "refused: the pickle names builtins.eval"),
        ("python", PY, b"cnumpy\nload\n.", "refused: the pickle names numpy.load"),
        ("python", PY, b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00hextR.", "refused: .* other than bytes"),
        ("python", PY, b"\x80\x02\x82\x01.", "damaged or truncated pickle"),
        ("python", PY, b"Pid\n.", "damaged or truncated pickle"),
    ],
)
def test_a_bad_batch_is_named_with_what_is_wrong_and_nothing_is_written(tmp_path, version, name, content, message):
    src = write(tmp_path / "s", changed10(version, name, content))
    with pytest.raises(UserError, match=message) as caught:
        cifar.pack("cifar10", src, tmp_path / "d", PackOptions())
    assert "data_batch_2" in str(caught.value)
    assert not (tmp_path / "d").exists()


def test_every_truncation_of_a_pickle_is_one_clear_error():
    content = python2_pickle(ROWS[:1], labels=[3])
    for length in range(0, len(content), 7):
        with pytest.raises(UserError, match=r"^batch: "):
            read_batch(io.BytesIO(content[:length]), "batch", "labels", 10, 0)


@pytest.mark.parametrize("protocol", range(5))
def test_batches_of_later_pythons_and_numpys_are_read(protocol):
    content = pickle.dumps({"data": ROWS, "labels": LABELS}, protocol)
    images, labels = read_batch(io.BytesIO(content), "batch", "labels", 10, 0)
    assert labels.tolist() == LABELS
    assert images[3, 4, 5].tolist() == pixel(ROWS[3], 4, 5)


def test_a_folder_without_batches_says_what_is_looked_for(tmp_path):
    with pytest.raises(
        UserError, match=r"no cifar-10-batches-py/data_batch_1 and no cifar-10-batches-bin/data_batch_1\.b"
    ):
        cifar.pack("cifar10", tmp_path, tmp_path / "d", PackOptions())


IMAGENET32 = {name: batch(i, 9, 1000, 1) for i, name in enumerate(sum(imagenet32.BATCHES.values(), ()))}


def files32():
    """The batches as Python 3 pickled them: labels from 1, and the mean image beside the train images."""
    mean = np.zeros(3072)
    return {
        name: pickle.dumps(
            {"data": rows, "labels": labels, "mean": mean} if "train" in name else {"data": rows, "labels": labels}, 3
        )
        for name, (rows, labels) in IMAGENET32.items()
    }


@pytest.mark.parametrize("folders", [False, True])
def test_imagenet32_labels_count_from_1_in_the_files_and_from_0_here(tmp_path, folders):
    contents = files32()
    if folders:
        contents = {f"Imagenet32_{name.split('_')[0]}/{name}": content for name, content in contents.items()}
    src = write(tmp_path / "s", contents)
    assert main(["data", "pack", "imagenet32", str(src), str(tmp_path / "d"), "--shard-images", "40"]) == 0
    dataset = open_dataset(tmp_path / "d")
    assert (len(dataset.classes), dataset.classes[0], dataset.classes[-1]) == (1000, "1", "1000")
    from_zero = {name: (rows, [label - 1 for label in labels]) for name, (rows, labels) in IMAGENET32.items()}
    val = from_zero.pop("val_data")
    check(dataset, "train", list(from_zero.values()))
    check(dataset, "val", [val])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train_data_batch_7", None, "no train_data_batch_7, expected train_data_batch_1 to _10 and val_data"),
        ("val_data", None, "no val_data"),
        (
            "val_data",
            pickle.dumps({"data": ROWS, "labels": [0] * 12}),
            r"label 0 \(from 0\) is '0', expected 1 to 1000",
        ),
        ("val_data", pickle.dumps({"data": ROWS, "labels": [1001] * 12}), "is '1001', expected 1 to 1000"),
        ("train_data_batch_10", b"cos\nsystem\n.", "refused: the pickle names os.system"),
    ],
)
def test_a_bad_imagenet32_file_is_named_and_nothing_stays(tmp_path, name, content, message):
    contents = files32()
    contents.pop(name)
    src = write(tmp_path / "s", contents | ({name: content} if content else {}))
    with pytest.raises(UserError, match=message) as caught:
        imagenet32.pack(src, tmp_path / "d", PackOptions())
    assert name in str(caught.value)
    assert not (tmp_path / "d").exists() or not list((tmp_path / "d").iterdir())


ROWS, ROW_LABELS = CIFAR10["data_batch_1"]


def read(content):
    return read_batch(io.BytesIO(content), "batch", "labels", 10, 0)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", [list, np.int64, np.uint8, ">i4"], ids=str)
@pytest.mark.parametrize("module", ["numpy._core", "numpy.core"])
def test_batches_of_every_protocol_and_with_labels_as_an_array_are_read(protocol, kind, module):
    """Protocol 5 rebuilds arrays by a function of its own, and NumPy 1 names such functions' modules differently."""
    labels = ROW_LABELS if kind is list else np.array(ROW_LABELS, kind)
    content = pickle.dumps({"data": ROWS, "labels": labels}, protocol=protocol)
    if protocol < 4:
        content = content.replace(b"cnumpy._core.", b"c" + module.encode() + b".")
    images, found = read(content)
    np.testing.assert_array_equal(images.transpose(0, 3, 1, 2).reshape(-1, 3072), ROWS)
    np.testing.assert_array_equal(found, ROW_LABELS)


@pytest.mark.parametrize("labels", [np.array(ROW_LABELS, float), np.array([ROW_LABELS]), np.array(["a"] * 12)], ids=str)
def test_an_array_of_anything_but_labels_is_refused(labels):
    with pytest.raises(UserError, match="'labels' is not an array of integers"):
        read(pickle.dumps({"data": ROWS, "labels": labels}))


@pytest.mark.parametrize("form", ["pickle", "binary"])
def test_a_file_that_was_transferred_as_text_is_told_from_damage(tmp_path, form):
    contents = files10("python" if form == "pickle" else "binary")
    name = next(iter(contents))
    contents[name] = contents[name].replace(b"\n", b"\r\n")
    with pytest.raises(UserError, match=r"was transferred as text: every line end in it has become \\r\\n"):
        cifar.pack("cifar10", write(tmp_path / "s", contents), tmp_path / "d", PackOptions())


def nested(depth):
    return [nested(depth - 1)] * 2 if depth else []


TEXT = b"X\x00\x00\x00\x01" + b"a" * 2**24
BOMBS = {
    "a table as long as a number": (b"\x80\x02K\x01r\xff\xff\xff\x7f.", "holds a int"),
    "bytes that are not there": (b"\x80\x04\x8e\xff\xff\xff\xff\xff\x00\x00\x00.", "EOFError"),
    "a frame that is not there": (b"\x80\x04\x95\xff\xff\xff\xff\xff\x00\x00\x00.", "damaged"),
    "bytes made again and again": (
        b"\x80\x02c_codecs\nencode\nq\x00" + TEXT + b"X\x06\x00\x00\x00latin1\x86q\x01(" + b"h\x00h\x01R" * 100 + b"l.",
        "makes more than 67,108,864 bytes",
    ),
    "lists of lists for labels": (
        pickle.dumps({"data": ROWS, "labels": [nested(40)] * len(ROWS)}),
        "label 0 .from 0. is 'a list'",
    ),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_pickle_takes_no_more_memory_than_it_is_long(bomb, monkeypatch):
    """Each would take gigabytes; the system grants 1 GiB more than is in use."""
    content, message = BOMBS[bomb]
    monkeypatch.setattr("arraytp.data_prep.batches._MOST_BYTES", 2**26)
    with limited_memory(2**30), pytest.raises(UserError, match=message):
        read(content)


def test_the_classes_of_imagenet32_are_wnids_where_a_devkit_is(tmp_path):
    generator = np.random.default_rng(0)
    names = [*(f"train_data_batch_{n}" for n in range(1, 11)), "val_data"]
    rows = generator.integers(0, 256, (2, 3072), np.uint8)
    contents = {name: pickle.dumps({"data": rows, "labels": [3, 1000]}, protocol=2) for name in names}
    wnids = [f"n{number:08d}" for number in generator.permutation(1000)]
    text = "".join(f"{wnid} {number} name\n" for number, wnid in enumerate(wnids, 1))
    src = write(tmp_path / "s", contents)
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit/map_clsloc.txt").write_text(text)
    imagenet32.pack(src, tmp_path / "d", PackOptions(), tmp_path / "kit")
    dataset = open_dataset(tmp_path / "d")
    assert list(dataset.classes) == wnids
    assert sorted(set(dataset.load("val")[1].tolist())) == [2, 999]
    (tmp_path / "kit/map_clsloc.txt").write_text(text.partition("\n")[2])
    with pytest.raises(UserError, match="numbers 999 classes, expected 1 to 1000"):
        imagenet32.pack(src, tmp_path / "e", PackOptions(), tmp_path / "kit")


@pytest.mark.parametrize(("number", "length"), [(None, 2**28 + 1), (errno.EIO, 9)])
def test_a_batch_that_cannot_be_read_is_named_with_its_archive(tmp_path, capsys, monkeypatch, number, length):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    src = tmp_path / "s.tar"
    with src.open("wb") as file:
        for name in files10("binary"):
            member = tarfile.TarInfo(name)
            member.size = length
            file.write(member.tobuf())
            # A hole in the file.
            file.seek(-(-length // 512) * 512, os.SEEK_CUR)
        file.truncate(file.tell() + 1024)
    if number is not None:
        monkeypatch.setattr(files, "_read_part", refuse)
    assert main(["data", "pack", "cifar10", str(src), str(tmp_path / "d")]) == 2
    reason = "268,435,457 bytes are more than 268,435,456" if number is None else "Input/output error"
    expected = f"arraytp: error: {src}: cifar-10-batches-bin/data_batch_1.bin: cannot be read: {reason}\n"
    assert capsys.readouterr().err == expected


def test_batches_of_many_blocks_keep_images_with_their_labels(tmp_path, monkeypatch):
    """Official batches have 128,000 images, processed 4,096 at a time; here pixels equal their image's label."""
    monkeypatch.setattr(imagenet32, "_BLOCK_IMAGES", 4)
    values = iter(range(1, 100))
    (tmp_path / "src").mkdir()
    for name in [*(f"train_data_batch_{n}" for n in range(1, 11)), "val_data"]:
        own = [next(values) for _ in range(9)]
        rows = np.repeat(np.array(own, np.uint8)[:, None], 3072, axis=1)
        (tmp_path / "src" / name).write_bytes(pickle.dumps({"data": rows, "labels": own}, 2))
    imagenet32.pack(tmp_path / "src", tmp_path / "dst", PackOptions())
    for split, count in (("train", 90), ("val", 9)):
        images, labels = open_dataset(tmp_path / "dst").load(split)
        assert images[:, 9, 9, 1].tolist() == (labels + 1).tolist()
        assert len(set(labels.tolist())) == len(labels) == count

"""Errors of the operating system are reported in its own words, without advice to pack again or to start over."""

import errno
import fcntl
import os

import h5py
import numpy as np
import pytest

from arraytp.cli import main
from arraytp.config import parse_config
from arraytp.data.dataset import open_dataset
from arraytp.data.writer import Description, writing
from arraytp.disk import flush_folder, system_words
from arraytp.errors import UnreadableError
from arraytp.training.build import build
from arraytp.training.checkpoint import read_checkpoint, write_checkpoint
from arraytp.training.trace import read_batch, write_trace

NUMBERS = [errno.EMFILE, errno.ESTALE, errno.ENOSPC, errno.EACCES, errno.EIO, errno.ENOLCK, errno.ENOMEM, 524]
IMAGES = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 1), np.uint8)


@pytest.fixture(params=["none", "gzip"])
def packed(request, tmp_path):
    folder = tmp_path / "data"
    description = Description("x", (4, 4, 1), ("a", "b"))
    with writing(folder, description, compression=request.param == "gzip", shard_images=5) as writer:
        for split in ("train", "test"):
            writer.add(split, IMAGES, np.arange(20) % 2)
    return folder


@pytest.fixture
def built(packed):
    tree = {
        "data": {"dataset": str(packed)},
        "network": {"blocks": [{"type": "dense", "units": 2}]},
        "rule": {"name": "bp"},
        "optimizer": {"name": "sgd", "lr": 0.1},
        "train": {"epochs": 1, "batch_size": 4},
    }
    return build(parse_config(tree).variants[""])


@pytest.fixture(params=NUMBERS, ids=[errno.errorcode.get(number, str(number)) for number in NUMBERS])
def refusing(request, monkeypatch):
    """Make opening HDF5 files fail with a system error, as HDF5 reports it; return the system's message."""

    def refuse(*_, **__):
        number = request.param
        raise OSError(None if number == errno.EIO else number, f"file read failed: errno = {number}, error message = …")

    def install():
        monkeypatch.setattr(h5py, "File", refuse)
        return os.strerror(request.param)

    return install


def check_words(text, words):
    assert words in text
    for advice in ("damaged", "again", "--fresh", "start"):
        assert advice not in text


def test_a_shard_that_the_system_does_not_give_is_not_damaged(packed, refusing):
    dataset = open_dataset(packed)
    words = refusing()
    with pytest.raises(UnreadableError) as caught:
        dataset.load("train")
    check_words(str(caught.value), words)


def test_check_advises_nothing_for_it(packed, refusing, capsys):
    words = refusing()
    assert main(["data", "check", str(packed)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    check_words(err, words)


def test_a_pack_that_goes_on_keeps_its_shards_for_it(packed, refusing):
    (packed / "dataset.json").unlink()
    description = Description("y", (4, 4, 1), ("a", "b"))
    for path in packed.iterdir():
        path.unlink()

    def add(upto):
        with writing(packed, description, shard_images=5) as writer:
            writer.add("train", IMAGES[writer.taken("train") : upto], np.zeros(upto - writer.taken("train"), np.int64))
            if upto < len(IMAGES):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        add(10)
    before = {path.name: path.read_bytes() for path in packed.iterdir()}
    words = refusing()
    with pytest.raises(UnreadableError, match=words):
        add(20)
    assert {path.name: path.read_bytes() for path in packed.iterdir()} == before


def test_a_checkpoint_that_the_system_does_not_give_is_not_damaged(built, refusing, tmp_path):
    write_checkpoint(tmp_path / "c.h5", built, {})
    words = refusing()
    with pytest.raises(UnreadableError) as caught:
        read_checkpoint(tmp_path / "c.h5", built)
    check_words(str(caught.value), words)


def test_a_trace_that_the_system_does_not_give_is_no_other_file(built, refusing, tmp_path):
    write_trace(tmp_path / "t.h5", built, *next(built.train_loader.batches(0)))
    words = refusing()
    with pytest.raises(UnreadableError) as caught:
        read_batch(tmp_path / "t.h5", built)
    check_words(str(caught.value), words)


def test_files_are_read_under_a_foreign_lock(built, packed, tmp_path):
    """Reading takes no locks, which some network file systems do not have."""
    write_checkpoint(tmp_path / "c.h5", built, {"a": 1})
    write_trace(tmp_path / "t.h5", built, *next(built.train_loader.batches(0)))
    held = [path.open("r+b") for path in (tmp_path / "c.h5", tmp_path / "t.h5", *packed.glob("*.h5"))]
    for file in held:
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        images, _ = open_dataset(packed).load("train")
        np.testing.assert_array_equal(images, IMAGES)
        assert read_checkpoint(tmp_path / "c.h5", built) == {"a": 1}
        assert len(read_batch(tmp_path / "t.h5", built)[1]) == 4
    finally:
        for file in held:
            file.close()


def test_damage_has_no_words_of_the_system(tmp_path):
    (tmp_path / "junk").write_bytes(b"junk" * 1000)
    with pytest.raises(OSError, match="signature") as caught:
        h5py.File(tmp_path / "junk")
    assert system_words(caught.value) == ""
    assert system_words(ValueError("errno = 5")) == ""
    assert system_words(MemoryError()) == os.strerror(errno.ENOMEM)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_folder_that_cannot_be_flushed_need_not_be(tmp_path, monkeypatch, number):
    def refuse(_):
        raise OSError(number, "")

    monkeypatch.setattr(os, "fsync", refuse)
    flush_folder(tmp_path)

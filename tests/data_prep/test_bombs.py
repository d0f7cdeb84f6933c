"""Small files that stand for gigabytes: refused by their headers or at a limit, in bounded memory and time."""

import gzip
import io
import lzma
import struct
import tarfile
import time
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from limits import limited_memory
from PIL import Image

from arraytp.cli import main
from arraytp.data import shards
from arraytp.data.chunks import read_chunk
from arraytp.data.dataset import open_dataset
from arraytp.data.manifest import read_manifest
from arraytp.data.writer import Description, writing
from arraytp.data_prep import decode, files, folder, idx, images
from arraytp.data_prep.options import PackOptions
from arraytp.errors import UserError

MORE = 2**28
ZEROS = bytes(2**20)


def squeezed(opener, head=b"", megabytes=600):
    """Compress `head` and many zeros."""
    file = io.BytesIO()
    with opener(file, "wb") as packed:
        packed.write(head)
        for _ in range(megabytes):
            packed.write(ZEROS)
    return file.getvalue()


def fast_gzip(file, mode):
    return gzip.GzipFile(fileobj=file, mode=mode, compresslevel=1)


def fast_xz(file, mode):
    return lzma.LZMAFile(file, mode, preset=0)


@pytest.fixture(scope="module")
def zeros():
    return squeezed(fast_gzip)


@pytest.fixture
def refused_soon(capsys):
    """Run a command that must fail in seconds, with little more memory than is in use; return its error message."""

    def call(*words):
        started = time.monotonic()
        with limited_memory(MORE):
            assert main([str(word) for word in words]) == 2
        assert time.monotonic() - started < 5
        out, err = capsys.readouterr()
        assert (out, len(err.splitlines())) == ("", 1)
        return err

    return call


@pytest.mark.parametrize("head", [b"", bytes((0, 0, 8, 3))], ids=["no magic", "no shape"])
def test_a_gzip_of_zeros_for_idx_files(tmp_path, zeros, refused_soon, head):
    start = gzip.compress(head) if head else b""
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(start + zeros)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(zeros)
    message = refused_soon("data", "pack", "mnist", tmp_path, tmp_path / "d")
    assert ("images of (0, 0) pixels" if head else "starts with 0x00000000") in message


def test_an_idx_file_that_goes_on_for_ever_after_its_images(tmp_path, zeros):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(bytes((0, 0, 8, 3)) + struct.pack(">3I", 5, 28, 28) + bytes(5 * 784)) + zeros)
    with limited_memory(MORE), pytest.raises(UserError, match="too long: 3937 bytes or more"):
        idx.read_idx(path, (28, 28))


@pytest.mark.parametrize("kind", ["gzip", "xz"])
@pytest.mark.parametrize("source", ["cifar10", "folder"])
def test_an_archive_of_zeros_is_no_archive(tmp_path, refused_soon, zeros, source, kind):
    path = tmp_path / "archive"
    path.write_bytes(zeros if kind == "gzip" else squeezed(fast_xz, megabytes=64))
    message = refused_soon("data", "pack", source, path, tmp_path / "d")
    assert "not a tar archive, or damaged (end of file header)" in message


def test_an_archive_that_unpacks_to_hundreds_of_times_its_size(tmp_path, refused_soon, monkeypatch):
    monkeypatch.setattr(files, "_UNSUSPICIOUS", 2**24)
    member = tarfile.TarInfo("train/a/1.png")
    member.size = 600 * 2**20
    path = tmp_path / "archive.tar.gz"
    path.write_bytes(squeezed(fast_gzip, member.tobuf()))
    message = refused_soon("data", "pack", "folder", path, tmp_path / "d")
    assert "unpacks to more than 100 times its size" in message


def test_a_tar_header_longer_than_memory(tmp_path, refused_soon):
    path = tmp_path / "archive.tar"
    member = tarfile.TarInfo("././@PaxHeader")
    member.type, member.size = tarfile.XHDTYPE, 2**32
    with path.open("wb") as file:
        file.write(member.tobuf())
        file.truncate(2**32 + 1536)
    assert "a header of 4,294,967,296 bytes" in refused_soon("data", "pack", "folder", path, tmp_path / "d")


def test_a_file_that_is_no_image_for_its_length_alone(tmp_path, refused_soon):
    for split in ("train", "test"):
        (tmp_path / f"s/{split}/a").mkdir(parents=True)
        with (tmp_path / f"s/{split}/a/1.png").open("wb") as file:
            file.truncate(2**32)
    message = refused_soon("data", "pack", "folder", tmp_path / "s", tmp_path / "d", "--size", 8)
    assert "cannot be read: 4,294,967,296 bytes are more than 268,435,456" in message


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, *chunks, depth=8, colour=2):
    head = struct.pack(">2I5B", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(chunks) + chunk(b"IEND", b"")


MANY_ZEROS = zlib.compress(bytes(2**28), 1)
IMAGES = {
    "more pixels than memory": (png(2**13, 2**13 + 1), "8192 x 8193 pixels are more than"),
    "a line of more bits than Pillow counts": (
        png(40_000_000, 1, chunk(b"IDAT", zlib.compress(bytes(9))), depth=16, colour=6),
        "40000000 x 1 pixels have a side longer than 16777216",
    ),
    "a profile of zeros": (
        png(4, 4, chunk(b"iCCP", b"a\0\0" + MANY_ZEROS), chunk(b"IDAT", zlib.compress(bytes(52)))),
        "too large",
    ),
    "text of zeros": (
        png(4, 4, chunk(b"zTXt", b"a\0\0" + MANY_ZEROS), chunk(b"IDAT", zlib.compress(bytes(52)))),
        "too large",
    ),
    "pixels without end": (png(4, 4, chunk(b"IDAT", MANY_ZEROS)), None),
}


@pytest.mark.parametrize("image", IMAGES)
def test_images_take_what_their_headers_promise(image):
    content, message = IMAGES[image]
    with limited_memory(MORE // 2), pytest.raises(decode.BrokenImageError, match=message) if message else nullcontext():
        assert decode.decode(content).size == (4, 4)


def test_threads_together_decode_no_more_pixels_than_one_may(monkeypatch):
    file = io.BytesIO()
    Image.new("RGB", (100, 100)).save(file, "PNG")
    monkeypatch.setattr(decode, "_ROOM", decode._Room(25_000))
    inside, most = [], []

    def work(_):
        with decode.room_for(file.getvalue()):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.005)
            inside.pop()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(20)))
    assert max(most) == 2


def test_an_image_is_gone_when_its_room_is_given_back(tmp_path, monkeypatch):
    (tmp_path / "s/train/a").mkdir(parents=True)
    for number in range(5):
        Image.new("RGB", (9, 9)).save(tmp_path / f"s/train/a/{number}.png")
    decoded, left = [], []

    def watched(*given):
        image = decode.decode(*given)
        decoded.append(weakref.ref(image))
        return image

    @contextmanager
    def room(_):
        yield
        left.append(sum(image() is not None for image in decoded))

    monkeypatch.setattr(images, "decode", watched)
    monkeypatch.setattr(images, "room_for", room)
    folder.pack(tmp_path / "s", tmp_path / "d", PackOptions(size=(4, 4)))
    assert left == [0] * 5


@pytest.fixture
def gzipped(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 1), np.uint8)
    with writing(tmp_path / "d", Description("x", (4, 4, 1), ("a",)), compression=True) as writer:
        for split in ("train", "test"):
            writer.add(split, pixels, np.zeros(8, np.int64))
    return tmp_path / "d"


@pytest.mark.parametrize("name", ["images", "labels"])
def test_a_chunk_of_a_shard_that_holds_more_than_it_should(gzipped, name):
    """HDF5's own filter would decompress all of it."""
    path = gzipped / "test-00000.h5"
    with h5py.File(path, "r+") as file:
        dataset = file[name]
        dataset.id.write_direct_chunk((0,) * len(dataset.shape), MANY_ZEROS)
    entry = read_manifest(gzipped).splits["test"].shards[0].model_copy(update={"bytes": path.stat().st_size})
    with limited_memory(MORE // 2):
        (message,) = shards.damage(path, entry, (4, 4, 1), 1)
    assert "holds more or less than a chunk should" in message


def test_a_shard_that_takes_its_bytes_from_another_file_is_refused(gzipped, tmp_path):
    (tmp_path / "secret").write_bytes(bytes(128))
    with h5py.File(tmp_path / "odd.h5", "w") as file:
        file.create_dataset("images", (8, 4, 4, 1), np.uint8, external=[(str(tmp_path / "secret"), 0, 128)])
        with pytest.raises(ValueError, match="is not in the file in one piece"):
            shards.read_whole(file["images"])
        file.create_dataset("lzf", data=np.zeros(8), compression="lzf", chunks=(8,))
        with pytest.raises(ValueError, match="packed by the filters"):
            shards.read_whole(file["lzf"])


def test_what_the_library_itself_would_read_is_read(gzipped):
    with h5py.File(gzipped / "train-00000.h5") as file:
        assert read_chunk(file["images"], 0) == file["images"][()].tobytes()
        np.testing.assert_array_equal(shards.read_whole(file["labels"]), file["labels"][()])
    assert open_dataset(gzipped).load("train")[0].shape == (8, 4, 4, 1)


def test_archives_are_unpacked_beside_the_data_set_or_in_it_if_that_is_a_volume(tmp_path, monkeypatch):
    dst = tmp_path / "a/b"
    assert files._place_beside(dst) == tmp_path
    dst.mkdir(parents=True)
    assert files._place_beside(dst) == tmp_path / "a"
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "access", lambda *_: False)
        assert files._place_beside(dst) == dst
        assert files._place_beside(dst / "c") == dst
    real_stat = Path.stat
    monkeypatch.setattr(
        Path,
        "stat",
        lambda self, **k: (
            SimpleNamespace(st_dev=7, st_mode=real_stat(dst).st_mode) if self == dst else real_stat(self, **k)
        ),
    )
    assert files._place_beside(dst) == dst

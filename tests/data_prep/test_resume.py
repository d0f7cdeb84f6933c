"""After a pack is killed or the disk is full, the next pack resumes and ends with the same bytes, for every source."""

import errno
import io
import os
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image

from arraytp.cli import main
from arraytp.data import writer
from arraytp.data.dataset import open_dataset
from arraytp.data_prep import batches, decode, files, imagenet32
from arraytp.errors import UserError

GENERATOR = np.random.default_rng(0)
BYTES = {"dtype": np.uint8}


def idx_files(root):
    for split, count in (("train", 11), ("t10k", 5)):
        images = GENERATOR.integers(0, 256, (count, 28, 28), **BYTES)
        head = bytes((0, 0, 8, 3)) + b"".join(int(n).to_bytes(4, "big") for n in images.shape)
        (root / f"{split}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        labels = GENERATOR.integers(0, 10, count, **BYTES)
        head = bytes((0, 0, 8, 1)) + count.to_bytes(4, "big")
        (root / f"{split}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())


def cifar_files(root):
    for name in [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]:
        rows = GENERATOR.integers(0, 256, (3, 3073), **BYTES)
        rows[:, 0] %= 10
        (root / f"{name}.bin").write_bytes(rows.tobytes())


def imagenet32_files(root):
    for name in [*(f"train_data_batch_{n}" for n in range(1, 11)), "val_data"]:
        rows = GENERATOR.integers(0, 256, (2, 3072), **BYTES)
        (root / name).write_bytes(pickle.dumps({"data": rows, "labels": [3, 1000]}, protocol=2))


def image_files(root):
    for split, count in (("train", 15), ("test", 5)):
        for number in range(count):
            file = io.BytesIO()
            Image.fromarray(GENERATOR.integers(0, 256, (8, 8, 3), **BYTES)).save(file, "PNG")
            path = root / split / "ab"[number % 2] / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.getvalue() if number % 4 else b"broken")


SOURCES = {
    "mnist": (idx_files, ["--shard-images=3"]),
    "cifar10": (cifar_files, ["--shard-images=4", "--compression=gzip"]),
    "imagenet32": (imagenet32_files, ["--shard-images=6"]),
    "folder": (image_files, ["--shard-images=3", "--max-skipped=9"]),
}

# Packs that kill themselves at their first flush to disk, third flush and so on, each in a folder of its own; they are
# forked, since importing takes longer than packing. The first pack that is not killed is the last.
KILLER = textwrap.dedent("""
    import os, signal, sys
    import arraytp.commands.data
    from arraytp.cli import main
    *arguments, folder = sys.argv[1:]
    flush = os.fsync
    for last in range(1, 100, 2):
        child = os.fork()
        if not child:
            def fsync(handle):
                global last
                last -= 1
                if not last:
                    os.kill(os.getpid(), signal.SIGKILL)
                flush(handle)
            os.fsync = fsync
            os._exit(main([*arguments[:4], f"{folder}/{last}", *arguments[4:]]))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status != -signal.SIGKILL:
            sys.exit(status)
""")


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(params=SOURCES)
def source(request, tmp_path):
    """Pack a small source into `tmp_path/whole`; return the command's arguments without the destination."""
    write, options = SOURCES[request.param]
    (tmp_path / "s").mkdir()
    write(tmp_path / "s")
    arguments = ["data", "pack", request.param, str(tmp_path / "s"), *options]
    assert main([*arguments[:4], str(tmp_path / "whole"), *options]) == 0
    return arguments


def pack(arguments, folder):
    return main([*arguments[:4], str(folder), *arguments[4:]])


def test_a_pack_killed_anywhere_goes_on_and_ends_with_the_same_bytes(tmp_path, source, monkeypatch):
    killed = tmp_path / "killed"
    subprocess.run([sys.executable, "-c", KILLER, *source, str(killed)], check=True, stdout=subprocess.DEVNULL)
    expected = content(tmp_path / "whole")
    shards = [name for name in expected if name.endswith(".h5")]
    assert len(shards) >= 4
    written = []
    write_shard = writer.write_shard
    monkeypatch.setattr(
        writer, "write_shard", lambda path, *a, **k: (written.append(path), write_shard(path, *a, **k))[1]
    )
    folders = sorted(int(path.name) for path in killed.iterdir())[:-1]
    # Flushes: for each shard its file, the folder and the journal; the journal's head; dataset.json and the folder.
    assert len(folders) >= (3 * len(shards) + 3) // 2
    for number in folders:
        folder = killed / str(number)
        finished = "dataset.json" in content(folder)
        before = len(written)
        if not finished:
            with pytest.raises(UserError, match=r"dataset\.json: not found"):
                open_dataset(folder)
            assert pack(source, folder) == 0
            # Shards that were finished before the kill are kept.
            assert len(written) - before <= len(shards) - (number - 2) // 3
        assert {name: text for name, text in content(folder).items() if name[0] != "."} == expected


@pytest.mark.parametrize("failing", [1, 2, 4])
def test_a_full_disk_is_one_error_and_the_next_pack_goes_on(tmp_path, source, capsys, monkeypatch, failing):
    calls = []

    def replace(partial, path):
        calls.append(path.name)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(partial))
        return os.replace(partial, path)

    monkeypatch.setattr("pathlib.Path.replace", replace)
    capsys.readouterr()
    assert pack(source, tmp_path / "d") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "d: cannot be written: No space left on device; make room and run the same pack again" in error
    assert set(content(tmp_path / "d")) == {".arraytp-pack", *calls[:-1]}
    assert pack(source, tmp_path / "d") == 0
    assert calls.count(calls[0]) == (2 if failing == 1 else 1)
    assert content(tmp_path / "d") == content(tmp_path / "whole")


def test_a_source_that_changed_since_is_packed_from_the_start(tmp_path, source, monkeypatch):
    killer = KILLER.replace("range(1, 100, 2)", "[9]")
    subprocess.run([sys.executable, "-c", killer, *source, str(tmp_path)], check=False, stdout=subprocess.DEVNULL)
    assert len([name for name in content(tmp_path / "9") if name.endswith(".h5")]) == 3
    changed = max(path for path in (tmp_path / "s").rglob("*") if path.is_file())
    status = changed.stat()
    if source[2] in ("mnist", "cifar10"):
        # Changes of these sources are detected by content, of the others by size and time.
        changed.write_bytes(changed.read_bytes()[:-1] + b"\7")
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    written = []
    write_shard = writer.write_shard
    monkeypatch.setattr(writer, "write_shard", lambda *a, **k: (written.append(a), write_shard(*a, **k))[1])
    assert pack(source, tmp_path / "9") == 0
    assert len(written) == len([name for name in content(tmp_path / "9") if name.endswith(".h5")])


def refuse_to_read(bad, number, monkeypatch):
    """Make reading a file fail with a system error."""
    read = files._read_whole

    def refuse(path):
        if path == bad:
            raise OSError(number, os.strerror(number), str(path))
        return read(path)

    monkeypatch.setattr(files, "_read_whole", refuse)


def run_out_of_memory(path, monkeypatch):
    """Make memory run out when an image is decoded."""
    pixels, upright = Image.open(path).tobytes(), decode._upright

    def refuse(image):
        if image.tobytes() == pixels:
            raise MemoryError
        return upright(image)

    monkeypatch.setattr(decode, "_upright", refuse)


SYSTEM_ERRORS = (errno.ESTALE, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT)


@pytest.mark.parametrize("number", [*SYSTEM_ERRORS, None], ids=[*map(errno.errorcode.get, SYSTEM_ERRORS), "memory"])
def test_an_image_that_the_system_does_not_give_is_not_broken_and_the_next_pack_goes_on(
    tmp_path, capsys, monkeypatch, number
):
    src = tmp_path / "s"
    image_files(src)
    arguments = ["data", "pack", "folder", str(src), *SOURCES["folder"][1]]
    assert pack(arguments, tmp_path / "whole") == 0
    capsys.readouterr()
    bad = src / "test/b/03.png"
    with monkeypatch.context() as patch:
        if number is None:
            run_out_of_memory(bad, patch)
        else:
            refuse_to_read(bad, number, patch)
        assert pack(arguments, tmp_path / "d") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert ("not enough memory" if number is None else f"cannot be read: {os.strerror(number)}; the same") in error
    assert set(content(tmp_path / "d")) == {".arraytp-pack", "train-00000.h5", "train-00001.h5", "train-00002.h5"}
    kept_file = (tmp_path / "d/train-00002.h5").stat()
    assert pack(arguments, tmp_path / "d") == 0
    assert (tmp_path / "d/train-00002.h5").stat().st_ino == kept_file.st_ino
    assert content(tmp_path / "d") == content(tmp_path / "whole")


@pytest.mark.parametrize("failing", ["open", "middle", "memory"])
def test_a_batch_that_the_system_does_not_give_keeps_the_shards_before_it(tmp_path, monkeypatch, failing, capsys):
    (tmp_path / "s").mkdir()
    imagenet32_files(tmp_path / "s")
    arguments = ["data", "pack", "imagenet32", str(tmp_path / "s"), *SOURCES["imagenet32"][1]]
    read_batch = imagenet32.read_batch
    gone = OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def refuse(file, path, *rest):
        if path.name != "val_data":
            return read_batch(file, path, *rest)
        if failing == "open":
            raise gone

        def lost(unpickler):
            raise MemoryError if failing == "memory" else gone

        with monkeypatch.context() as patch:
            patch.setattr(batches._Unpickler, "load", lost)
            return read_batch(file, path, *rest)

    monkeypatch.setattr(imagenet32, "read_batch", refuse)
    assert pack(arguments, tmp_path / "d") == 2
    words = "damaged, or larger than the memory that is free" if failing == "memory" else gone.strerror
    assert f"val_data: {'' if failing == 'memory' else 'cannot be read: '}{words}" in capsys.readouterr().err
    assert "train-00002.h5" in content(tmp_path / "d")


def test_a_pack_into_its_own_source_goes_on_whatever_else_grows_there(tmp_path, capsys, monkeypatch):
    image_files(tmp_path)
    arguments = ["data", "pack", "folder", str(tmp_path), *SOURCES["folder"][1]]
    written, write_shard = [], writer.write_shard

    def full(path, *rest, **options):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        written.append(path.name)
        return write_shard(path, *rest, **options)

    monkeypatch.setattr(writer, "write_shard", full)
    assert pack(arguments, tmp_path / "d") == 2
    assert "run the same pack again" in capsys.readouterr().err
    (tmp_path / "pack.log").write_text("no room")
    monkeypatch.setattr(
        writer, "write_shard", lambda path, *a, **k: (written.append(path.name), write_shard(path, *a, **k))[1]
    )
    assert pack(arguments, tmp_path / "d") == 0
    assert len(written) == len(set(written)) == len(list((tmp_path / "d").glob("*.h5")))


def test_what_a_network_file_system_keeps_of_a_removed_file_is_not_someone_elses(tmp_path):
    image_files(tmp_path / "s")
    (tmp_path / "d").mkdir()
    (tmp_path / "d/.nfs0000000000a1b2c300000001").write_text("an archive that is being unpacked")
    assert pack(["data", "pack", "folder", str(tmp_path / "s"), *SOURCES["folder"][1]], tmp_path / "d") == 0
    (tmp_path / "e").mkdir()
    (tmp_path / "e/.nfs-notes").write_text("someone else's")
    assert pack(["data", "pack", "folder", str(tmp_path / "s"), *SOURCES["folder"][1]], tmp_path / "e") == 2

import contextlib
import errno
import resource
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest

import arraytp.data.writer as writer_module
from arraytp import disk
from arraytp.data.dataset import open_dataset
from arraytp.data.writer import Description, writing
from arraytp.errors import UserError

DESCRIPTION = Description("x", (2, 2, 1), ("a", "b"))
MARKER = ".arraytp-pack"
NINE = np.random.default_rng(0).integers(0, 256, (9, 2, 2, 1), dtype=np.uint8)
NINE_LABELS = np.arange(9) % 2
IMAGES, LABELS = np.zeros((4, 2, 2, 1), np.uint8), np.array([0, 1, 0, 1])


def interrupted(folder, rows, description=DESCRIPTION):
    """Pack the first `rows` of nine rows in shards of two, and interrupt the pack."""
    with contextlib.suppress(KeyboardInterrupt), writing(folder, description, shard_images=2) as writer:
        rest = slice(writer.taken("train"), rows)
        writer.add("train", NINE[rest], NINE_LABELS[rest])
        (folder / "train-00004.h5.partial").write_bytes(b"half")
        raise KeyboardInterrupt


def packed(folder, description=DESCRIPTION):
    """Pack nine rows in shards of two; return how many of them an earlier pack had not finished."""
    with writing(folder, description, shard_images=2) as writer:
        rest = slice(writer.taken("train"), None)
        writer.add("train", NINE[rest], NINE_LABELS[rest])
    return len(NINE[rest])


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_interrupted_pack_cannot_be_opened_and_the_next_goes_on(tmp_path):
    interrupted(tmp_path / "d", 7)
    with pytest.raises(UserError, match=r"dataset.json: not found"):
        open_dataset(tmp_path / "d")
    assert packed(tmp_path / "d") == 3
    assert packed(tmp_path / "e") == 9
    assert content(tmp_path / "d") == content(tmp_path / "e")
    assert len(content(tmp_path / "d")) == 6


@pytest.mark.parametrize("change", [{"name": "y"}, {"fingerprint": "z"}, {"source": {"seed": 1}}])
def test_what_is_left_of_another_pack_is_replaced(tmp_path, change):
    interrupted(tmp_path / "d", 7)
    other = replace(DESCRIPTION, **change)
    assert packed(tmp_path / "d", other) == 9
    packed(tmp_path / "e", other)
    assert content(tmp_path / "d") == content(tmp_path / "e")


def test_a_journal_cut_short_anywhere_costs_no_more_than_what_it_does_not_tell(tmp_path):
    interrupted(tmp_path / "d", 6)
    packed(tmp_path / "e")
    journal = (tmp_path / "d" / MARKER).read_bytes()
    ends = [end for end, byte in enumerate(journal, 1) if byte == ord("\n")]
    assert len(ends) == 4
    for length in sorted({0, 1, *(end + step for end in ends for step in (-1, 0, 1, 40)), len(journal)}):
        shutil.copytree(tmp_path / "d", tmp_path / "copy")
        (tmp_path / "copy" / MARKER).write_bytes(journal[:length])
        told = max(0, sum(end <= length for end in ends) - 1)
        if length % 2:
            interrupted(tmp_path / "copy", 8)
            told = 4
        assert packed(tmp_path / "copy") == 9 - 2 * told
        assert content(tmp_path / "copy") == content(tmp_path / "e")
        shutil.rmtree(tmp_path / "copy")


@pytest.mark.parametrize("damage", ["gone", "cut", "flipped"])
def test_a_finished_shard_that_was_damaged_is_written_again(tmp_path, damage):
    interrupted(tmp_path / "d", 7)
    packed(tmp_path / "e")
    path = tmp_path / "d" / "train-00001.h5"
    whole = path.read_bytes()
    place = whole.index(NINE[2:4].tobytes())
    path.unlink()
    if damage != "gone":
        path.write_bytes(whole[:-9] if damage == "cut" else whole[:place] + b"\7" + whole[place + 1 :])
    assert packed(tmp_path / "d") == 7
    assert content(tmp_path / "d") == content(tmp_path / "e")


def test_a_full_disk_is_told_and_the_next_pack_goes_on(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    images = np.zeros((2, 64, 64, 1), np.uint8)
    description = replace(DESCRIPTION, shape=images.shape[1:])

    def pack_with_room_for_one():
        with writing(tmp_path / "d", description, shard_images=1) as writer:
            writer.add("train", images[:1], LABELS[:1])
            while not (tmp_path / "d" / "train-00000.h5").exists():
                time.sleep(0.001)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
            writer.add("train", images[1:], LABELS[1:2])

    try:
        with pytest.raises(UserError, match=r"d: cannot be written: File too large; make room and run the same pack"):
            pack_with_room_for_one()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert set(content(tmp_path / "d")) == {MARKER, "train-00000.h5"}
    with writing(tmp_path / "d", description, shard_images=1) as writer:
        assert writer.taken("train") == 1
        writer.add("train", images[1:], LABELS[1:2])
    assert open_dataset(tmp_path / "d").counts == {"train": 2}


def test_shards_beyond_memory_are_refused_and_leave_nothing(tmp_path):
    with (
        pytest.raises(
            UserError, match=r"d: two shards of 4611686018427387904 images of .* use a smaller --shard-images"
        ),
        writing(tmp_path / "d", DESCRIPTION, shard_images=2**62),
    ):
        pass
    assert not (tmp_path / "d").exists()


def test_an_exception_leaves_nothing(tmp_path):
    def fail():
        with writing(tmp_path / "d", DESCRIPTION, shard_images=2) as writer:
            writer.add("train", IMAGES, LABELS)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("name", ["notes.txt", "train-00000.h5", "dataset.json.partial"])
def test_a_folder_with_foreign_files_is_refused_and_left_alone(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"not empty .it holds '{name}'"), writing(tmp_path, DESCRIPTION):
        pass
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_a_foreign_file_beside_leftovers_is_refused(tmp_path):
    (tmp_path / ".arraytp-pack").touch()
    (tmp_path / "train-00000.h5").touch()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"it holds 'notes.txt'"), writing(tmp_path, DESCRIPTION):
        pass
    assert len(list(tmp_path.iterdir())) == 3


def test_a_finished_data_set_is_not_overwritten(tiny):
    before = (tiny.folder / "dataset.json").read_bytes()
    with pytest.raises(UserError, match="already holds a data set"), writing(tiny.folder, DESCRIPTION):
        pass
    assert (tiny.folder / "dataset.json").read_bytes() == before


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "d").write_text("")
    with (
        pytest.raises(UserError, match=r"d: is a file; .* needs a folder"),
        writing(tmp_path / "d", DESCRIPTION),
    ):
        pass


def test_two_packs_into_one_folder_are_refused(tmp_path):
    with writing(tmp_path, DESCRIPTION) as writer:
        writer.add("train", IMAGES, LABELS)
        with pytest.raises(UserError, match="another process is packing"), writing(tmp_path, DESCRIPTION):
            pass
    assert open_dataset(tmp_path).counts == {"train": 4}


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file.*cannot be written"), writing(tmp_path / "file" / "d", DESCRIPTION):
        pass


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES, np.array([0, 1, 2, 0]), "train: label 2 is out of range, expected 0 to 1"),
        (IMAGES, np.array([0, 1, -1, 0]), "train: label -1 is out of range"),
        (IMAGES, LABELS[:3], "with labels"),
        (np.zeros((4, 2, 3, 1), np.uint8), LABELS, "expected uint8"),
        (IMAGES.astype(float), LABELS, "expected uint8"),
    ],
)
def test_images_and_labels_that_do_not_fit_are_refused(tmp_path, images, labels, message):
    with pytest.raises(UserError, match=message), writing(tmp_path, DESCRIPTION) as writer:
        writer.add("train", images, labels)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("split", "count"), [("test", 4), ("train", 0)])
def test_a_data_set_without_train_images_is_refused(tmp_path, split, count):
    with pytest.raises(UserError, match="no image for split 'train'"), writing(tmp_path, DESCRIPTION) as writer:
        writer.add(split, IMAGES[:count], LABELS[:count])


def test_a_shard_that_is_slowly_written_holds_its_own_images(tmp_path, monkeypatch):
    """The next images are added while the shard is being written."""
    write_shard = writer_module.write_shard

    def slowly(*arguments, **options):
        time.sleep(0.02)
        return write_shard(*arguments, **options)

    monkeypatch.setattr(writer_module, "write_shard", slowly)
    with writing(tmp_path / "d", DESCRIPTION, shard_images=2) as writer:
        for row in range(9):
            writer.add("train", NINE[row : row + 1], NINE_LABELS[row : row + 1])
    dataset = open_dataset(tmp_path / "d")
    images, labels = dataset.load("train")
    np.testing.assert_array_equal(images, NINE)
    np.testing.assert_array_equal(labels, NINE_LABELS)
    np.testing.assert_allclose(dataset.mean, (NINE / 255).mean(axis=(0, 1, 2)), rtol=1e-14)


def test_an_error_of_the_writing_thread_is_the_packs(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise ValueError("no shard")

    monkeypatch.setattr(writer_module, "write_shard", fail)
    with (
        pytest.raises(ValueError, match="no shard"),
        writing(tmp_path / "d", DESCRIPTION, shard_images=2) as writer,
    ):
        writer.add("train", NINE, NINE_LABELS)
    assert not (tmp_path / "d").exists()


def test_a_pack_killed_at_its_very_end_is_the_same_packs_to_finish(tmp_path):
    packed(tmp_path / "e")
    interrupted(tmp_path / "d", 9)
    shutil.copy(tmp_path / "e" / "dataset.json", tmp_path / "d")
    with pytest.raises(UserError, match=r"d: already holds a data set"):
        packed(tmp_path / "d", replace(DESCRIPTION, name="y"))
    packed(tmp_path / "d")
    assert content(tmp_path / "d") == content(tmp_path / "e")


def test_a_pack_that_another_has_finished_meanwhile_is_refused_and_leaves_no_journal(tiny, monkeypatch):
    """The other pack finishes between this one's first check of the folder and its lock."""
    looks, refuse = iter([True]), writer_module._refuse_foreign_files
    monkeypatch.setattr(
        writer_module, "_refuse_foreign_files", lambda folder: None if next(looks, False) else refuse(folder)
    )
    before = sorted(path.name for path in tiny.folder.iterdir())
    with pytest.raises(UserError, match="already holds a data set"), writing(tiny.folder, DESCRIPTION):
        pass
    assert sorted(path.name for path in tiny.folder.iterdir()) == before


def test_a_file_system_without_locks_takes_a_pack(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(disk.fcntl, "flock", refuse)
    with writing(tmp_path / "d", DESCRIPTION) as writer:
        writer.add("train", IMAGES, LABELS)
    assert open_dataset(tmp_path / "d").counts["train"] == len(IMAGES)

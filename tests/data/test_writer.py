import subprocess
import sys
import textwrap

import numpy as np
import pytest

from arraytp.data.dataset import open_dataset
from arraytp.data.writer import Description, writing
from arraytp.errors import UserError

DESCRIPTION = Description("x", (2, 2, 1), ("a", "b"))
IMAGES, LABELS = np.zeros((4, 2, 2, 1), np.uint8), np.array([0, 1, 0, 1])


def test_a_killed_pack_cannot_be_opened_and_is_replaced_by_the_next(tmp_path):
    program = f"""
        import os
        import numpy as np
        from pathlib import Path
        from arraytp.data.writer import Description, writing
        with writing(Path({str(tmp_path)!r}), Description("x", (2, 2, 1), ("a", "b")), shard_images=2) as writer:
            writer.add("train", np.ones((9, 2, 2, 1), np.uint8), np.zeros(9, np.int64))
            (Path({str(tmp_path)!r}) / "train-00004.h5.tmp").write_bytes(b"half")
            os._exit(9)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False).returncode == 9
    assert (tmp_path / "train-00003.h5").exists()
    with pytest.raises(UserError, match=r"dataset.json: not found"):
        open_dataset(tmp_path)
    with writing(tmp_path, DESCRIPTION) as writer:
        writer.add("train", IMAGES, LABELS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset.json", "train-00000.h5"]
    assert open_dataset(tmp_path).counts == {"train": 4}


def test_an_exception_leaves_nothing(tmp_path):
    def fail():
        with writing(tmp_path / "d", DESCRIPTION, shard_images=2) as writer:
            writer.add("train", IMAGES, LABELS)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list((tmp_path / "d").iterdir()) == []


@pytest.mark.parametrize("name", ["notes.txt", "train-00000.h5", "dataset.json.tmp"])
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

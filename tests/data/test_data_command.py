import json
import shutil
from pathlib import Path

import h5py
import pytest

from arraytp.cli import main


def test_info_describes_an_embedded_set(capsys):
    assert main(["data", "info", "fashion-mnist-10k"]) == 0
    text = capsys.readouterr().out
    for part in ("fashion-mnist-10k", "28 x 28 pixels, 1 channel", "Ankle boot", "10,000 images in 1 shard"):
        assert part in text


def test_info_can_be_read_by_programs(tiny, capsys):
    assert main(["data", "info", str(tiny.folder), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["shape"] == [5, 4, 3]
    assert document["splits"]["train"]["count"] == 600


def test_check_of_a_whole_set_says_so(tiny, capsys):
    assert main(["data", "check", str(tiny.folder)]) == 0
    assert capsys.readouterr().out == "tiny: 600 train, 70 test images verified, no damage\n"


def test_check_lists_all_damage_and_exits_with_2(tiny, tmp_path, capsys):
    folder = tmp_path / "d"
    shutil.copytree(tiny.folder, folder)
    (folder / "test-00000.h5").unlink()
    for name, row in (("train-00000.h5", 0), ("train-00002.h5", 99)):
        with h5py.File(folder / name, "r+") as file:
            file["images"][row] ^= 1
    assert main(["data", "check", str(folder)]) == 2
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) == 3
    assert "train-00000.h5: rows 0 to 249 do not match their checksum" in lines[0]
    assert "train-00002.h5: rows 0 to 99 do not match their checksum" in lines[1]
    assert "test-00000.h5: shard is missing" in lines[2]
    assert "3 problems found" in printed.err
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "/nowhere"], "no such folder"),
        (["info", "/nowhere"], "no such folder"),
        (["pack", "cifar", ".", "x"], "mnist"),
        (["pack", "mnist", "/nowhere", "x"], "/nowhere: no such folder"),
        (["pack", "mnist", "/usr", "x"], "/usr: no train-images-idx3-ubyte"),
        (["pack", "mnist", ".", "x", "--limit", "train"], "'train' is not like train=10000"),
        (["pack", "mnist", ".", "x", "--limit", "val=5"], "--limit val=5: there is no split 'val'"),
        (["pack", "mnist", ".", "x", "--limit", "train=0"], "'train=0' is not like train=10000"),
        (["pack", "mnist", ".", "x", "--limit", "train=5", "--limit", "train=6"], "'train=6' after train=5: one limit"),
        (["pack", "mnist", ".", "x", "--name", ""], "'' is not a name"),
        (["pack", "mnist", ".", "x", "--name", "a\nb"], "is not a name of printable characters"),
        (["pack", "mnist", ".", "x", "--seed", "99999999999999999999"], "--seed"),
        (["pack", "mnist", ".", "x", "--shard-images", "0"], "--shard-images"),
        (["pack", "mnist", ".", "x", "--seed", "-1"], "--seed"),
        (["pack", "folder", ".", "x", "--resize", "stretch"], "--resize says how images get the size of --size"),
        (["pack", "mnist", ".", "x", "--compression", "zip"], "--compression"),
    ],
)
def test_mistakes_exit_with_2_and_leave_nothing(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["data", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert list(Path().iterdir()) == []


def test_the_help_of_pack_shows_a_line_for_each_source(capsys):
    assert main(["data", "pack", "--help"]) == 0
    text = capsys.readouterr().out
    assert "\b" not in text
    assert "\\b" not in text
    lines = [line.split("  ")[1] for line in text.partition("DST.\n")[2].partition("Options:")[0].splitlines() if line]
    assert [line for line in lines if line] == [
        "mnist, fashion-mnist, kmnist",
        "cifar10, cifar100",
        "imagenet",
        "imagenet32",
        "folder",
    ]

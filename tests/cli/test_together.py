"""Several commands on one folder at once: one of them writes, the others wait or are refused, and nothing is lost."""

import errno
import fcntl
import itertools
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from arraytp import disk, files
from arraytp.commands import holding, run
from arraytp.commands.holding import LOCK_NAME
from arraytp.disk import HeldError, open_locked, remove_locked

MAIN = "import sys; from arraytp.cli import main; sys.exit(main())"
EPOCHS = ["--set", "train.epochs=20"]


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-c", MAIN, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(processes):
    """Wait for processes; check that each did its work or says in one line why not."""
    for process in processes:
        _, err = process.communicate(timeout=60)
        assert process.returncode in (0, 2), err
        if process.returncode:
            assert len(err.splitlines()) == 1, err
            assert err.startswith("arraytp: error: "), err


@pytest.fixture
def hold():
    """Lock files as another process would: a lock belongs to the open file, not to the process."""
    files = []

    def call(path):
        files.append((open_locked(path)[0], path))
        return files[-1]

    yield call
    for file, path in files:
        if not file.closed:
            remove_locked(file, path)


@pytest.mark.parametrize("flags", [(), ("--resume",), ("--fresh",)], ids=["run", "resume", "fresh"])
def test_a_folder_that_a_run_is_writing_to_is_refused(arraytp, refused, place, hold, flags):
    """Two runs that write one folder would mix their tables."""
    arraytp("run", "toy.yml", "--quiet")
    held = hold(place / "results/toy" / LOCK_NAME)
    assert "another run is writing here" in refused("run", "toy.yml", "--quiet", *flags)
    remove_locked(*held)
    assert arraytp("run", "toy.yml", "--quiet", *(flags or ("--resume",))).status == 0


@pytest.mark.parametrize("config", ["toy", "variants"])
@pytest.mark.parametrize("flags", [(), ("--resume",), ("--fresh",)], ids=["run", "resume", "fresh"])
def test_a_run_that_comes_first_while_another_starts_keeps_its_files(arraytp, place, hold, monkeypatch, config, flags):
    """Its files appear after the other has checked the folder: `--fresh` once cleared them before it was refused."""
    folders = [place / "results" / name for name in (["toy"] if config == "toy" else ["variants/bp", "variants/dfa"])]
    build = run.build_planned

    def overtaken(*arguments):
        # Take the last folder: `--fresh` clears several at once, and may clear only those that it holds.
        for name in ("config.yml", "metrics.csv", "checkpoint.h5"):
            folders[-1].mkdir(parents=True, exist_ok=True)
            (folders[-1] / name).write_text("of the first")
        if not (folders[-1] / LOCK_NAME).exists():
            hold(folders[-1] / LOCK_NAME)
        return build(*arguments)

    monkeypatch.setattr(run, "build_planned", overtaken)
    outcome = arraytp("run", f"{config}.yml", "--quiet", *flags)
    assert outcome.status == 2
    assert f"{folders[-1].name}: another run is writing here" in outcome.err
    for name in ("config.yml", "metrics.csv", "checkpoint.h5"):
        assert (folders[-1] / name).read_text() == "of the first"


def test_all_commands_at_once_leave_one_whole_run(arraytp, place, numbers):
    words = [["run", "toy.yml", "--quiet", *EPOCHS, *flags] for flags in ([], ["--fresh"], ["--resume"])]
    ended([start(*command) for command in [*words, ["report", "results/toy"], *words[1:]]])
    outcome = arraytp("run", "toy.yml", "--quiet", "--resume", *EPOCHS)
    assert (outcome.status, outcome.err) == (0, "")
    arraytp("run", "toy.yml", "--quiet", "--out", "whole", *EPOCHS)
    assert numbers(place / "results/toy") == numbers(place / "whole")
    assert not [path for path in place.rglob("*") if path.name.endswith((".partial", LOCK_NAME))]


def test_reports_at_once_all_write_the_same_files(arraytp, place):
    arraytp("run", "toy.yml", "--quiet")
    reports = [start("report", "results/toy", "--out", "out") for _ in range(2)]
    for report in reports:
        _, err = report.communicate(timeout=60)
        assert report.returncode == 0, err
    assert not list(place.rglob("*.partial"))


@pytest.fixture
def images(place):
    """Write a tree of images that takes some hundred milliseconds to pack."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for split, count in (("train", 100), ("test", 20)):
        for n in range(count):
            path = place / f"images/{split}/class-{n % 2}/{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.roll(pixels, n)).save(path)
    return place / "images"


def test_a_writer_waits_for_another_of_the_same_file(tmp_path, hold, monkeypatch):
    path = tmp_path / "table"
    path.write_bytes(b"former")
    held = hold(tmp_path / "table.partial")
    monkeypatch.setattr(files, "_PATIENCE", 0.05)
    with pytest.raises(OSError, match="another process is writing it"):
        files.write_file(path, b"late")
    assert path.read_bytes() == b"former"
    pauses = iter([lambda: None, lambda: remove_locked(*held)])
    monkeypatch.setattr(files, "_PATIENCE", 60)
    monkeypatch.setattr("time.sleep", lambda _: next(pauses)())
    files.write_file(path, b"late")
    assert path.read_bytes() == b"late"
    assert os.listdir(tmp_path) == ["table"]


def test_a_lock_on_a_file_that_has_moved_on_is_no_lock(tmp_path, monkeypatch):
    """A process that opens the file just before its owner removes it must not lock a file that no other can see."""
    path = tmp_path / "lock"
    first, _ = open_locked(path)
    flock = fcntl.flock
    calls = itertools.count()

    def removed_in_between(file, how):
        if next(calls) == 0:
            remove_locked(first, path)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", removed_in_between)
    file, locked = open_locked(path)
    with file:
        assert locked
        with pytest.raises(HeldError):
            open_locked(path)


NO_LOCKS = [errno.ENOLCK, errno.EIO, errno.EOPNOTSUPP, errno.ENOSYS, 524]


@pytest.mark.parametrize("number", NO_LOCKS)
def test_without_locks_a_run_says_so_and_works(arraytp, place, monkeypatch, number):
    """Network file systems have many ways to say that they have no locks."""

    def refuse(*_):
        raise OSError(number, "no locks")

    monkeypatch.setattr(disk.fcntl, "flock", refuse)
    outcome = arraytp("run", "toy.yml", "--quiet")
    assert outcome.status == 0
    assert outcome.err == (
        "arraytp: note: results/toy: this file system has no locks; do not start a second run here\n"
    )
    assert not [path for path in place.rglob("*") if path.name.endswith((".partial", LOCK_NAME))]


def test_a_finished_run_in_a_folder_that_cannot_be_written_is_shown(arraytp, monkeypatch):
    arraytp("run", "toy.yml", "--quiet", figures=True)

    def refuse(_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(holding, "open_locked", refuse)
    outcome = arraytp("run", "toy.yml", "--quiet", "--resume")
    assert (outcome.status, outcome.err) == (0, "")


def test_packs_at_once_make_one_whole_data_set(arraytp, place, images):
    words = ["data", "pack", "folder", "images", "packed"]
    ended([start(*words) for _ in range(3)])
    assert arraytp("data", "check", "packed").status == 0
    assert not (place / "packed/.arraytp-pack").exists()


def test_a_command_holds_more_folders_than_files_may_be_open_at_first(tmp_path):
    """With 1,000 seeds of a few variants, every folder is held, but usually only 1,024 files may be open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    folders = [tmp_path / str(n) for n in range(100)]
    for folder in folders:
        folder.mkdir()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (80, hard))
        with holding.Holds() as held:
            for folder in folders:
                held.take(folder)
            assert all((folder / LOCK_NAME).exists() for folder in folders)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

"""A thousand damaged configs and command lines end soon, with status 0 or 2, a line per mistake and no traceback.

The mutations are the same in every run. The names of the tests say what is mutated.
"""

import os
import random
import resource
import time

import pytest

from arraytp.commands import run as run_command

SEED = 17
MOST_SECONDS = 5.0
MOST_BYTES = 2**30
MOST_PROBLEMS = 11
LONGEST = 4000
SCALARS = (
    *("0", "-1", "1e309", ".nan", "-.inf", "9223372036854775808", "1e-400", "0x10", "1_000", "true", "no", "~", "''"),
    *('"\\U00110000"', '"\\ud800"', '"\\x00"', '"\\e[31m"', "!!binary aGk=", "!!python/object:os.system {}", "&a [*a]"),
    *("[]", "{}", "[[[[[[]]]]]]", "{a: {a: {a: {}}}}", "? [a]\n: b", "<<: *x", "|\n  text", "2001-01-01", "1:30"),
    *("k" * 100_000, '"' + "v " * 50_000 + '"', "[" + "1," * 2000 + "]", "💥", "\u2028", "a: b: c", "%YAML 2.0", "---"),
)
KEYS = (
    *("name", "seed", "dtype", "backend", "data.dataset", "data.normalize", "data.flip", "network.blocks", "rule"),
    *("network.blocks.0.kernel", "network.blocks.1.units", "rule.name", "optimizer", "optimizer.lr", "train.epochs"),
    *("train.batch_size", "compare.every", "study", "variants", "variants.a.seed", "loss.reduction", "schedule.name"),
    *("", ".", "a..b", "k" * 100_000, "\n", "\x1b[31m", "data\x00", "💥", "network.blocks.99999999999999999999.units"),
)
PIECES = (
    "{",
    "}",
    "[",
    "]",
    ":",
    "- ",
    "\t",
    "\n",
    "#",
    "&a ",
    "*a",
    "!!str ",
    "'",
    '"',
    "|",
    ">",
    "\x00",
    "\ufeff",
    "\r",
    "? ",
)
PATHS = (
    *("toy.yml", "variants.yml", "nowhere", "", ".", "..", "/", "toy", "loop", "pipe", "loop/x", "toy.yml/x", "\udcff"),
    *(
        "a\nb",
        "k" * 300,
        "k/" * 3000,
        "/dev/null",
        "/dev/zero",
        "/proc/self/mem",
        "big.yml",
        "~",
        "-",
        "--",
        "toy\x1b[2J",
    ),
)
COMMANDS = (
    ["run", "PATH", "--quiet"],
    ["run", "toy.yml", "--quiet", "--out", "PATH"],
    ["run", "toy.yml", "--quiet", "--set", "KEY=VALUE"],
    ["run", "PATH", "--quiet", "--resume", "--fresh"],
    ["trace", "PATH", "--out", "t.h5"],
    ["trace", "toy.yml", "--out", "PATH"],
    ["trace", "toy.yml", "--out", "t.h5", "--weights", "PATH"],
    ["trace", "toy.yml", "--out", "t.h5", "--variant", "PATH"],
    ["report", "PATH"],
    ["data", "info", "PATH"],
    ["data", "check", "PATH"],
    ["data", "pack", "folder", "PATH", "packed"],
    ["data", "pack", "mnist", "PATH", "packed"],
    ["data", "pack", "cifar10", "PATH", "packed"],
    ["data", "pack", "imagenet", "PATH", "packed", "--devkit", "PATH"],
    ["data", "pack", "folder", "toy", "PATH"],
    ["data", "pack", "folder", "toy", "packed", "--limit", "VALUE", "--size", "VALUE"],
    ["bench", "PATH"],
    ["audit", "PATH"],
    ["bench", "nowhere", "--json", "PATH"],
    ["PATH", "VALUE"],
)


@pytest.fixture
def obeys(arraytp, place, monkeypatch):
    """Call the command line and check its status, messages, time and memory; accepted configs are not trained."""
    os.symlink("loop", place / "loop")
    os.mkfifo(place / "pipe")
    (place / "big.yml").write_bytes(b"a: 1\n" * 2_000_000)
    monkeypatch.setattr(run_command, "_run_all", lambda *_: None)
    monkeypatch.setattr(run_command, "_report", lambda *_: None)
    monkeypatch.setattr("arraytp.commands.trace.write_trace", lambda path, *_, **__: path.write_bytes(b"") and "")
    # Seconds to wait for a pipe's writer.
    monkeypatch.setattr("arraytp.disk._PATIENCE", 0.02)

    def call(*words):
        started, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            outcome = arraytp(*words)
        except Exception as error:
            raise AssertionError(f"{shown(words)}: {type(error).__name__}: {error}") from error
        lines = outcome.err.splitlines()
        assert outcome.status in (0, 2), shown(words)
        assert time.monotonic() - started < MOST_SECONDS, shown(words)
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024 < MOST_BYTES, shown(words)
        if outcome.status == 2:
            assert 1 <= len(lines) <= MOST_PROBLEMS, shown(words)
            for line in lines:
                assert line.startswith(("arraytp: error: ", "arraytp: note: ")), (shown(words), line)
                assert len(line) < LONGEST, shown(words)
                assert line.isprintable(), (shown(words), line)

    return call


def shown(words):
    return [word if len(word) < 200 else f"{word[:100]}… {len(word)}" for word in map(str, words)]


def mutated(text, draw):
    """Return a config in which, one to three times, something is replaced, cut out, duplicated or inserted."""
    for _ in range(draw.randint(1, 3)):
        lines = text.splitlines(keepends=True) or ["\n"]
        n = draw.randrange(len(lines))
        at = draw.randrange(len(text) + 1)
        action = draw.randrange(7)
        if action == 0:
            key, _, _ = lines[n].partition(":")
            lines[n] = f"{key}: {draw.choice(SCALARS)}\n"
            text = "".join(lines)
        elif action == 1:
            text = "".join([*lines[:n], draw.choice(lines), *lines[n:]])
        elif action == 2:
            text = text[:at] + draw.choice(PIECES) + text[at:]
        elif action == 3:
            text = text[:at] + text[at + draw.randint(1, 20) :]
        elif action == 4:
            text = text[:at]
        elif action == 5:
            text += f"{draw.choice(KEYS[:20])}: {draw.choice(SCALARS)}\n"
        else:
            text = text[:at] + chr(draw.randrange(1, 0x3000)) + text[at:]
    return text


@pytest.mark.parametrize("part", range(4))
def test_mutated_configs(obeys, place, part):
    draw = random.Random(SEED + part)
    originals = [(place / name).read_text() for name in ("toy.yml", "variants.yml")]
    for _ in range(125):
        content = mutated(draw.choice(originals), draw).encode("utf-8", "surrogatepass")
        if draw.random() < 0.1:
            at = draw.randrange(len(content) + 1)
            content = content[:at] + bytes([draw.randrange(256)]) + content[at:]
        (place / "mutant.yml").write_bytes(content)
        obeys("run", "mutant.yml", "--quiet", "--out", "results/mutant")


def test_mutated_overrides(obeys):
    draw = random.Random(SEED)
    for _ in range(250):
        settings = [f"{draw.choice(KEYS)}={draw.choice(SCALARS)}" for _ in range(draw.randint(1, 2))]
        obeys("run", "toy.yml", "--quiet", *(word for setting in settings for word in ("--set", setting)))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(words[:3]))
def test_mutated_arguments(obeys, command):
    draw = random.Random(SEED)
    for path in PATHS if "PATH" in command else draw.sample(SCALARS, 10):
        words = [
            word.replace("PATH", path).replace("KEY", draw.choice(KEYS)).replace("VALUE", draw.choice(SCALARS))
            for word in command
        ]
        if not any("\x00" in word for word in words):
            obeys(*words)

"""The command line as a whole: exit statuses, one-line errors, and no import that a command does not need."""

import os
import shlex
import signal
import subprocess
import sys
from types import ModuleType

import click
import pytest

from arraytp import __version__, cli
from arraytp.errors import Interrupted, NonFiniteError, UserError, UserErrors


@pytest.fixture
def probe(monkeypatch):
    """Replace all commands by one called `probe`, which calls the test's function."""

    def install(action):
        module = ModuleType("arraytp_probe")

        @click.command()
        @click.option("--count", type=int)
        def command(count):
            return action()

        module.command = command
        monkeypatch.setitem(sys.modules, "arraytp_probe", module)
        monkeypatch.setattr(cli, "COMMANDS", {"probe": ("arraytp_probe", "Do what a test wants.")})

    return install


def raising(error):
    def action():
        raise error

    return action


def python(code, **options):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **options)


OUTCOMES = {
    "a mistake of the user": (UserError("x.yml:3: seed is bad"), 2, "arraytp: error: x.yml:3: seed is bad\n"),
    "two mistakes": (UserErrors(["first", "second"]), 2, "arraytp: error: first\narraytp: error: second\n"),
    "a file that cannot be had": (
        OSError(36, "File name too long", "x/yy"),
        2,
        "arraytp: error: x/yy: File name too long",
    ),
    "a number that is not finite": (
        NonFiniteError("loss is nan at step 3"),
        1,
        "arraytp: error: loss is nan at step 3\n",
    ),
    "an interrupt with a checkpoint": (
        Interrupted("saved; go on with --resume", 15),
        143,
        "saved; go on with --resume\n",
    ),
    "control-c": (KeyboardInterrupt(), 130, "\narraytp: error: interrupted\n"),
    "a bad value from a command": (
        click.BadParameter("no such thing", param_hint="--count"),
        2,
        "arraytp: error: Invalid value for --count: no such thing; see arraytp probe --help\n",
    ),
    "a file that click cannot open": (click.FileError("x.json", "denied"), 1, "arraytp: error: Could not open file"),
}


@pytest.mark.parametrize(("error", "status", "message"), OUTCOMES.values(), ids=OUTCOMES)
def test_an_error_becomes_one_line_and_a_status(probe, capsys, error, status, message):
    probe(raising(error))
    assert cli.main(["probe"]) == status
    streams = capsys.readouterr()
    assert streams.err.startswith(message)
    assert "Traceback" not in streams.err
    assert streams.out == ""


def test_a_command_that_finishes_ends_with_status_0(probe):
    probe(lambda: None)
    assert cli.main(["probe"]) == 0


def test_a_command_may_choose_its_status(probe):
    probe(lambda: click.get_current_context().exit(3))
    assert cli.main(["probe"]) == 3


def test_an_unforeseen_error_keeps_its_traceback():
    broken = (
        "import sys; from arraytp import cli; cli.COMMANDS = {'x': ('absent_module', '')}; sys.exit(cli.main(['x']))"
    )
    done = python(broken)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert "ModuleNotFoundError" in done.stderr


USAGE = {
    "an unknown command": (
        ["prob"],
        "arraytp: error: there is no command 'prob'; the commands are probe; see arraytp --help",
    ),
    "an unknown option": (["--frob"], "arraytp: error: No such option"),
    "an unknown option of a command": (["probe", "--frob"], "see arraytp probe --help"),
    "a value of the wrong type": (["probe", "--count", "x"], "'x' is not a valid integer; see arraytp probe --help"),
    "an argument too many": (["probe", "x"], "arraytp: error: Got unexpected extra argument"),
}


@pytest.mark.parametrize(("arguments", "message"), USAGE.values(), ids=USAGE)
def test_a_wrong_command_line_ends_with_status_2(probe, capsys, arguments, message):
    probe(lambda: None)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_no_command_at_all_shows_the_help_and_ends_with_status_2(capsys):
    assert cli.main([]) == 2
    assert "Usage: arraytp [OPTIONS] COMMAND" in capsys.readouterr().err


def test_the_version_is_the_packages(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"arraytp {__version__}\n"


def test_the_help_lists_every_command(capsys):
    assert cli.main(["-h"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.split("Commands:\n")[1].splitlines()]
    assert listed == list(cli.COMMANDS)


@pytest.mark.parametrize("command", [*cli.COMMANDS, "data pack", "data fetch", "data check", "data info"])
def test_help_fits_a_terminal_of_80_columns(monkeypatch, capsys, command):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main([*command.split(), "--help"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["frob"]])
def test_help_imports_nothing_heavy(arguments):
    code = f"""
import sys
from arraytp.cli import main
main({arguments})
heavy = ["numpy", "pydantic", "ruamel", "rich", "matplotlib", "h5py", "scipy", "cupy"]
sys.exit(3 if any(name in sys.modules for name in heavy) else 0)
"""
    assert python(code).returncode == 0


def test_help_takes_less_than_three_tenths_of_a_second_of_processor_time():
    code = (
        "import sys, time; from arraytp.cli import main; main(['--help']); sys.stderr.write(str(time.process_time()))"
    )
    assert min(float(python(code).stderr) for _ in range(3)) < 0.3


WRITERS = {
    "at once": "main(['--help'])",
    "at the end": "sys.stdout.write('left in the buffer'), main(['--version'])",
    "by a command that only fills the buffer": "main(['fill'])",
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_a_reader_that_leaves_early_causes_no_noise(writer):
    code = f"""
import sys, types, click
from arraytp import cli
from arraytp.cli import main
fill = types.ModuleType("fill")
fill.command = click.Command("fill", callback=lambda: sys.stdout.write("left in the buffer") and None)
sys.modules["fill"] = fill
cli.COMMANDS["fill"] = ("fill", "")
outcome = {writer}
sys.exit(outcome if isinstance(outcome, int) else outcome[-1])
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, env=environment, check=False
    )
    os.close(write)
    assert done.stderr == b""
    # The status that a shell reports for a program that SIGPIPE has ended.
    assert done.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_an_output_that_takes_no_more_is_one_line(unbuffered):
    code = "import sys; from arraytp.cli import main; sys.exit(main(['--help']))"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            check=False,
        )
    assert done.stderr == "arraytp: error: the output cannot be written: No space left on device\n"
    assert done.returncode == 1


@pytest.mark.parametrize(("words", "status"), [("['--version']", 0), ("['run', 'nowhere.yml']", 2)])
def test_a_process_may_have_no_output(words, status):
    code = f"import sys; from arraytp.cli import main; sys.exit(main({words}))"
    closed = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(code)} >&-"
    done = subprocess.run(["sh", "-c", closed], stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == (1 if status else 0)


def test_a_notebooks_backend_for_figures_does_not_matter():
    code = "import sys; from arraytp.cli import main; sys.exit(main(['report', '--help']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"MPLBACKEND": "module://nowhere.to_be_found"},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_an_unforeseen_error_of_the_system_keeps_its_traceback(probe):
    probe(raising(OSError(9, "Bad file descriptor")))
    with pytest.raises(OSError, match="Bad file descriptor"):
        cli.main(["probe"])


def test_an_output_that_cannot_show_a_character_shows_a_question_mark():
    code = "import sys; from arraytp.cli import main; sys.exit(main(['report', 'Zürich–小']))"
    done = python(code, env={**os.environ, "PYTHONIOENCODING": "latin1"}, encoding="latin1")
    assert done.returncode == 2
    assert done.stderr == "arraytp: error: Zürich??: no such folder; give a result folder written by `arraytp run`\n"


def test_ctrl_c_while_the_program_is_loading_gives_no_traceback(tmp_path):
    """Half of the first second is spent on imports."""
    click = tmp_path / "click.py"
    click.write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(5)\n")
    code = "import sys; from arraytp.__main__ import main; sys.exit(main())"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", code, "run"], env=environment, capture_output=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, b"", b"")


def test_a_signal_that_a_shell_ignores_for_its_background_stays_ignored():
    code = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); from arraytp.__main__ import main; "
        "import arraytp.cli; load = arraytp.cli.main; "
        "arraytp.cli.main = lambda: (os.kill(os.getpid(), signal.SIGINT), load(['--version']))[1]; sys.exit(main())"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_a_signal_of_which_a_library_makes_an_error_is_a_signal_all_the_same(probe, capsys, number):
    """While an extension module or a class body is loaded, any exception may turn into one of its own errors."""

    def loading():
        try:
            signal.raise_signal(number)
        except BaseException:
            raise ImportError("initialization failed") from None

    probe(loading)
    assert cli.main(["probe"]) == 128 + number
    assert capsys.readouterr().err == "arraytp: error: interrupted\n"


def test_on_a_terminal_a_config_error_shows_the_line_and_a_caret(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yml").write_text("data: {dataset: fashion-mnist-10k}\noptimizer: {name: adam, lrr: 1e-3}\n")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main(["run", "my.yml"]) == 2
    first, line, caret, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith("arraytp: error: my.yml:2: optimizer.lrr is not a known key")
    assert line == "    2 | optimizer: {name: adam, lrr: 1e-3}"
    assert line[caret.index("^") : caret.rindex("^") + 1] == "lrr"


def test_elsewhere_it_is_one_line(tmp_path, capsys):
    (tmp_path / "my.yml").write_text("seed: x\n")
    assert cli.main(["run", str(tmp_path / "my.yml")]) == 2
    assert all(line.startswith("arraytp: error: ") for line in capsys.readouterr().err.splitlines())


def test_the_shell_can_complete_commands():
    environment = os.environ | {"_ARRAYTP_COMPLETE": "bash_complete", "COMP_WORDS": "arraytp re", "COMP_CWORD": "1"}
    done = python("import sys; from arraytp.cli import main; sys.exit(main())", env=environment)
    assert (done.returncode, done.stdout) == (0, "plain,report\n")

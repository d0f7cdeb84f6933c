"""The command line: finds the command, runs it, turns errors into one line and an exit status."""

import errno
import importlib
import io
import os
import re
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path

import click

from arraytp import __version__
from arraytp.errors import Interrupted, NonFiniteError, RunError, UserError, UserErrors, one_line
from arraytp.launcher import end_all, failed_alone, launched, speaks
from arraytp.signals import ended_by_signals, held_back, sent_again_when_swallowed

COMMANDS = {
    "init": ("arraytp.commands.init", "Write a commented config to start from."),
    "run": ("arraytp.commands.run", "Train the given configs and write result folders."),
    "trace": ("arraytp.commands.trace", "Write every number of one training step to a file."),
    "audit": ("arraytp.commands.audit", "Check the math of a config: gradients, inverses, theorems."),
    "bench": ("arraytp.commands.bench", "Time the steps of a config, part by part."),
    "report": ("arraytp.commands.report", "Compare result folders in tables and figures."),
    "data": ("arraytp.commands.data", "Fetch, pack, check and describe data sets."),
}
# Commands that several processes share; with any other, each process would do all the work, in the same files.
_ON_RANKS = ("run", "bench")
_USER_STATUS = 2
_FAILURE_STATUS = 1
_SIGNALLED = 128
_SIGINT_STATUS = 130
_SIGPIPE_STATUS = 141
_SCARCE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
# Errors of writing to a stream whose disk, quota or device takes no more.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class _LazyGroup(click.Group):
    """A group that imports a command's module only to run that command or show its help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command."""
        if cmd_name not in COMMANDS:
            ctx.fail(f"there is no command {cmd_name!r}; the commands are {', '.join(COMMANDS)}")
        if cmd_name not in _ON_RANKS and (processes := launched()[0]) > 1:
            raise UserError(f"{cmd_name}: runs in one process, not in {processes}; start it without mpiexec or srun")
        with held_back():
            command: click.Command = importlib.import_module(COMMANDS[cmd_name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table, importing none."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="arraytp", message="%(prog)s %(version)s")
def arraytp() -> None:
    """Train networks with target propagation and its relatives, on NumPy or CuPy arrays."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, by default the process's own arguments; return the exit status.

    The status is 0 on success, 2 for a mistake of the user, 128 + signal number after an interruption or when the
    reader of the output has left (as if SIGPIPE had ended the process), and 1 for anything else. An unforeseen
    exception is raised, which ends the process with a traceback and status 1.
    """
    # Figures are only written to files; a notebook's setting names a backend that need not be installed.
    os.environ["MPLBACKEND"] = "agg"
    # Python has no stream if the process was started with it closed. A result file must not get its descriptor.
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        for stream in (sys.stdout, sys.stderr):
            # A terminal that cannot show a character gets a question mark.
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        # Of several processes, only the first prints.
        shown = sys.stdout if speaks() else io.StringIO()
        with redirect_stdout(shown), sent_again_when_swallowed(), ended_by_signals() as ended:
            try:
                status = _status_of(arguments)
            except Exception:
                if not ended.signal:
                    if failed_alone():
                        traceback.print_exc()
                        end_all(_FAILURE_STATUS)
                    raise
                status = _complain("interrupted", _SIGNALLED + ended.signal)
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as error:
        if isinstance(error, SystemExit) and not error.code:
            # Shell completion has answered.
            return 0
        # The reader of the output has left, as `| head` does; click raises SystemExit instead of BrokenPipeError.
        _drop_output()
        return _SIGPIPE_STATUS
    except OSError as error:
        if error.errno not in _FULL:
            raise
        _drop_output()
        return _complain(f"the output cannot be written: {error.strerror}", _FAILURE_STATUS)
    return status


def _drop_output() -> None:
    """Discard what Python flushes once more on exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _status_of(arguments: Sequence[str] | None) -> int:
    try:
        outcome = arraytp.main(args=arguments, prog_name="arraytp", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        status = _tell([error.format_message()], _USER_STATUS)
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx is not None else "arraytp"
        status = _complain(f"{error.format_message().rstrip('.')}; see {where} --help", _USER_STATUS)
    except (click.Abort, KeyboardInterrupt):
        status = _complain("interrupted", _SIGINT_STATUS)
    except click.ClickException as error:
        status = _complain(error.format_message(), error.exit_code)
    except UserErrors as error:
        status = _complain(error.lines, _USER_STATUS)
    except UserError as error:
        status = _complain(str(error), _USER_STATUS)
    except (NonFiniteError, RunError) as error:
        status = _complain(str(error), _FAILURE_STATUS)
    except MemoryError as error:
        status = _complain(f"not enough memory: {error}".removesuffix(": "), _USER_STATUS)
    except OSError as error:
        message = _system_message(error)
        if message is None:
            raise
        status = _complain(message, _USER_STATUS)
    except Interrupted as error:
        status = _SIGNALLED + error.signal_number
        # After a hangup, standard error may be gone.
        with suppress(OSError):
            _tell([str(error)], status)
    else:
        status = outcome if isinstance(outcome, int) else 0
    return status


def _system_message(error: OSError) -> str | None:
    """Return the message for an error of the operating system; None if the error is unforeseen."""
    if error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    try:
        os.getcwd()
    except FileNotFoundError:
        return "the working directory is not there any more; change into one that is"
    return error.strerror if error.errno in _SCARCE else None


def _complain(message: str | Sequence[str], status: int) -> int:
    """Print a message, or several, as one line each and return the exit status."""
    lines, who = [], "" if speaks() else f"rank {launched()[1]}: "
    for each in [message] if isinstance(message, str) else message:
        lines.append(f"arraytp: error: {who}{one_line(each)}")
        if sys.stderr.isatty() and (place := re.match(r"(.+?):(\d+): ([\w.-]+)", each)):
            lines += _excerpt(Path(place[1]), int(place[2]), place[3].rpartition(".")[2])
    return _tell(lines, status)


def _tell(lines: Sequence[str], status: int) -> int:
    """Print why the process ends, on rank 0 or a rank that fails alone, which ends the others; return the status."""
    if speaks():
        click.echo("\n".join(lines), err=True)
    if failed_alone(met=status > _SIGNALLED):
        if not speaks():
            click.echo("\n".join(lines), err=True)
        end_all(status)
    return status


def _excerpt(path: Path, number: int, key: str) -> list[str]:
    """Return a line of a config and a caret under the key that a message is about; nothing if it cannot be read."""
    try:
        # A pipe has been read already, and would block.
        if not path.is_file():
            return []
        line = path.read_text(encoding="utf-8").splitlines()[number - 1]
    except (OSError, ValueError, IndexError):
        return []
    head = f"{number:5} | "
    return [
        f"{head}{one_line(line)}",
        " " * (len(head) + max(line.find(key), 0)) + "^" * (len(key) if key in line else 1),
    ]

"""Exceptions that the command line reports."""

import re
from collections.abc import Sequence

_LONGEST_WORD = 300
_LONGEST_LINE = 3000


class UserError(Exception):
    """A mistake in what the user gave: config, arguments, files, hardware.

    The message is one line that names the file or key, the bad value and what would be right.
    The command line prints it without a traceback and exits with status 2.
    """


class UserErrors(UserError):
    """Several mistakes at once, a line each."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


class UnreadableError(UserError):
    """The operating system cannot read something, which need not be damaged; the message quotes the system's."""


class NonFiniteError(ArithmeticError):
    """A computation has no finite result; the message names what failed. Exit status 1."""


class RunError(Exception):
    """A run on several ranks failed on one of them, not by the user's mistake; the message names run and rank.

    Exit status 1.
    """


class FailedElsewhereError(RunError):
    """Another rank has failed, and this one would wait for it in vain."""


class IllConditionedError(NonFiniteError):
    """A weight matrix has no inverse that its dtype can carry; the message names the block and the condition number."""


class Interrupted(BaseException):
    """SIGINT, SIGTERM or a similar signal ended the work; if state was saved, the message says how to continue.

    Not an Exception, so that code that catches every error of a damaged file does not take it for damage. The exit
    status is 128 + `signal_number`.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def one_line(text: str) -> str:
    """Return text as one printable line: non-printable characters are escaped, the middle of long words is cut."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    words = re.sub(rf"\S{{{_LONGEST_WORD + 1},}}", lambda word: _cut(word[0], _LONGEST_WORD), shown)
    return _cut(words, _LONGEST_LINE)


def _cut(text: str, longest: int) -> str:
    """Cut the middle out of a text that is too long, and state how much is missing."""
    if len(text) <= longest:
        return text
    half = longest // 2 - 20
    return f"{text[:half]}…({len(text) - 2 * half:,} characters)…{text[-half:]}"

"""What can go wrong, as the command line reports it."""

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
    """The system does not let something be read, in its own words; nothing is known to be wrong with it."""


class NonFiniteError(ArithmeticError):
    """A number is not finite; the message names the step and the block. Exit status 1."""


class RunError(Exception):
    """A run of several ranks failed on one of them, not by the user's mistake; the message names run and rank.

    Exit status 1.
    """


class FailedElsewhereError(RunError):
    """Another rank has failed, and this one would wait for it in vain."""


class IllConditionedError(NonFiniteError):
    """A weight matrix has no inverse that its dtype can carry; the message names the block and the condition number."""


class Interrupted(BaseException):
    """SIGINT, SIGTERM or a similar signal arrived and the state was saved; the message says how to continue.

    No Exception, so that what expects anything of a damaged file does not take it for damage. The exit status is 128 +
    `signal_number`.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def one_line(text: str) -> str:
    """Return text as a line to show: what would break or colour it is escaped, the middle of long words is cut."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    words = re.sub(rf"\S{{{_LONGEST_WORD + 1},}}", lambda word: _cut(word[0], _LONGEST_WORD), shown)
    return _cut(words, _LONGEST_LINE)


def _cut(text: str, longest: int) -> str:
    """Cut the middle out of a text that is too long, and say how much."""
    if len(text) <= longest:
        return text
    half = longest // 2 - 20
    return f"{text[:half]}…({len(text) - 2 * half:,} characters)…{text[-half:]}"

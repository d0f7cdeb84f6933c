"""What can go wrong, as the command line reports it."""


class UserError(Exception):
    """A mistake in what the user gave: config, arguments, files, hardware.

    The message is one line that names the file or key, the bad value and what would be right.
    The command line prints it without a traceback and exits with status 2.
    """


class UnreadableError(UserError):
    """The system does not let something be read, in its own words; nothing is known to be wrong with it."""


class NonFiniteError(ArithmeticError):
    """Training left the finite numbers; the message says at which step and in which block. Exit status 1."""


class IllConditionedError(NonFiniteError):
    """A weight matrix has no inverse that its dtype can carry; the message names the block and the condition number."""


class Interrupted(BaseException):
    """SIGINT, SIGTERM or the like arrived and the state was saved; the message says how to go on.

    No Exception, so that what expects anything of a damaged file does not take it for damage.

    Parameters
    ----------
    signal_number : int
        The exit status is 128 + this number.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number

"""Ctrl-C, SIGTERM and their like: as a request that the training loop answers between two steps, or as an exception."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, SimpleNamespace
from typing import Any, Self, TypeVar

from arraytp.errors import Interrupted

# What asks a process to end: terminals, systems and, before a job's time is over, clusters (SIGUSR1, SIGUSR2, SIGXCPU).
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
Done = TypeVar("Done")
_LATER = 0.01
_PATIENCE = 1.0


class StopRequest:
    """While entered, SIGINT and those of `ENDING` only set `requested`; a second SIGINT acts as without this.

    The others may come several times: SIGXCPU does each second, a launcher hands on what the cluster sends too, and a
    warning is followed by SIGTERM. A signal that the process was told to ignore, as `nohup` does with SIGHUP, stays
    ignored. Where the answer takes more than a second, as a long step does, a line on standard error says what is
    waited for, unless it is another process's part to tell.

    `signal` is the number of the signal that came, 0 while none did; `elsewhere` returns that of one that came to
    another process and is meant for this one, too.
    """

    def __init__(self, tells: bool = True) -> None:
        self.signal = 0
        self.elsewhere: Callable[[], int] = lambda: 0
        self._tells = tells
        self._at_once = False
        self._former: dict[int, Any] = {}
        self._notice = threading.Timer(_PATIENCE, _tell_what_is_waited_for)
        self._notice.daemon = True

    @property
    def requested(self) -> bool:
        """Whether to stop at the next chance."""
        self.signal = self.signal or self.elsewhere()
        return self.signal != 0

    def __enter__(self) -> Self:
        """Take over the signals."""
        self._former = _answered(self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals back."""
        self._notice.cancel()
        _answer_as_before(self._former)
        self._former = {}

    def at_once(self, work: Callable[[], Done]) -> Done:
        """Do work that a request interrupts wherever the program is, by `Interrupted`: work that is then given up."""
        # No context manager: a signal between its end and this function's would leave what follows to be interrupted.
        self._at_once = True
        try:
            if self.requested:
                raise Interrupted("arraytp: ended by a signal", self.signal)
            return work()
        except Interrupted as error:
            # Not before: where Python swallows the exception, the signal is sent once more.
            self._answer_the_next_as_before(error.signal_number)
            raise
        finally:
            self._at_once = False

    def _answer_the_next_as_before(self, number: int) -> None:
        if number == signal.SIGINT and number in self._former:
            signal.signal(number, self._former.pop(number))

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        if self._at_once:
            raise Interrupted(f"arraytp: ended by {signal.Signals(number).name}", number)
        self._answer_the_next_as_before(number)
        # Started already where two signals come at once; and a process may have no thread left.
        with suppress(RuntimeError):
            if self._tells:
                self._notice.start()


def _answered(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Let a handler answer SIGINT and those of `ENDING` that are not ignored; return who did before."""
    numbers = [each for each in (signal.SIGINT, *ENDING) if signal.getsignal(each) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in numbers}


def _answer_as_before(former: dict[int, Any]) -> None:
    for number, handler in former.items():
        signal.signal(number, handler)


def _tell_what_is_waited_for() -> None:
    # After a hangup there may be nobody to tell.
    if sys.stderr is not None:
        with suppress(OSError):
            print("arraytp: stopping when what is under way is done; a second Ctrl-C ends at once", file=sys.stderr)


@contextmanager
def ended_by_signals() -> Iterator[SimpleNamespace]:
    """While entered, those of `ENDING` raise `Interrupted`, and SIGINT KeyboardInterrupt, as ever.

    So whatever is being written is removed on the way out. A signal that the process was told to ignore stays ignored.
    Libraries that are being loaded make other errors of these; what is yielded has the number of
    the `signal` behind them, 0 without one.
    """
    ended = SimpleNamespace(signal=0)

    def stop(number: int, frame: FrameType | None) -> None:
        ended.signal = number
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Interrupted(f"arraytp: ended by {signal.Signals(number).name}", number)

    former = _answered(stop)
    try:
        yield ended
    finally:
        _answer_as_before(former)


@contextmanager
def held_back() -> Iterator[None]:
    """While entered, signals wait: extension modules that are interrupted while they load may abort the process."""
    former = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, *ENDING))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


@contextmanager
def sent_again_when_swallowed() -> Iterator[None]:
    """While entered, a signal whose exception Python swallows is sent once more.

    Where a signal arrives in a destructor or in the callback of a weak reference, Python prints the exception and goes
    on.
    """
    former = sys.unraisablehook

    def swallowed(unraisable: "sys.UnraisableHookArgs") -> None:
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            number = int(signal.SIGINT)
        elif isinstance(unraisable.exc_value, Interrupted):
            number = unraisable.exc_value.signal_number
        else:
            former(unraisable)
            return
        # A little later: now it would arrive in the same place.
        threading.Timer(_LATER, os.kill, (os.getpid(), number)).start()

    sys.unraisablehook = swallowed
    try:
        yield
    finally:
        sys.unraisablehook = former

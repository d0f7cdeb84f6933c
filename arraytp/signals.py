"""Ctrl-C, SIGTERM and the like, as a request that the training loop answers between two steps, or as an exception."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, SimpleNamespace
from typing import Any, Self, TypeVar

from arraytp.errors import Interrupted

# Sent to end a process by terminals, systems and, before a job's time is up, clusters (SIGUSR1, SIGUSR2, SIGXCPU).
ENDING = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
Done = TypeVar("Done")
_LATER = 0.01
_PATIENCE = 1.0


class StopRequest:
    """While entered, SIGINT and the signals in `ENDING` only set `requested`; a second SIGINT acts as usual.

    The others may arrive several times: SIGXCPU does every second, a launcher passes on what the cluster sends as well,
    and SIGTERM follows a warning. A signal that the process was told to ignore, as `nohup` does with SIGHUP, stays
    ignored. If stopping takes more than a second, as in a long step, a line on standard error says what is waited for,
    unless `tells` is False because another process says so.

    `signal` is the number of the signal received, 0 if none was; `elsewhere` returns that of a signal that another
    process received and that is meant for this one, too.
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
        """Whether to stop at the next opportunity."""
        self.signal = self.signal or self.elsewhere()
        return self.signal != 0

    def __enter__(self) -> Self:
        """Take over the signals."""
        self._former = _answered(self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        """Restore the former handlers."""
        self._notice.cancel()
        _answer_as_before(self._former)
        self._former = {}

    def at_once(self, work: Callable[[], Done]) -> Done:
        """Do work that a request interrupts at any point by raising `Interrupted`; the work is then abandoned."""
        # Not a context manager: a signal while one is left could keep `_at_once` set for the code that follows.
        self._at_once = True
        try:
            if self.requested:
                raise Interrupted("arraytp: ended by a signal", self.signal)
            return work()
        except Interrupted as error:
            # Not in the handler: if Python swallows the exception, the signal is sent to it once more.
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
        # The timer has started already if two signals arrive at once, and a process may have no thread left.
        with suppress(RuntimeError):
            if self._tells:
                self._notice.start()


def _answered(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Install a handler for SIGINT and the signals in `ENDING` that are not ignored; return the former handlers."""
    numbers = [each for each in (signal.SIGINT, *ENDING) if signal.getsignal(each) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in numbers}


def _answer_as_before(former: dict[int, Any]) -> None:
    for number, handler in former.items():
        signal.signal(number, handler)


def _tell_what_is_waited_for() -> None:
    # After a hangup, standard error may be gone.
    if sys.stderr is not None:
        with suppress(OSError):
            print("arraytp: stopping when what is under way is done; a second Ctrl-C ends at once", file=sys.stderr)


@contextmanager
def ended_by_signals() -> Iterator[SimpleNamespace]:
    """While entered, the signals in `ENDING` raise `Interrupted`, and SIGINT raises KeyboardInterrupt, as usual.

    Files that are being written are thus removed on the way out. A signal that the process was told to ignore stays
    ignored. Libraries that are being imported may turn these exceptions into others; `signal` of the yielded object is
    the number of the signal behind them, 0 if there was none.
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
    """Hold signals back while entered: extension modules interrupted during import may abort the process."""
    former = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, *ENDING))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


@contextmanager
def sent_again_when_swallowed() -> Iterator[None]:
    """While entered, send a signal again if Python swallows its exception.

    If a signal arrives in a destructor or in the callback of a weak reference, Python prints the exception and goes on.
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

"""Ctrl-C, SIGTERM and SIGHUP as a request that the training loop answers between two steps."""

import signal
from types import FrameType, TracebackType
from typing import Any, Self


class StopRequest:
    """While entered, the first SIGINT, SIGTERM or SIGHUP only sets `requested`; the second acts as without this.

    A signal that the process was told to ignore, as `nohup` does with SIGHUP, stays ignored.

    Attributes
    ----------
    signal : int
        The number of the signal that came; 0 while none did.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._former: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether to stop at the next chance."""
        return self.signal != 0

    def __enter__(self) -> Self:
        """Take over the signals."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._former[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back."""
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

"""Ranks as threads of one process, to test without MPI what processes do with it."""

import functools
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np

from arraytp.errors import FailedElsewhereError
from arraytp.ranks import pairwise


class Board:
    """Holds the values that the ranks exchange, and the barriers at which they meet."""

    def __init__(self, size: int) -> None:
        self.barrier, self.values = threading.Barrier(size, timeout=60), [None] * size
        self.end, self.problems = threading.Barrier(size, self.barrier.reset, timeout=60), [None] * size


class Rank:
    """One of the ranks; sums add in the order of the ranks."""

    sums_on_device = False

    def __init__(self, board: Board, rank: int) -> None:
        self._board, self.rank, self.size = board, rank, len(board.values)
        self.sums = self.exchanges = 0

    def sum(self, buffer: np.ndarray, in_order: bool = False) -> None:
        self.sums += 1
        buffers = self.gather(buffer.copy())
        buffer[...] = pairwise(buffers) if in_order else functools.reduce(np.add, buffers)

    def begin_sum(self, buffer: np.ndarray) -> Callable[[], None]:
        return functools.partial(self.sum, buffer)

    def exchange(self, segments: np.ndarray) -> None:
        self.exchanges += 1
        segments[...] = self.gather(segments[self.rank].copy())

    def gather(self, value: Any) -> list[Any]:
        self._board.values[self.rank] = value
        try:
            self._board.barrier.wait()
        except threading.BrokenBarrierError as error:
            raise FailedElsewhereError("another rank has failed") from error
        values = list(self._board.values)
        # If a rank fails after this, all others already have the values.
        with suppress(threading.BrokenBarrierError):
            self._board.barrier.wait()
        return values

    def problems(self, own: Any, limited: bool = False) -> list[Any]:
        if own is not None:
            self._board.barrier.abort()
        self._board.problems[self.rank] = own
        self._board.end.wait()
        everyone = list(self._board.problems)
        self._board.end.wait()
        return everyone

    def broadcast(self, value: Any) -> Any:
        # As between processes, every rank gets an object of its own.
        return pickle.loads(pickle.dumps(self.gather(value)[0]))


class InTurn(Rank):
    """A rank that computes while all others wait, as needed for what a process has only once: a GPU's handles."""

    turn = threading.Lock()

    def gather(self, value: Any) -> list[Any]:
        self.turn.release()
        try:
            return super().gather(value)
        finally:
            self.turn.acquire()


def on_ranks(size: int, work: Callable[[Rank], Any], in_turn: bool = False) -> list[Any]:
    """Let every rank do the work in a thread of its own; return the results, or raise the first error."""
    board = Board(size)

    def one(rank: int) -> Any:
        try:
            if not in_turn:
                return work(Rank(board, rank))
            with InTurn.turn:
                return work(InTurn(board, rank))
        except BaseException:
            board.barrier.abort()
            board.end.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(one, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(
        errors, key=lambda error: isinstance(error, threading.BrokenBarrierError | FailedElsewhereError)
    ):
        raise error
    return [future.result() for future in futures]

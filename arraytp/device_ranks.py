"""Sums over ranks directly between devices, by NCCL under CuPy, or through the host where that is not possible."""

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from arraytp.backend import Array, Backend, first_line
from arraytp.errors import UserError
from arraytp.ranks import Ranks


class Nccl:
    """Ranks, one per device, that sum device arrays by NCCL and do everything else by MPI."""

    sums_on_device = True

    def __init__(self, ranks: Ranks, backend: Backend, nccl: Any) -> None:
        self._ranks, self._backend, self._nccl = ranks, backend, nccl
        self.rank, self.size = ranks.rank, ranks.size
        identity = ranks.broadcast(nccl.get_unique_id() if ranks.rank == 0 else None)
        try:
            self._communicator = nccl.NcclCommunicator(ranks.size, identity, ranks.rank)
        except nccl.NcclError as error:
            raise UserError(
                f"NCCL cannot connect the {ranks.size} ranks ({first_line(error)}); NCCL_DEBUG=INFO makes it say more; "
                "without nvidia-nccl-cu12, sums go through the host"
            ) from error
        self._summing = backend.xp.cuda.Stream(non_blocking=True)
        self.exchange, self.gather, self.broadcast, self.problems = (
            ranks.exchange, ranks.gather, ranks.broadcast, ranks.problems)  # fmt: skip

    def sum(self, buffer: Array, in_order: bool = False) -> None:
        """See `Ranks.sum`; the host does not wait for the sum of a device array."""
        if isinstance(buffer, np.ndarray):
            self._ranks.sum(buffer, in_order)
            return
        self._sum_on(self._backend.xp.cuda.get_current_stream(), buffer)

    def begin_sum(self, buffer: Array) -> Callable[[], None]:
        """See `Ranks.begin_sum`; sums on a separate stream; the returned function makes the current one wait."""
        current = self._backend.xp.cuda.get_current_stream()
        self._summing.wait_event(current.record())
        self._sum_on(self._summing, buffer)
        return partial(current.wait_event, self._summing.record())

    def _sum_on(self, stream: Any, buffer: Array) -> None:
        kind = {"float32": self._nccl.NCCL_FLOAT32, "float64": self._nccl.NCCL_FLOAT64}[str(buffer.dtype)]
        place = buffer.data.ptr
        self._communicator.allReduce(place, place, buffer.size, kind, self._nccl.NCCL_SUM, stream.ptr)


@functools.cache
def connected(ranks: Ranks, backend: Backend) -> tuple[Ranks, str]:
    """Return the ranks with sums between devices, or unchanged with a note why not; all ranks call this together.

    UserError if NCCL is installed but cannot connect the ranks.
    """
    if ranks.size == 1 or backend.on_host:
        return ranks, ""
    nccl = _nccl(backend)
    properties = backend.xp.cuda.runtime.getDeviceProperties(backend.number)
    everyone = ranks.gather(((os.uname().nodename, properties["uuid"]), nccl is not None))
    devices, have_nccl = [device for device, _ in everyone], [has for _, has in everyone]
    for rank, device in enumerate(devices):
        if device in devices[:rank]:
            return ranks, f"ranks {devices.index(device)} and {rank} share a GPU, so sums go through the host"
    if not all(have_nccl):
        rank = have_nccl.index(False)
        return ranks, f"rank {rank} finds no NCCL, so sums go through the host; install arraytp[nccl12]"
    return Nccl(ranks, backend, nccl), ""


def _nccl(backend: Backend) -> Any:
    """Return CuPy's NCCL module; None if the library cannot be loaded."""
    with warnings.catch_warnings():
        # CuPy warns if the library is missing; `connected` says so once, for all ranks.
        warnings.simplefilter("ignore")
        try:
            module = importlib.import_module(f"{backend.xp.__name__}.cuda.nccl")
        except ImportError:
            return None
    return module if module.available else None

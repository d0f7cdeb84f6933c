"""Steps that sum by NCCL against steps on one rank, with a fake NCCL, threads as ranks and the strict device."""

import ctypes
import sys
from contextlib import closing
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import strict_device
from fake_ranks import Board, Rank, on_ranks

from arraytp import ranks
from arraytp.backend import Backend
from arraytp.config import parse_config
from arraytp.device_ranks import Nccl, connected
from arraytp.errors import UserError
from arraytp.ranks import ALONE
from arraytp.training.build import build_planned
from arraytp.training.plan import plan

SETTINGS = {
    "data": {"dataset": "fashion-mnist-10k"},
    "network": {"blocks": [{"type": "dense", "units": 6, "activation": "elu"}, {"type": "dense", "units": 10}]},
    "rule": {"name": "ldrl", "feedback": {"iterations": 2, "optimizer": {"name": "sgd", "lr": 0.01}}},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "train": {"epochs": 1, "batch_size": 7},
    "dtype": "float64",
}


class FakeNccl:
    """A fake of CuPy's NCCL module: its communicators sum numbers at device addresses, on a stream."""

    NCCL_FLOAT32, NCCL_FLOAT64, NCCL_SUM, available = 7, 8, 0, True
    NcclError = RuntimeError

    def __init__(self) -> None:
        self.calls = []
        self._board = Board(2)

    def get_unique_id(self):
        return (1, 2, 3)

    def NcclCommunicator(self, size, identity, rank):
        assert (size, identity) == (2, (1, 2, 3))
        ranks = Rank(self._board, rank)

        def all_reduce(send, receive, count, kind, operation, stream):
            assert (send, operation) == (receive, self.NCCL_SUM)
            self.calls.append((count, stream))
            number = {7: ctypes.c_float, 8: ctypes.c_double}[kind]
            work = partial(ranks.sum, np.ctypeslib.as_array((number * count).from_address(send)))
            if stream == strict_device.cuda.get_current_stream().ptr:
                work()
            else:
                ctypes.cast(stream, ctypes.py_object).value._work.append(work)

        return SimpleNamespace(allReduce=all_reduce)


@pytest.fixture
def nccl(monkeypatch):
    fake = FakeNccl()
    monkeypatch.setitem(sys.modules, "strict_device.cuda.nccl", fake)
    return fake


def device(number):
    return Backend("strict", strict_device, number)


def step(ranks, backend):
    """Return the weights after a training step."""
    experiment = build_planned(plan(parse_config(SETTINGS).variants[""], backend), False, ranks)
    with closing(experiment.train_loader.batches(0)) as batches:
        experiment.step(*next(batches), size=7)
    return [strict_device.asnumpy(array) for array in experiment.network.parameters()]


def test_a_step_by_nccl_is_that_of_one_rank(nccl):
    """Updates and each iteration's gradient are summed between devices, on the stream that computes."""

    def work(ranks):
        by_nccl, note = connected(ranks, device(ranks.rank))
        assert isinstance(by_nccl, Nccl)
        return note, step(by_nccl, device(ranks.rank)), ranks.sums

    wanted = step(ALONE, device(0))
    for note, found, sums in on_ranks(2, work):
        assert (note, sums) == ("", 0)
        for mine, theirs in zip(found, wanted, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-14)
    assert len(nccl.calls) == 2 * 3
    assert {stream for _, stream in nccl.calls} == {strict_device.cuda.get_current_stream().ptr}


def test_large_updates_are_summed_on_a_stream_beside_the_one_that_computes(nccl, monkeypatch):
    """Sums begin block by block; each stream waits for the other's results before it uses them."""
    monkeypatch.setattr(ranks, "MESSAGE", 1)

    def work(others):
        by_nccl, _ = connected(others, device(others.rank))
        return step(by_nccl, device(others.rank)), by_nccl._summing

    wanted = step(ALONE, device(0))
    for found, beside in on_ranks(2, work):
        for mine, theirs in zip(found, wanted, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-14)
        # After the sums of two feedback iterations: the updates' three messages.
        assert [count for count, stream in nccl.calls if stream == beside.ptr][2:] == [70, 4710, 4]
        assert beside.waited == [strict_device.cuda.get_current_stream()] * 5


@pytest.mark.parametrize(
    ("available", "devices", "words"),
    [
        (False, (0, 1), "rank 0 finds no NCCL, so sums go through the host; install arraytp[nccl12]"),
        (True, (3, 3), "ranks 0 and 1 share a GPU, so sums go through the host"),
    ],
)
def test_without_nccl_or_on_one_gpu_the_host_sums(nccl, available, devices, words):
    nccl.available = available

    def work(ranks):
        backend = device(devices[ranks.rank])
        same, note = connected(ranks, backend)
        assert same is ranks
        return note, step(ranks, backend), ranks.sums

    wanted = step(ALONE, device(0))
    for note, found, sums in on_ranks(2, work):
        assert (note, sums) == (words, 3)
        for mine, theirs in zip(found, wanted, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-14)


def test_ranks_that_nccl_cannot_connect_are_told(nccl, monkeypatch):
    def refuse(*_):
        raise RuntimeError("unhandled system error\nmore")

    monkeypatch.setattr(nccl, "NcclCommunicator", refuse)

    def work(ranks):
        with pytest.raises(UserError, match=r"^NCCL cannot connect the 2 ranks \(unhandled system error\)"):
            connected(ranks, device(ranks.rank))

    on_ranks(2, work)

import signal
import sys
import threading
import time
import weakref

import pytest

from arraytp import signals
from arraytp.errors import Interrupted
from arraytp.signals import ENDING, StopRequest, ended_by_signals, sent_again_when_swallowed


@pytest.mark.parametrize(("seconds", "said"), [(0.0, ""), (0.2, "stopping when what is under way is done")])
def test_who_has_to_wait_for_a_step_is_told(monkeypatch, capsys, seconds, said):
    monkeypatch.setattr(signals, "_PATIENCE", 0.1)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        time.sleep(seconds)
        assert stop.requested
    time.sleep(0.2)
    told = capsys.readouterr().err
    assert said in told
    assert len(told.splitlines()) == bool(said)


@pytest.mark.parametrize("number", [signal.SIGINT, *ENDING], ids=str)
def test_every_signal_that_ends_a_job_is_a_request(number):
    with StopRequest() as stop:
        signal.raise_signal(number)
        assert stop.requested
        assert stop.signal == number


def test_only_ctrl_c_ends_at_once_when_it_comes_again():
    """Other signals may repeat: SIGXCPU comes every second, launchers pass signals on, SIGTERM follows a warning."""
    with StopRequest() as stop:
        for number in (*ENDING, *ENDING, signal.SIGINT):
            signal.raise_signal(number)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, *ENDING], ids=str)
def test_every_signal_ends_at_once_what_is_given_up_anyway(number):
    with StopRequest() as stop:
        with pytest.raises(Interrupted) as caught:
            stop.at_once(lambda: signal.raise_signal(number))
        assert caught.value.signal_number == number
        with pytest.raises(Interrupted):
            stop.at_once(lambda: pytest.fail("not reached: the request came before"))
    assert stop.signal == number


def test_ctrl_c_that_gave_work_up_ends_the_process_when_it_comes_again():
    """The second one may come while the checkpoint is being written."""
    with StopRequest() as stop:
        with pytest.raises(Interrupted):
            stop.at_once(lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_two_signals_at_once_are_one_request():
    """The second may arrive while the first is being handled."""
    stop = StopRequest()
    with stop:
        stop._receive(signal.SIGTERM, None)
        stop._receive(signal.SIGHUP, None)
    assert stop.signal == signal.SIGHUP


def test_a_process_without_threads_stops_all_the_same(monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Timer, "start", refuse)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested


class Object:
    pass


def swallowed(number):
    """Raise a signal in the callback of a weak reference, where Python swallows its exception."""
    thing = Object()
    reference = weakref.ref(thing, lambda _: signal.raise_signal(number))
    del thing
    return reference


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Interrupted)])
def test_a_swallowed_signal_arrives_all_the_same(number, error, capsys):
    def work():
        swallowed(number)
        time.sleep(10)

    hook = sys.unraisablehook
    with sent_again_when_swallowed(), ended_by_signals(), pytest.raises(error):
        work()
    assert sys.unraisablehook is hook
    assert capsys.readouterr().err == ""


def test_other_errors_that_python_swallows_are_shown_as_ever(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", shown.append)

    def fail(_):
        raise KeyError

    with sent_again_when_swallowed():
        thing = Object()
        reference = weakref.ref(thing, fail)
        del thing
    assert reference() is None
    assert [unraisable.exc_type for unraisable in shown] == [KeyError]


def test_ctrl_c_that_python_swallows_gives_work_up_all_the_same():
    """In a destructor, Python drops the exception; the signal is sent again, which is not taken for a second Ctrl-C."""

    class Late:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def work():
        Late()
        time.sleep(10)

    with sent_again_when_swallowed(), StopRequest() as stop, pytest.raises(Interrupted) as caught:
        stop.at_once(work)
    assert caught.value.signal_number == signal.SIGINT

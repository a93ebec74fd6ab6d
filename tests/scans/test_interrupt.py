"""Ctrl-C during a long scan in the native engine."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from scan_cases import NEEDS_NATIVE
from scan_problems import Case, Problem, make_problem

from hf_skiprnn.kernels.cpu import library
from hf_skiprnn.kernels.cpu.operators import cpu_scan

IS_MAIN = threading.current_thread() is threading.main_thread()
pytestmark = [NEEDS_NATIVE, pytest.mark.skipif(not IS_MAIN, reason="Python acts on signals in its main thread")]
DELAY = 0.05  # seconds into the pass


@pytest.fixture(scope="module")
def long() -> Problem:
    """A scan of several tenths of a second, with a longer backward pass."""
    torch.set_num_threads(1)
    return make_problem(Case(batch=2, steps=40000, hidden=160, gate="always", sequence=True), dtype=torch.float32)


class Interruption:
    """SIGINT, DELAY after the native call has begun."""

    def __init__(self) -> None:
        self.sent = 0.0
        self.ended: list[bool] = []  # of each call that was watched: whether the signal ended it

    def send(self) -> None:
        self.sent = time.monotonic()
        os.kill(os.getpid(), signal.SIGINT)

    def watched(self, *arguments: Any) -> int:
        if not self.sent:
            threading.Timer(DELAY, self.send).start()
        status = WATCHED(*arguments)
        self.ended.append(status == library.CANCELLED)
        return status


WATCHED = library._watched


@pytest.fixture
def interruption(monkeypatch: pytest.MonkeyPatch) -> Interruption:
    found = Interruption()
    monkeypatch.setattr(library, "_watched", found.watched)
    return found


@contextmanager
def handler(function: Any) -> Iterator[None]:
    before = signal.signal(signal.SIGINT, function)
    try:
        yield
    finally:
        assert signal.getsignal(signal.SIGINT) is function  # Python's record of it
        signal.signal(signal.SIGINT, before)


def forward_pass(problem: Problem) -> Callable[[], Any]:
    return lambda: problem.run(cpu_scan)


def backward_pass(problem: Problem) -> Callable[[], Any]:
    out = problem.run(cpu_scan)
    leaves = list(problem.leaves().values())
    return lambda: torch.autograd.grad(out.state.h.sum(), leaves, allow_unused=True, retain_graph=True)


@pytest.mark.parametrize("make", [forward_pass, backward_pass])
def test_ends_within_a_tenth_of_a_second(
    make: Callable[[Problem], Callable[[], Any]], long: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, delays = make(long), []
    with handler(signal.default_int_handler):
        for _ in range(3):  # other work on this machine may take a tenth
            interruption = Interruption()
            monkeypatch.setattr(library, "_watched", interruption.watched)
            with pytest.raises(KeyboardInterrupt):
                run()
            delays.append(time.monotonic() - interruption.sent)
            if delays[-1] < 0.1:
                break
        with pytest.raises(KeyboardInterrupt):  # Python's own handler is back
            signal.raise_signal(signal.SIGINT)
    assert min(delays) < 0.1


def tensors(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    return [] if result is None else [part for item in result for part in tensors(item)]


@pytest.mark.parametrize("make", [forward_pass, backward_pass])
def test_nothing_is_lost_where_the_handler_goes_on(
    make: Callable[[Problem], Callable[[], Any]], long: Problem, request: pytest.FixtureRequest
) -> None:
    """As a trainer's does, which asks for a checkpoint after the step."""
    run, calls = make(long), []
    want = tensors(run())
    interruption = request.getfixturevalue("interruption")
    with handler(lambda *_: calls.append(1)):
        got = tensors(run())
    assert calls == [1]
    assert interruption.ended == [True, False]
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine, theirs)


def test_a_handler_may_scan_itself(long: Problem, interruption: Interruption) -> None:
    short = make_problem(Case(batch=2, steps=300, hidden=130, gate="always"), dtype=torch.float32)
    results = []
    with handler(lambda *_: results.append(short.run(cpu_scan).state.h)):
        long.run(cpu_scan)
    assert torch.equal(results[0], short.run(cpu_scan).state.h)


@pytest.mark.parametrize("disposition", [signal.SIG_IGN, signal.SIG_DFL])
def test_other_dispositions_stay(disposition: signal.Handlers, long: Problem) -> None:
    with handler(disposition):
        long.run(cpu_scan)


def test_short_calls_and_other_threads_are_not_watched(monkeypatch: pytest.MonkeyPatch, long: Problem) -> None:
    monkeypatch.setattr(library, "_watched", lambda *_: pytest.fail("watched"))
    make_problem(Case()).run(cpu_scan)
    results: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: results.append(long.run(cpu_scan).state.h))
    thread.start()
    thread.join()
    assert len(results) == 1


def test_a_handler_that_a_handler_sets_stays() -> None:
    """A second Ctrl-C often kills: the first one's handler restores the system's default."""
    code = (
        "import os, signal, time\n"
        "from hf_skiprnn.kernels.cpu.library import engine\n"
        "library = engine()\n"
        "library.skip_rnn_watch_interrupt()\n"
        "signal.signal(signal.SIGINT, signal.SIG_DFL)\n"
        "library.skip_rnn_stop_watching()\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "time.sleep(1)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGINT

"""A call of the store is given up in time, and what it raises or returns itself comes through."""

from __future__ import annotations

import concurrent.futures
import threading
import time

import pytest

from checkpointer.distributed import store
from checkpointer.errors import SaveError


@pytest.fixture
def answer(monkeypatch):
    """The store's answer, which comes when it is set."""
    monkeypatch.setattr(store, "GRACE", 0.05)
    event = threading.Event()
    yield event
    event.set()


def test_a_store_that_does_not_answer_is_a_save_error_on_every_python(answer):
    """Before 3.11 a future's time-out is no builtin ``TimeoutError``."""
    with pytest.raises(SaveError, match="this host is cut off"):
        store.in_time(time.monotonic(), answer.wait)


@pytest.mark.parametrize("kind", [TimeoutError, concurrent.futures.TimeoutError, SaveError])
def test_what_the_call_raises_itself_comes_through(answer, kind):
    def fail():
        raise kind("its own")

    with pytest.raises(kind, match="its own"):
        store.in_time(time.monotonic() + 60, fail)


def test_an_answer_that_comes_at_the_last_moment_counts(answer, monkeypatch):
    """Between the end of the time and the look whether the call has returned."""

    class Late(concurrent.futures.Future[bool]):
        def result(self, timeout=None):
            if timeout is None:
                return super().result()
            try:
                return super().result(timeout)
            except concurrent.futures.TimeoutError:
                answer.set()
                super().result()
                raise

    monkeypatch.setattr(store, "Future", Late)
    assert store.in_time(time.monotonic(), answer.wait) is True

"""Broken and forged files of every kind: the short form of ``scripts/fuzz``, with luck that hypothesis shrinks."""

from __future__ import annotations

import functools
import random
import warnings
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.campaign.fuzz import campaign
from tests.campaign.fuzz.targets import TARGETS, Target, empty_folder

EXAMPLES = {
    "manifest": 300,
    "index": 210,
    "header": 100,
    "config": 50,
    "tree": 150,
    "note": 150,
    "owner": 150,
    "run": 15,
}
BY_NAME = {target.name: target for target in TARGETS}


@pytest.mark.parametrize("name", BY_NAME)
def test_any_file_is_read_or_refused_with_a_typed_error(name, request):
    target = BY_NAME[name]
    many = 20 if request.config.getoption("--thorough") else 1
    seen: Counter[str] = Counter()

    @settings(max_examples=many * EXAMPLES[name], deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.randoms(use_true_random=False))
    def check(luck: random.Random) -> None:
        made = target.make(luck)
        with empty_folder() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seen[target.take(made, folder)] += 1

    check()
    assert seen["refused"]


@functools.cache
def watch() -> campaign.Watch:
    """One for all tests: audit hooks stay."""
    return campaign.Watch()


def found(take):
    """What one input of a target that does ``take`` is found guilty of."""
    score = campaign.Score()
    campaign.attempt(Target("manifest", lambda luck: luck.random(), take), 1, 0, score, watch())
    return list(score.findings)


def unpickle(*_):
    import pickle

    return pickle.loads(pickle.dumps(campaign.Score))


def test_the_campaign_finds_what_no_file_may_do(tmp_path):
    """It can fail: an error that is not typed, a class unpickled, a program run, a file made elsewhere."""
    import subprocess

    assert found(lambda *_: "refused") == []
    assert found(lambda *_: 1 / 0)[0].startswith("ZeroDivisionError")
    assert found(unpickle)[0].startswith("AssertionError")
    assert found(lambda *_: subprocess.run(["true"], check=True))[0].startswith("AssertionError")
    assert found(lambda *_: (tmp_path / "x").write_text("y"))[0].startswith("AssertionError")
    assert found(lambda _, folder: (folder / "x").write_text("y") and "accepted") == []


def test_the_campaign_finds_what_takes_too_long(monkeypatch):
    import signal
    import time

    def too_slow(number, frame):
        raise campaign.TooSlowError

    monkeypatch.setattr(campaign, "SECONDS", 0.05)
    before = signal.signal(signal.SIGALRM, too_slow)
    try:
        assert found(lambda *_: time.sleep(5))[0].startswith("TooSlowError")
    finally:
        signal.signal(signal.SIGALRM, before)


def test_an_input_is_the_same_whenever_it_is_made():
    for target in TARGETS:
        if target.name not in ("header", "tree"):  # those hold tensors and parsed indexes
            assert target.make(random.Random("7/x/1")) == target.make(random.Random("7/x/1"))

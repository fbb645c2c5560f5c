"""The rules that a manifest holds: as the configuration spells them, and read as strictly."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpointer.config.rules import keep_text, rules_of, saved_keep
from checkpointer.config.settings import Config
from checkpointer.errors import SaveError
from checkpointer.format import paths
from checkpointer.format.index import FileRecord
from checkpointer.format.manifest import Manifest, parse_manifest
from checkpointer.policy.retention import BestRule, KeepPolicy, best_rule

SAVE = st.fixed_dictionaries(
    {},
    optional={
        "every_n_steps": st.integers(1, 10**9),
        "every": st.sampled_from(["30min", "auto", "2d"]),
        "on_signal": st.just(["SIGTERM"]),
    },
)
BEST = st.fixed_dictionaries({"monitor": st.sampled_from(["loss", "größe"]), "mode": st.sampled_from(["min", "max"])})
KEEP = st.fixed_dictionaries(
    {},
    optional={
        "last": st.integers(1, 10**9),
        "best": st.lists(BEST, min_size=1, max_size=2),
        "every": st.sampled_from(["12h", "90s"]),
        "max_size": st.sampled_from(["500GB", 12345]),
    },
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(["last", "best", "every", "within", "max_size", "every_n_steps"])


def manifest(**fields: Any) -> Manifest:
    record = FileRecord(0, "0" * 32)
    index = {paths.INDEX: record, paths.TABLE: record}
    created = datetime(2026, 1, 1, tzinfo=timezone.utc)
    return Manifest(
        id="a" * 32, parent=None, sequence=1, step=1, epoch=None, created=created, index=index, files=2, **fields
    )


@given(SAVE, KEEP)
def test_rules_read_back_from_json_as_they_were_configured(save: Any, keep: Any) -> None:
    config = Config.from_mapping({"save": save, "keep": keep})
    rules = json.loads(json.dumps(rules_of(config)))

    assert Config.from_mapping(rules) == config
    assert saved_keep(rules, "checkpoint-1").keep == config.keep
    assert set(keep) == set(rules["keep"])
    assert "\n" not in keep_text(config.keep)


def test_that_nothing_is_set_is_a_rule_too() -> None:
    assert rules_of(Config()) == {"save": {}, "keep": {}}
    assert saved_keep({"save": {}, "keep": {}}, "checkpoint-1").keep == KeepPolicy()
    assert saved_keep({}, "checkpoint-1").keep is None


@given(st.dictionaries(NAMES | st.text(max_size=9), JSON, max_size=3) | JSON)
def test_no_content_of_rules_does_anything_but_be_read_or_refused(keep: Any) -> None:
    saved = saved_keep({"keep": keep}, "checkpoint-1")

    assert (saved.keep is None) == (saved.problem is not None)
    if saved.keep is not None:
        assert saved_keep(rules_of(Config(keep=saved.keep)), "checkpoint-1").keep == saved.keep


def test_rules_that_would_make_a_manifest_too_large_are_left_out_of_it() -> None:
    rules = {"save": {}, "keep": {"best": [{"monitor": f"metric{n}", "k": 1, "mode": "min"} for n in range(2000)]}}

    assert parse_manifest(manifest(rules=rules).to_bytes(), "it").rules == {}
    assert parse_manifest(manifest(rules={"keep": {"last": 1}}).to_bytes(), "it").rules == {"keep": {"last": 1}}
    with pytest.raises(SaveError, match="fewer or shorter"):
        manifest(rules=rules, tags=("x" * 70_000,)).to_bytes()


@pytest.mark.parametrize(
    "monitor, mode, configured, found",
    [
        ("score", "min", [], ("score", "min")),
        ("score", None, [], ("score", "max")),
        ("score", None, [BestRule(monitor="score", mode="min")], ("score", "min")),
        ("val_loss", None, [], ("val_loss", "max")),
        ("test_loss", None, [], ("test_loss", "min")),
        (None, None, [], ("score", "max")),
        (None, "min", [], ("score", "min")),
        (None, None, [BestRule(monitor="f1")], ("f1", "max")),
    ],
)
def test_what_is_written_goes_before_the_rules_of_the_run_and_these_before_the_name(
    monitor: str | None, mode: Any, configured: list[BestRule], found: tuple[str, str]
) -> None:
    saved = [BestRule(monitor="score", mode="max"), BestRule(monitor="val_loss", mode="max")]
    rule = best_rule(configured, monitor, mode, lambda: saved)
    assert (rule.monitor, rule.mode) == found


def test_the_rules_of_the_run_are_not_read_where_all_is_written() -> None:
    def read() -> list[BestRule]:
        raise AssertionError

    assert best_rule([], "score", "max", read).mode == "max"
    assert best_rule([BestRule(monitor="f1")], None, None, read).monitor == "f1"

"""The bench of a small model behind many checkpoints runs, and says which goals it misses."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import small


def test_the_bench_measures_each_row_that_a_goal_is_about(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small, "NAP", 0.0)
    status = small.main(["--rounds", "1", "--checkpoints", "3", "--width", "8", "--dir", str(tmp_path)])
    text = capsys.readouterr().out
    for goal, name, base, _ in small.GOALS:
        assert f"| {goal} |" in text
        assert f"| {name} |" in text
        assert f"| {base} |" in text
    assert status == ("**no**" in text)
    assert list(tmp_path.iterdir()) == []


def test_a_goal_is_missed_above_its_limit_and_held_at_it() -> None:
    samples = {name: [10.0] for _, *names, _ in small.GOALS for name in names}
    assert small.report(samples)[1]
    samples["save, many"] = [10.0, 11.0, 30.0]
    assert small.report(samples)[1]
    samples["save, many"] = [11.5]
    text, holds = small.report(samples)
    assert not holds
    assert text.count("**no**") == 1

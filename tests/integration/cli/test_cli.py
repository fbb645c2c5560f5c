"""The command line: what it prints, where, and the exit codes."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import math
import os
import pty
import re
import subprocess
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from click.testing import Result
from fsspec.implementations.memory import MemoryFileSystem
from torch import nn

from checkpointer import CheckpointManager
from checkpointer.cli import render
from checkpointer.cli.commands import cli
from checkpointer.errors import CheckpointerWarning, ConfigError
from checkpointer.format.index import Component, TensorSpec
from checkpointer.format.tree_text import describe_component, leaves
from checkpointer.version import __version__
from tests.support.command import runner
from tests.support.forge import Forgery, flip, forge_manifest

ROOT = Path(__file__).resolve().parents[3]
COLUMNS = ["STEP", "EPOCH", "SEQUENCE", "CREATED", "AGE", "SIZE"]
COLUMNS += ["METRICS", "BEST", "TAGS", "PINNED", "FINITE", "STATUS"]
KEEP_LAST = "keep:\n  last: 1\n"


def make_run(root: Any, steps: Any = (100, 200, 300), **components: Any) -> Any:
    """A run whose checkpoints have metrics, an epoch and a tag."""
    components = components or {"model": nn.Linear(3, 2)}
    with CheckpointManager(root, config={"write": {"mode": "sync", "durable": False}}, **components) as manager:
        for step in steps:
            manager.save(step, epoch=step // 200, metrics={"val_loss": 1 / step}, tags=("even",))
    return root


@pytest.fixture
def run_root(tmp_path):
    return make_run(tmp_path / "run")


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(KEEP_LAST)
    return path


def invoke(*args: Any) -> Result:
    """The command in this process, its output in a pipe."""
    result = runner().invoke(cli, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def document(*args: Any) -> Any:
    result = invoke(*args, "--json")
    assert result.exit_code in (0, 1)
    return json.loads(result.stdout)


def error_of(result: Any) -> str:
    """The one line on stderr; stdout holds nothing."""
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return str(result.stderr)


def child(*args: Any, **options: Any) -> Any:
    """The command, or with ``code=`` a program, in a process of its own."""
    code = options.pop("code", None)
    command = [sys.executable, *(["-c", code] if code else ["-m", "checkpointer"]), *map(str, args)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=120, **options)


def on_terminal(*args: Any, width: int = 120, **env: str) -> str:
    """What the command prints to a terminal, in colour unless ``env`` says otherwise."""
    outer, inner = pty.openpty()
    variables = {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "COLUMNS": str(width), **env}
    inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "checkpointer", *map(str, args)],
        stdout=inner,
        stderr=subprocess.DEVNULL,
        env={**inherited, **variables},
    )
    os.close(inner)
    data = b""
    with contextlib.suppress(OSError):  # Linux reports the end as EIO
        while block := os.read(outer, 65536):
            data += block
    os.close(outer)
    assert process.wait(60) == 0
    return data.decode().replace("\r\n", "\n")


def visible(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


# ------------------------------------------------------------------------------------------------------------- ls


def test_ls_prints_one_aligned_line_for_each_checkpoint(run_root):
    result = invoke("ls", run_root)

    header, *lines = result.stdout.splitlines()
    assert result.exit_code == 0
    assert header.split() == COLUMNS
    assert [line.split()[:3] for line in lines] == [["100", "0", "1"], ["200", "1", "2"], ["300", "1", "3"]]
    assert lines[1].split()[6:] == ["val_loss=0.005", "-", "even", "-", "yes", "ok"]
    assert len({line.index("even") for line in lines} | {header.index("TAGS")}) == 1


def test_ls_lists_in_commit_order_not_by_step(tmp_path):
    model = nn.Linear(2, 2)
    make_run(tmp_path, model=model)
    with CheckpointManager(tmp_path, model=model) as manager:
        manager.restore(100)
        manager.save(150)

    assert [row["step"] for row in document("ls", tmp_path)["checkpoints"]] == [100, 200, 300, 150]


def test_ls_lists_a_checkpoint_with_a_damaged_manifest_last_and_says_why(run_root):
    flip(run_root / "checkpoint-200" / "manifest.json", 50)

    result = invoke("ls", run_root)
    assert result.exit_code == 0
    last = result.stdout.splitlines()[-1].split()
    assert last == ["200", *["-"] * 10, "damaged"]
    assert result.stderr.startswith("warning: checkpoint-200 is damaged: ")
    assert "checksum" in result.stderr

    row = document("ls", run_root)["checkpoints"][-1]
    assert (row["status"], row["size"], row["metrics"]) == ("damaged", None, None)
    assert "checksum" in row["reason"]


def test_ls_with_stats_says_what_each_save_cost(run_root):
    statistics = {
        "wait_seconds": 0.0,
        "stall_seconds": 0.0123,
        "write_seconds": 2.5,
        "fsync_seconds": 0.5,
        "bytes_written": 1_500_000,
        "bytes_shared": 31_000,
        "mode": "async",
    }
    forge_manifest(run_root / "checkpoint-100", lambda fields: fields.update(statistics=statistics))
    forge_manifest(run_root / "checkpoint-200", lambda fields: fields.update(statistics={"stall_seconds": "soon"}))
    flip(run_root / "checkpoint-300" / "manifest.json", 50)

    result = invoke("ls", run_root, "--stats")
    header, *lines = (line.split() for line in result.stdout.splitlines())
    assert header == ["STEP", "MODE", "WAIT", "STALL", "WRITE", "FSYNC", "SIZE", "WRITTEN", "SHARED", "STATUS"]
    assert [*lines[0][:6], *lines[0][7:]] == ["100", "async", "0ms", "12.3ms", "2.5s", "500ms", "1.5MB", "31.0kB", "ok"]
    assert [*lines[1][:6], *lines[1][7:]] == ["200", "-", "-", "-", "-", "-", "-", "-", "ok"]
    assert lines[2] == ["300", *["-"] * 8, "damaged"]

    rows = document("ls", run_root, "--stats")["checkpoints"]
    assert [row["statistics"] for row in rows] == [statistics, {"stall_seconds": "soon"}, None]
    assert "statistics" not in document("ls", run_root)["checkpoints"][0]


def test_ls_calls_a_checkpoint_of_a_newer_format_unsupported(run_root):
    forge_manifest(run_root / "checkpoint-200", lambda fields: fields.update(version=2))

    assert [row["status"] for row in document("ls", run_root)["checkpoints"]] == ["ok", "ok", "unsupported"]
    assert "upgrade" in document("ls", run_root)["checkpoints"][-1]["reason"]
    assert invoke("verify", run_root).exit_code == 1


def test_ls_as_json_has_the_documented_fields(run_root):
    listed = document("ls", run_root)

    assert set(listed) == {"root", "rules", "best", "checkpoints"}
    assert listed["root"] == str(run_root)
    row = listed["checkpoints"][0]
    fields = "step epoch sequence id parent created size metrics tags pinned finite note path status reason"
    assert list(row) == fields.split()
    assert (row["step"], row["metrics"], row["tags"], row["pinned"]) == (100, {"val_loss": 0.01}, ["even"], False)
    assert dt.datetime.fromisoformat(row["created"]).utcoffset() == dt.timedelta(0)


def test_metrics_that_are_not_finite_are_strings_in_json(run_root):
    invoke("annotate", run_root, 100, "--metric", "a=nan", "--metric", "b=-inf")

    metrics = document("ls", run_root)["checkpoints"][0]["metrics"]
    assert metrics == {"val_loss": 0.01, "a": "nan", "b": "-inf"}


def test_ls_reads_manifests_and_nothing_else(run_root):
    code = """
import sys
opened = []
names = ("manifest.json", "index.json", ".safetensors")
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
from checkpointer.cli import main
try:
    main()
finally:
    print("\\n".join(path for path in opened if path.endswith(names)), file=sys.stderr)
"""
    result = child("ls", run_root, code=code)

    assert result.returncode == 0
    opened = [os.path.basename(path) for path in result.stderr.split()]
    assert opened == ["manifest.json"] * 4  # the newest once more, for the rules


def test_no_command_imports_torch_and_a_pipe_needs_neither_rich_nor_fsspec(run_root, config):
    commands = [["ls"], ["prune", "--config", str(config), "--dry-run"], ["pin", "100"], ["show"], ["verify"]]
    code = f"""
import sys
from checkpointer.cli import main
for name, *rest in {commands!r}:
    sys.argv = ["checkpointer", name, {str(run_root)!r}, *rest]
    try:
        main()
    except SystemExit as end:
        assert end.code == 0, (name, end.code)
    if name == "pin":
        assert "numpy" not in sys.modules  # only an index needs it
print([name for name in ("torch", "rich", "fsspec") if name in sys.modules], file=sys.stderr)
"""
    result = child(code=code)

    assert result.returncode == 0
    assert result.stderr == "[]\n"


# ----------------------------------------------------------------------------------------------------------- show


def test_show_describes_the_newest_checkpoint_unless_a_step_is_given(run_root):
    assert "checkpoint-300\n" in invoke("show", run_root).stdout
    assert "checkpoint-200\n" in invoke("show", run_root, 200).stdout
    assert "checkpoint-200\n" in invoke("show", run_root, "checkpoint-200").stdout


def test_show_prints_tensors_values_files_and_facts(tmp_path):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125, momentum=0.5)
    make_run(tmp_path, [100], model=model, optimizer=optimizer, progress={"tokens": 12345, "name": "gpt"})

    lines = [" ".join(line.split()) for line in invoke("show", tmp_path).stdout.splitlines()]
    assert f"checkpoint {tmp_path / 'checkpoint-100'}" in lines
    assert "metrics val_loss=0.01" in lines
    assert f"environment.torch {torch.__version__}" in lines
    assert any(re.fullmatch(r"model\.safetensors [\d.]+k?B [0-9a-f]{32}", line) for line in lines)
    assert any(line.startswith("statistics.write_seconds ") for line in lines)
    assert "model (module, 2 tensors, 32B)" in lines
    assert "weight float32 [2, 3] 24B" in lines
    assert any(line.startswith("optimizer (optimizer, SGD, ") for line in lines)
    assert "param_groups[0].lr = 0.125" in lines
    assert "tokens = 12345" in lines
    assert "name = 'gpt'" in lines


def test_show_as_json_adds_manifest_and_components_to_the_row(run_root):
    shown = document("show", run_root, 100)

    (row,) = (row for row in document("ls", run_root)["checkpoints"] if row["step"] == 100)
    assert row.items() <= shown.items()
    weight = shown["components"]["model"]["tensors"]["weight"]
    assert weight == {"dtype": "float32", "shape": [2, 3], "size": 24, "device": "cpu"}
    assert set(shown["components"]["model"]) == {"kind", "size", "tensors", "tree", "meta"}
    assert set(shown["files"]["index.json"]) == {"size", "xxh3", "shared_with"}
    assert shown["environment"]["torch"] == str(torch.__version__)


def test_show_says_which_checkpoints_lie_on_the_same_bytes(run_root):
    for step in (200, 300):
        forgery = Forgery(run_root / f"checkpoint-{step}")
        forgery.files["model.safetensors"]["shared"] = [document("show", run_root, 100)["id"], step // 100]
        forgery.write_index()
        file = run_root / f"checkpoint-{step}" / "model.safetensors"
        file.unlink()
        file.hardlink_to(run_root / "checkpoint-100" / "model.safetensors")

    shown = document("show", run_root, 200)["files"]
    assert shown["model.safetensors"]["shared_with"] == ["checkpoint-100", "checkpoint-300"]
    assert shown["index.json"]["shared_with"] == []
    assert document("show", run_root, 100)["files"]["model.safetensors"]["shared_with"] == [
        "checkpoint-200",
        "checkpoint-300",
    ]
    (line,) = (line for line in invoke("show", run_root).stdout.splitlines() if line.startswith("  model.safetensors"))
    assert line.endswith("  shared with checkpoint-100, checkpoint-200")
    assert "shared with checkpoint-100, checkpoint-200" in visible(on_terminal("show", run_root))


def test_show_writes_every_kind_of_value_as_python_does(tmp_path):
    state = {
        "none": None,
        "nan": math.nan,
        "huge": 2**70,
        "complex": 1 + 2j,
        "bytes": b"ab",
        "one": (1,),
        "nested": (1, [2, "x"]),
        "set": {5},
        "empty": {},
        "no_set": set(),
        "ordered": OrderedDict(a=1),
        "counter": Counter("x"),
        "default": defaultdict(list, k=[1]),
        "deque": deque([1], maxlen=3),
        "keys": {(1, 2): "pair", 7: "int", "odd key": 1},
        "time": dt.datetime(2026, 1, 2, tzinfo=dt.timezone.utc),
        "span": dt.timedelta(days=1),
        "path": PurePosixPath("/a/b"),
        "range": range(1, 5, 2),
        "slice": slice(None, 3),
        "size": torch.Size([1, 2]),
        "dtype": torch.bfloat16,
        "device": torch.device("cuda", 1),
        "scalar": np.float32(0.5),
        "array": np.zeros((2, 3), dtype=np.int16),
        "tensor": torch.zeros(4, dtype=torch.bfloat16),
        "many": [torch.zeros(1), 5],
        "lone": "\ud800",
    }
    make_run(tmp_path, [1], state=state)

    text = invoke("show", tmp_path).stdout
    found = dict(re.findall(r"^  (\S.*?)  +(?:= )?(\S.*)$", text.partition("\nstate (")[2], re.MULTILINE))
    expected = {
        "none": "None",
        "nan": "nan",
        "huge": str(2**70),
        "complex": "complex(1.0, 2.0)",
        "bytes": "b'ab'",
        "one": "(1,)",
        "nested": "(1, [2, 'x'])",
        "set": "{5}",
        "empty": "{}",
        "no_set": "set()",
        "ordered.a": "1",
        "counter.x": "1",
        "default.k": "[1]",
        "deque": "deque([1], maxlen=3)",
        "keys[(1, 2)]": "'pair'",
        "keys[7]": "'int'",
        "keys['odd key']": "1",
        "time": "datetime(2026-01-02T00:00:00, utc)",
        "span": "timedelta(days=1, seconds=0, microseconds=0)",
        "path": "Path('/a/b')",
        "range": "range(1, 5, 2)",
        "slice": "slice(None, 3, None)",
        "size": "torch.Size([1, 2])",
        "dtype": "torch.bfloat16",
        "device": "device(cuda:1)",
        "scalar": "numpy[<f4](0.5)",
        "many[1]": "5",
        "lone": r"'\ud800'",
    }
    assert {path: found.get(path) for path in expected} == expected
    assert re.search(r"array +int16 +\[2, 3\] +12B  \(numpy array\)\n", text)
    assert re.search(r"tensor +bfloat16 +\[4\] +8B\n", text)
    assert re.search(r"many\[0\] +float32 +\[1\] +4B\n", text)


def test_show_abbreviates_long_lists_and_json_has_them_whole(tmp_path):
    state = {"long": [*range(1000)], "inside": {"pair": (1, (0, *range(624)), None)}, "short": [*range(20)]}
    make_run(tmp_path, [1], state=state)

    for text in (invoke("show", tmp_path).stdout, visible(on_terminal("show", tmp_path, width=300))):
        assert "= [0, 1, 2, … 996 more …, 999]\n" in text
        assert "= (1, (0, 0, 1, … 621 more …, 623), None)\n" in text
        assert "= [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]\n" in text
        assert re.search(r"python +(= )?\(3, \((\d+, ){3}… 621 more …, \d+\), (None|-?[\d.e-]+)\)\n", text)
        assert max(map(len, text.splitlines())) < 300
    assert document("show", tmp_path)["components"]["state"]["tree"]["long"] == state["long"]


def test_show_names_tied_weights_once(tmp_path):
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    make_run(tmp_path, [1], model=model)

    text = invoke("show", tmp_path).stdout
    assert re.search(r"embed\.weight +float32 +\[5, 4\] +80B\n", text)
    assert re.search(r"head\.weight += \(same tensor as embed\.weight\)\n", text)


def test_show_tells_what_it_can_of_a_checkpoint_with_a_damaged_index(run_root):
    flip(run_root / "checkpoint-300" / "index.json", 50)

    result = invoke("show", run_root)
    assert result.exit_code == 1
    assert re.search(r"^status +damaged$", result.stdout, re.MULTILINE)
    assert result.stderr.startswith("error: ")
    assert "index.json is damaged" in result.stderr
    assert document("show", run_root)["components"] == {}


# --------------------------------------------------------------------------------------------------------- verify


def test_verify_of_an_intact_run_exits_with_0(run_root):
    result = invoke("verify", run_root)

    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "3 checkpoints checked, 0 damaged"


def test_verify_names_each_problem_and_exits_with_1(run_root):
    flip(run_root / "checkpoint-200" / "model.safetensors")
    (run_root / "checkpoint-300" / "index.json").unlink()

    result = invoke("verify", run_root)
    assert result.exit_code == 1
    assert re.search(r"^checkpoint-200  damaged .*\n  problem: model\.safetensors: bytes", result.stdout, re.MULTILINE)
    assert re.search(r"^  problem: .*index\.json is missing", result.stdout, re.MULTILINE)
    assert result.stdout.splitlines()[-1] == "3 checkpoints checked, 2 damaged"

    checked = document("verify", run_root)
    assert not checked["ok"]
    assert [entry["status"] for entry in checked["checkpoints"]] == ["ok", "damaged", "damaged"]
    assert "do not match their hash" in checked["checkpoints"][1]["problems"][0]


def test_verify_of_one_step_reads_no_other(run_root):
    flip(run_root / "checkpoint-200" / "model.safetensors")

    assert invoke("verify", run_root, 100).exit_code == 0
    assert invoke("verify", run_root, 200).exit_code == 1
    assert [entry["step"] for entry in document("verify", run_root, 200)["checkpoints"]] == [200]


def test_verify_reports_a_checkpoint_without_a_usable_manifest(run_root):
    flip(run_root / "checkpoint-200" / "manifest.json", 50)

    assert invoke("verify", run_root).exit_code == 1
    assert invoke("verify", run_root, 200).exit_code == 1
    assert "problem: " in invoke("verify", run_root, 200).stdout


def test_an_extra_file_is_reported_and_is_no_problem(run_root):
    (run_root / "checkpoint-200" / "mine.txt").write_text("hello")

    result = invoke("verify", run_root)
    assert result.exit_code == 0
    assert "  extra file: mine.txt\n" in result.stdout


def test_the_progress_bar_of_verify_leaves_stdout_alone(run_root):
    outer, inner = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    command = [sys.executable, "-m", "checkpointer", "verify", str(run_root)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=inner, env=env, text=True, check=True, timeout=60)
    os.close(inner)
    progress = os.read(outer, 65536)
    os.close(outer)

    assert b"verifying" in progress
    assert [line.split()[0] for line in result.stdout.splitlines()[:3]] == [f"checkpoint-{n}00" for n in (1, 2, 3)]
    assert "\x1b" not in result.stdout


# ---------------------------------------------------------------------------------------------------------- prune


def test_a_dry_run_prints_the_plan_and_removes_nothing(run_root, config):
    result = invoke("prune", run_root, "--config", config, "--dry-run")

    header, *lines, rules, summary = result.stdout.splitlines()
    assert result.exit_code == 0
    assert rules == f"by the rules of {config}: keep: {{last: 1}}"
    assert header.split() == ["ACTION", "STEP", "AGE", "SIZE", "REASONS"]
    assert [line.split()[:2] for line in lines] == [["remove", "100"], ["remove", "200"], ["keep", "300"]]
    assert lines[0].endswith("no rule keeps it")
    assert lines[2].endswith("newest commit, last 1")
    assert summary.startswith("would remove 2 of 3 checkpoints (")
    assert len(document("ls", run_root)["checkpoints"]) == 3


def test_prune_carries_out_the_plan_that_the_dry_run_printed(run_root, config):
    def decisions(text: str) -> list[list[str]]:
        return [[*line.split()[:2], *line.split()[4:]] for line in text.splitlines()[:-1]]

    dry = invoke("prune", run_root, "--config", config, "--dry-run")
    wet = invoke("prune", run_root, "--config", config)

    assert wet.exit_code == 0
    assert decisions(wet.stdout) == decisions(dry.stdout)
    assert wet.stdout.splitlines()[-1].startswith("removed 2 of 3 checkpoints (")
    assert sorted(path.name for path in run_root.glob("checkpoint-*")) == ["checkpoint-300"]
    assert not (run_root / ".checkpointer" / "owner.json").exists()
    with CheckpointManager(run_root, model=nn.Linear(3, 2)) as manager:  # the lock is free
        assert manager.restore_latest() is not None


def test_prune_says_which_metric_was_meant_and_removes_nothing_that_it_cannot_judge(run_root, config):
    config.write_text("keep:\n  best: {monitor: val/loss}\n")
    pruned = invoke("prune", run_root, "--config", config)
    assert pruned.exit_code == 0
    assert "did you mean val_loss?" in pruned.stderr
    assert "kept until a checkpoint reports val/loss" in pruned.stdout
    assert len(list(run_root.glob("checkpoint-*"))) == 3
    config.write_text("keep:\n  best: {monitor: score}\n")
    assert "keep.best.mode: is missing" in error_of(invoke("prune", run_root, "--config", config))


def test_prune_as_json_has_the_documented_fields(run_root, config):
    plan = document("prune", run_root, "--config", config)

    assert set(plan) == {"root", "dry_run", "rules", "keep", "remove"}
    assert plan["rules"] == {"source": str(config), "keep": {"last": 1}}
    assert plan["dry_run"] is False
    assert [entry["step"] for entry in plan["remove"]] == [100, 200]
    assert set(plan["keep"][0]) == {"step", "id", "path", "size", "reasons"}
    assert plan["keep"][0]["reasons"] == ["newest commit", "last 1"]


def test_prune_is_refused_while_another_process_holds_the_lock_but_a_dry_run_is_not(run_root, config):
    code = f"""
import sys
from checkpointer.repository.repository import Repository
from checkpointer.storage import open_storage
repository = Repository(open_storage({str(run_root)!r}))
repository.lock.acquire()
print("locked", flush=True)
sys.stdin.read()
"""
    holder = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    with holder:
        assert holder.stdout.readline() == b"locked\n"
        refused = invoke("prune", run_root, "--config", config)
        planned = invoke("prune", run_root, "--config", config, "--dry-run")
        holder.stdin.close()

    assert refused.exit_code == 1
    assert f"pid {holder.pid} on host" in error_of(refused)
    assert "--dry-run" in refused.stderr
    assert planned.exit_code == 0
    assert len(document("ls", run_root)["checkpoints"]) == 3


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("keep:\n  lats: 1\n", r"config\.yaml:2: .*did you mean last"),
        ("keep: {last: 0}\n", r"config\.yaml:1: .*0 is refused"),
    ],
)
def test_a_bad_configuration_exits_with_2_and_names_the_line(run_root, config, text, complaint):
    config.write_text(text)

    result = invoke("prune", run_root, "--config", config)
    assert result.exit_code == 2
    assert re.search(complaint, error_of(result))


def test_a_missing_configuration_exits_with_2(run_root, tmp_path):
    result = invoke("prune", run_root, "--config", tmp_path / "none.yaml")

    assert result.exit_code == 2
    assert "none.yaml" in error_of(result)


# ---------------------------------------------------------------------------------------------- rules of the run

RULES = {"save": {"every_n_steps": 100}, "keep": {"last": 2, "best": {"monitor": "quality", "mode": "max"}}}


@pytest.fixture
def ruled(tmp_path):
    """A run that was saved by ``RULES``: all three are kept, until the newest is."""
    with CheckpointManager(tmp_path / "ruled", config=RULES, model=nn.Linear(3, 2)) as manager:
        for step, quality in ((100, 0.9), (200, 0.5), (300, 0.1)):
            manager.save(step, metrics={"quality": quality})
    return tmp_path / "ruled"


def test_without_a_configuration_prune_goes_by_the_rules_of_the_newest_checkpoint_and_says_so(ruled, config):
    keep = {"last": 2, "best": [{"monitor": "quality", "k": 1, "mode": "max"}]}
    with CheckpointManager(ruled, model=nn.Linear(3, 2), config={**RULES, "keep": None}) as manager:
        manager.restore_latest()
        manager.save(400, metrics={"quality": 0.2})
    assert document("prune", ruled)["rules"] == {"source": "checkpoint-400", "keep": {}}  # so everything stays

    forge_manifest(ruled / "checkpoint-400", lambda fields: fields.update(rules={"keep": keep}))
    dry = invoke("prune", ruled, "--dry-run").stdout.splitlines()
    assert dry[-2] == "by the rules of checkpoint-400: keep: {last: 2, best: [{monitor: quality, k: 1, mode: max}]}"
    assert [line.split()[:2] for line in dry[1:-2]] == [
        ["keep", "100"],
        ["remove", "200"],
        ["keep", "300"],
        ["keep", "400"],
    ]
    with CheckpointManager(ruled, read_only=True) as reader:
        assert [info.step for info, _ in reader.prune(dry_run=True).remove] == [200]
    with CheckpointManager(ruled, config={"keep": {"last": 1}}, read_only=True) as reader:  # what is written goes first
        assert [info.step for info, _ in reader.prune(dry_run=True).remove] == [100, 200, 300]
    assert [entry["step"] for entry in document("prune", ruled)["remove"]] == [200]
    assert [entry["step"] for entry in document("prune", ruled, "--config", config)["remove"]] == [100, 300]


def test_ls_names_the_best_checkpoint_by_the_rules_of_the_newest_one(ruled):
    listed = document("ls", ruled)

    assert listed["rules"] == document("prune", ruled, "--dry-run")["rules"]
    assert listed["best"] == {"quality": listed["checkpoints"][0]["id"]}
    assert [line.split()[-5] for line in invoke("ls", ruled).stdout.splitlines()] == ["BEST", "quality", "-", "-"]


@pytest.mark.parametrize(
    "rules, complaint",
    [
        ({"keep": {"last": 1, "steps": [1000]}}, "keep.steps"),  # the others alone would keep less
        ({"keep": {"last": -1}}, "keep.last"),
        ({"keep": {"best": {"monitor": "\x1b[2J", "mode": "min"}}}, "keep.best.monitor"),
        ({"keep": {"within": "9" * 999 + "d"}}, "keep.within"),
        ({"keep": ["last", 1]}, "keep: must be a mapping"),
        ({"save": {}}, "does not say"),
        ({}, "does not say"),
    ],
)
def test_rules_that_cannot_be_used_are_ignored_with_a_sentence(ruled, rules, complaint):
    forge_manifest(ruled / "checkpoint-300", lambda fields: fields.update(rules=rules))

    refused = invoke("prune", ruled)
    assert refused.exit_code == 2
    assert complaint in error_of(refused)
    assert "--config FILE" in refused.stderr
    assert "\x1b" not in refused.stderr
    listed = invoke("ls", ruled)
    assert listed.exit_code == 0
    assert (complaint in listed.stderr) == ("does not say" not in complaint)
    with CheckpointManager(ruled, read_only=True) as reader:
        expected = pytest.warns(CheckpointerWarning, match="ignored") if listed.stderr else contextlib.nullcontext()
        with expected, pytest.raises(ConfigError, match="lower or higher"):
            reader.best("quality")
    assert len(list(ruled.glob("checkpoint-*"))) == 3


def test_show_says_which_run_it_is_and_by_which_rules_it_was_saved(ruled):
    shown = document("show", ruled)

    assert re.search(rf"^run +{shown['run']}$", invoke("show", ruled).stdout, re.MULTILINE)
    assert shown["rules"]["save"] == {"every_n_steps": 100}
    assert not {"foreign", "replaces", "slimmed"} & set(shown)
    there = {"foreign": 2, "replaces": "a" * 32, "slimmed": ["optimizer"]}
    forge_manifest(ruled / "checkpoint-300", lambda fields: fields.update(there))
    shown = document("show", ruled)
    assert {name: shown[name] for name in there} == there


# ---------------------------------------------------------------------------------------------------------- notes


def test_a_pinned_checkpoint_survives_prune_until_it_is_unpinned(run_root, config):
    assert invoke("pin", run_root, 100).stdout == f"pinned {run_root / 'checkpoint-100'}\n"
    invoke("prune", run_root, "--config", config)
    assert [(row["step"], row["pinned"]) for row in document("ls", run_root)["checkpoints"]] == [
        (100, True),
        (300, False),
    ]

    assert invoke("unpin", run_root, 100).exit_code == 0
    invoke("prune", run_root, "--config", config)
    assert [row["step"] for row in document("ls", run_root)["checkpoints"]] == [300]


def test_annotate_adds_metrics_tags_and_a_note(run_root):
    row = document(
        "annotate", run_root, 200, "--metric", "acc=0.5", "--metric", "a=b=1", "--tag", "x", "--note", "good"
    )

    assert row["metrics"] == {"val_loss": 0.005, "acc": 0.5, "a=b": 1.0}
    assert (row["tags"], row["note"]) == (["even", "x"], "good")
    assert row in document("ls", run_root)["checkpoints"]


def test_notes_need_no_lock(run_root):
    with CheckpointManager(run_root, model=nn.Linear(3, 2)) as manager:
        manager.restore_latest()
        assert invoke("pin", run_root, 100).exit_code == 0
        assert manager.checkpoints()[0].pinned


# ----------------------------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize("command", ["ls", "show", "verify", "prune", "pin", "annotate"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_missing_or_empty_run_root_exits_with_3_and_nothing_is_created(tmp_path, config, command, exists):
    root = tmp_path / "nothing"
    if exists:
        root.mkdir()
    rest = {"prune": ["--config", config], "pin": [1], "annotate": [1, "--tag", "x"]}.get(command, [])

    result = invoke(command, root, *rest)
    assert result.exit_code == 3
    assert ("no checkpoints in" if exists else "no run root") in error_of(result)
    assert root.exists() == exists
    assert not (root / ".checkpointer").exists()


@pytest.mark.parametrize("command", [["show"], ["verify"], ["pin"], ["unpin"], ["annotate", "--tag", "x"]])
def test_a_step_that_does_not_exist_exits_with_3_and_says_which_do(run_root, command):
    result = invoke(*command, run_root, 150)

    assert result.exit_code == 3
    assert "there are 100, 200, 300" in error_of(result)


@pytest.mark.parametrize(
    "arguments",
    [
        ["ls"],
        ["no-such-command"],
        ["show", "ROOT", "latest"],
        ["show", "ROOT", "-5"],
        ["pin", "ROOT"],
        ["annotate", "ROOT", "100"],
        ["annotate", "ROOT", "100", "--metric", "acc"],
        ["annotate", "ROOT", "100", "--metric", "acc=high"],
        ["annotate", "ROOT", "100", "--metric", "acc=1e400"],
        ["ls", "ROOT", "--storage-option", "key"],
        ["ls", "ROOT", "--storage-option", "a=1", "--storage-option", "a.b=2"],
        ["ls", "nosuchprotocol://bucket/run"],
        ["ls", ""],
    ],
)
def test_bad_arguments_exit_with_2(run_root, arguments):
    result = invoke(*(run_root if argument == "ROOT" else argument for argument in arguments))

    assert result.exit_code == 2
    error_of(result)


def test_an_error_of_the_operating_system_exits_with_1(tmp_path):
    place = tmp_path / ("x" * 300)

    result = invoke("ls", place)
    assert result.exit_code == 1
    assert error_of(result).startswith(f"error: {place}: ")


def test_a_run_with_damaged_checkpoints_only_is_a_problem_for_show_and_is_listed(run_root):
    for step in (100, 200, 300):
        flip(run_root / f"checkpoint-{step}" / "manifest.json", 50)

    assert invoke("show", run_root).exit_code == 1
    assert invoke("pin", run_root, 100).exit_code == 1
    assert invoke("ls", run_root).exit_code == 0


def test_no_arguments_print_the_help_and_exit_with_2():
    result = invoke()

    assert result.exit_code == 2
    assert "Usage: checkpointer" in result.stdout


def test_help_documents_every_exit_code_and_every_json_document():
    text = invoke("--help").stdout
    assert re.findall(r"^ +([0-9])  ", text, re.MULTILINE) == ["0", "1", "2", "3"]
    for command in cli.commands:
        described = invoke(command, "--help")
        assert described.exit_code == 0
        assert "--json:" in described.stdout


def test_version_prints_the_version():
    result = invoke("--version")

    assert result.exit_code == 0
    assert __version__ in result.stdout


def test_without_click_one_line_says_what_to_install():
    code = "import sys; sys.modules['click'] = None; from checkpointer.cli import main; main()"
    result = child("ls", ".", code=code)

    assert result.returncode == 2
    assert 'pip install "torch-checkpointer[cli]"' in error_of(result)


def test_the_module_is_a_program(run_root):
    result = child("ls", run_root, "--json")

    assert result.returncode == 0
    assert len(json.loads(result.stdout)["checkpoints"]) == 3
    assert child("ls", run_root / "none").returncode == 3


def test_a_reader_that_goes_away_is_no_error(run_root):
    process = subprocess.Popen(
        [sys.executable, "-m", "checkpointer", "show", str(run_root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None

    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 0


# ------------------------------------------------------------------------------------------------------ terminals


def test_a_terminal_gets_a_coloured_table_without_empty_columns(run_root):
    text = on_terminal("ls", run_root)

    assert "─────" in text
    assert "\x1b[32mok" in text
    header = next(line for line in visible(text).splitlines() if "step" in line)
    columns = ["step", "epoch", "sequence", "created", "age", "size", "metrics", "tags", "finite", "status"]
    assert header.split() == columns


def test_a_terminal_gets_a_tree_from_show_and_colours_from_prune(run_root, config):
    tree = visible(on_terminal("show", run_root))
    assert "├── model (module, 2 tensors, 32B)" in tree
    assert "│   ├── weight  float32 [2, 3] 24B" in tree

    assert "\x1b[31mremove" in on_terminal("prune", run_root, "--config", config, "--dry-run")


def test_no_color_takes_every_escape_out_of_the_table(run_root):
    text = on_terminal("ls", run_root, NO_COLOR="1")

    assert "─────" in text
    assert "\x1b" not in text


def test_the_table_is_as_narrow_as_columns_says(run_root):
    invoke("annotate", run_root, 100, "--tag", "a tag of many words that needs more than one line")

    text = visible(on_terminal("ls", run_root, width=70))
    assert max(map(len, text.splitlines())) <= 70
    assert "…" not in text


def test_a_dumb_terminal_gets_plain_text(run_root):
    text = on_terminal("ls", run_root, TERM="dumb")

    assert text.split()[: len(COLUMNS)] == COLUMNS
    assert "\x1b" not in text


def test_a_pipe_gets_complete_lines_however_long(run_root):
    tag = "x" * 500
    invoke("annotate", run_root, 100, "--tag", tag)

    result = child("ls", run_root, env={"COLUMNS": "40"})
    assert tag in result.stdout


# ------------------------------------------------------------------------------------------------- hostile content


HOSTILE = "\x1b]0;owned\x07[bold red]x[/bold red]\u202e\r\n\x9b31m"


def test_names_from_a_checkpoint_cannot_command_the_terminal(tmp_path):
    make_run(tmp_path, [100], state={HOSTILE: HOSTILE, "t": {HOSTILE: torch.zeros(1)}})
    with CheckpointManager(tmp_path, read_only=True, state={}) as manager:
        manager.annotate(100, metrics={HOSTILE: 1.0}, tags=[HOSTILE], note=HOSTILE)

    for command in ("ls", "show"):
        plain = invoke(command, tmp_path).stdout
        assert not [char for char in plain if not char.isprintable() and char != "\n"]
        assert r"\x1b]0;owned\x07[bold red]x[/bold red]\u202e\r\n\x9b31m" in plain

        for env in ({}, {"NO_COLOR": "1"}):
            shown = on_terminal(command, tmp_path, width=400, **env)
            assert not [char for char in visible(shown) if not char.isprintable() and char != "\n"]
            assert "[bold red]x[/bold red]" in visible(shown)


def test_json_is_ascii_whatever_the_names(tmp_path):
    make_run(tmp_path, [100], state={HOSTILE + "\x7f\ud800": 1})
    with CheckpointManager(tmp_path, read_only=True, state={}) as manager:
        manager.annotate(100, tags=[HOSTILE + "\x7fü"])

    for command in ("ls", "show"):
        text = invoke(command, tmp_path, "--json").stdout
        assert text.isascii()
        assert text.rstrip("\n").isprintable()


def test_an_error_quotes_hostile_arguments_safely(tmp_path):
    result = invoke("ls", tmp_path / HOSTILE)

    assert error_of(result).rstrip("\n").isprintable()


@pytest.mark.parametrize(
    "tree",
    [
        {"$tensor": "missing"},
        {"$tuple": 5},
        {"$datetime": []},
        {"$npscalar": ["<f4", "AA=="]},
        {"$dict": [[1]]},
        {"$set": {"a": 1}},
        {"$bytes": "?"},
        {"$sparse": {"layout": "coo"}},
        {"$complex": [{}, {}]},
        {"$deque": [None, 3]},
        {"$int": "zz"},
    ],
)
def test_a_malformed_value_is_shown_as_it_lies_in_the_file(tree):
    component = Component("stateful", {"bad": tree}, {"t": TensorSpec("float32", (2,))})

    shown = dict(leaves(describe_component(component)))
    assert shown["bad"].text == json.dumps(tree)
    assert shown["t"].spec is not None  # what the tree does not mention is shown all the same


def test_a_tree_nested_beyond_every_limit_is_no_traceback():
    tree: Any = 1
    for _ in range(5000):
        tree = [tree]
    (node,) = describe_component(Component("stateful", tree, {}))

    assert node.text == "(nested too deeply to show)"


# ------------------------------------------------------------------------------------------------- remote storage


@pytest.fixture
def memory_root():
    yield make_run("memory://cli/run")
    MemoryFileSystem().rm("/cli", recursive=True)


def test_every_command_works_on_a_remote_run_root(memory_root, config):
    assert [row["step"] for row in document("ls", memory_root)["checkpoints"]] == [100, 200, 300]
    assert "weight" in invoke("show", memory_root).stdout
    assert invoke("verify", memory_root).exit_code == 0
    assert invoke("pin", memory_root, 100).exit_code == 0
    assert invoke("annotate", memory_root, 300, "--note", "n").exit_code == 0
    pruned = invoke("prune", memory_root, "--config", config)
    assert (pruned.exit_code, pruned.stderr) == (0, "")
    assert [row["step"] for row in document("ls", memory_root)["checkpoints"]] == [100, 300]
    assert invoke("ls", "memory://cli/none").exit_code == 3


class Recorded(MemoryFileSystem):  # type: ignore[misc]  # fsspec ships no types
    """Remembers what it was made with, and quotes its secret in errors."""

    protocol = "recorded"
    cachable = False
    options: Any = None

    def __init__(self, **options: Any) -> None:
        super().__init__()
        type(self).options = options

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        if "token" in self.options:
            raise OSError(f"refused {self.options['token']}")
        return super().ls(path, detail, **kwargs)


@pytest.fixture
def recorded():
    fsspec.register_implementation("recorded", Recorded, clobber=True)
    return Recorded


def test_storage_options_nest_at_dots_and_are_json_where_they_can_be(recorded):
    options = ["anon=true", "client.url=http://x:1/?a=b", "client.retries=3", 'tags=["a"]', "name=run", 'id="7"']
    result = invoke("ls", "recorded://x", *(word for option in options for word in ("--storage-option", option)))

    assert result.exit_code == 3
    assert recorded.options == {
        "anon": True,
        "client": {"url": "http://x:1/?a=b", "retries": 3},
        "tags": ["a"],
        "name": "run",
        "id": "7",
    }


def test_a_secret_storage_option_never_reaches_an_error_message(recorded):
    result = invoke("ls", "recorded://x", "--storage-option", "token=s3cret")

    assert result.exit_code == 1
    assert "refused ***" in error_of(result)


# --------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    "size, text",
    [(0, "0B"), (999, "999B"), (1000, "1.0kB"), (999_949, "999.9kB"), (999_950, "1.0MB"), (5 * 10**14, "500.0TB")],
)
def test_sizes_are_decimal(size, text):
    assert render.human_size(size) == text


@pytest.mark.parametrize(
    "seconds, text", [(-5, "0s"), (59, "59s"), (60, "1min"), (3599, "59min"), (3600, "1h"), (200_000, "2d")]
)
def test_ages_are_in_the_largest_unit(seconds, text):
    assert render.age(dt.timedelta(seconds=seconds)) == text

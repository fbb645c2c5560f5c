"""Run roots that are not what was meant: refused before anything is made."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from checkpointer import CheckpointManager, load_whole_model
from checkpointer.errors import CheckpointerWarning, CheckpointNotFoundError, ConfigError
from checkpointer.storage import LocalStorage, open_storage
from tests.conftest import Root
from tests.integration.cli.test_cli import error_of, invoke
from tests.integration.repository.test_unreadable import SYNC, make, manager


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(root: Any, match: str, *, read_only: bool = False) -> None:
    with pytest.raises(ConfigError, match=match):
        manager(root, read_only=read_only)[0].restore_latest()


# --------------------------------------------------------------------------------------------- inside a checkpoint


@pytest.mark.parametrize("read_only", [False, True])
def test_the_directory_of_one_checkpoint_is_no_run_root(tmp_path: Path, read_only: bool) -> None:
    make(tmp_path / "run")
    before = sorted(os.listdir(tmp_path / "run" / "checkpoint-2"))
    refused(tmp_path / "run" / "checkpoint-2", rf"one checkpoint.*{tmp_path}/run, .*restore\(2\)", read_only=read_only)
    assert sorted(os.listdir(tmp_path / "run" / "checkpoint-2")) == before


@pytest.mark.parametrize("inner", ["checkpoint-2/sub", "checkpoint-2/sub/deep", "checkpoint-77", "checkpoint-77/sub"])
def test_nothing_inside_a_run_that_retention_would_take_with_a_checkpoint_is_a_run_root(
    tmp_path: Path, inner: str
) -> None:
    make(tmp_path / "run")
    refused(tmp_path / "run" / inner, rf"checkpoint-\d+.* {tmp_path}/run")
    assert not (tmp_path / "run" / inner).exists()


@pytest.mark.parametrize("inner", ["", "tmp", "tmp/mine", "quarantine/checkpoint-5-abcdef01"])
def test_the_private_directory_of_a_run_is_no_run_root(tmp_path: Path, inner: str) -> None:
    make(tmp_path / "run")
    run = tmp_path / "run"
    before = sorted(os.walk(run))
    refused(run / ".checkpointer" / inner, f"inside .checkpointer, which belongs to the run in {run}")
    assert sorted(os.walk(run)) == before


def test_a_link_to_a_checkpoint_and_the_working_directory_are_looked_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "run")
    (tmp_path / "latest").symlink_to(tmp_path / "run" / "checkpoint-3")
    refused(tmp_path / "latest", r"one checkpoint.*restore\(3\)")
    monkeypatch.chdir(tmp_path / "run" / "checkpoint-1")
    refused(".", r"one checkpoint.*restore\(1\)")
    refused("sub", "lies inside a checkpoint")


def test_a_copy_of_a_checkpoint_under_another_name_is_no_run_root_either(root: Root, tmp_path: Path) -> None:
    make(root.url, options=root.options)
    if root.kind == "local":
        shutil.copytree(Path(root.url, "checkpoint-2"), tmp_path / "best")
        refused(tmp_path / "best", r"one checkpoint \(of step 2\)")
        return
    storage: Any = open_storage(root.url, root.options)
    storage.fs.pipe_file(f"{storage._path}-best/manifest.json", storage.read("checkpoint-2/manifest.json", 1 << 16))
    reader, _ = manager(f"{root.url}-best", read_only=True, options=root.options)
    with pytest.raises(ConfigError, match=r"one checkpoint \(of step 2\)"):
        reader.restore_latest()


def test_a_checkpoint_in_a_bucket_is_no_run_root(object_root: Root) -> None:
    make(object_root.url, options=object_root.options)
    for inner, match in (
        ("checkpoint-2", r"one checkpoint, .*/run.*restore\(2\)"),
        ("checkpoint-2/sub", "lies inside a checkpoint"),
        ("checkpoint-77", "has the name of a checkpoint of the run in"),
        (".checkpointer/notes", "inside .checkpointer"),
    ):
        with pytest.raises(ConfigError, match=match):
            manager(f"{object_root.url}/{inner}", options=object_root.options)


FOREIGN = {
    "Hugging Face's Trainer": ["trainer_state.json", "model.safetensors", "optimizer.pt", "config.json"],
    "Hugging Face's Trainer (sharded)": ["model-00001-of-00002.safetensors", "model.safetensors.index.json"],
    "Accelerate": ["random_states_0.pkl", "model.safetensors"],
    "DeepSpeed": ["zero_to_fp32.py", "latest"],
    "torch.distributed.checkpoint": [".metadata", "__0_0.distcp"],
    "torch.save": ["model.pt"],
}


@pytest.mark.parametrize("inside", ["", "run", "run/deep"])
@pytest.mark.parametrize("whose", FOREIGN)
def test_a_checkpoint_of_another_library_is_no_run_root(tmp_path: Path, whose: str, inside: str) -> None:
    name = {"Accelerate": "checkpoint_5", "DeepSpeed": "global_step5"}.get(whose, "checkpoint-5")
    place = tmp_path / "outputs" / name
    place.mkdir(parents=True)
    for file in FOREIGN[whose]:
        (place / file).write_text("{}")
    words = f"looks like a checkpoint of {whose.partition(' (')[0]}.*{tmp_path}/outputs, or one of its own.*import"
    for read_only in (False, True):
        refused(place / inside, words, read_only=read_only)
    assert sorted(os.listdir(place)) == sorted(FOREIGN[whose])


def test_a_checkpoint_of_another_library_in_a_bucket_is_no_run_root(object_root: Root) -> None:
    storage: Any = open_storage(object_root.url, object_root.options)
    storage.fs.pipe_file(f"{storage._path}/checkpoint-500/trainer_state.json", b"{}")
    for inner in ("checkpoint-500", "checkpoint-500/run"):
        with pytest.raises(ConfigError, match="looks like a checkpoint of Hugging Face's Trainer"):
            manager(f"{object_root.url}/{inner}", options=object_root.options)


def test_what_is_none_of_our_checkpoints_in_a_run_is_not_told_to_be_restored(tmp_path: Path) -> None:
    make(tmp_path / "run")
    for step, files, words in (
        (5, ["trainer_state.json"], "looks like a checkpoint of Hugging Face"),
        (6, [], "has the name of a checkpoint of the run in"),
        (7, ["index.json", "model.safetensors"], "without manifest.json"),
    ):
        place = tmp_path / "run" / f"checkpoint-{step}"
        place.mkdir()
        for file in files:
            (place / file).write_text("{}")
        with pytest.raises(ConfigError, match=words) as caught:
            manager(place)
        assert "mgr.restore" not in str(caught.value)


def test_a_new_run_root_with_the_name_of_a_checkpoint_is_warned_of_until_it_holds_a_run(tmp_path: Path) -> None:
    root = tmp_path / "experiments" / "checkpoint-7"
    for read_only in (True, False):
        root.mkdir(parents=True, exist_ok=True)
        mgr, _ = manager(root, read_only=read_only)
        with pytest.warns(CheckpointerWarning, match=rf"the name of one checkpoint.*{tmp_path}/experiments") as said:
            assert mgr.restore_latest() is None
        assert len(said) == 1
    with mgr:
        mgr.save(1)
    writer, _ = manager(root)
    assert writer.restore_latest().step == 1
    writer.close()


def test_a_run_root_that_only_bears_the_name_of_a_checkpoint_is_accepted(tmp_path: Path) -> None:
    root = tmp_path / "experiments" / "checkpoint-7"
    writer, _ = manager(root)
    with pytest.warns(CheckpointerWarning, match="the name of one checkpoint"):
        writer.save(3)
    writer.close()
    (root / "manifest.json").write_text('{"name": "a web application"}')
    reader, _ = manager(root, read_only=True)
    assert reader.restore_latest().step == 3


@pytest.mark.parametrize("command", ["ls", "show", "verify", "doctor", "prune", "pin"])
def test_the_commands_refuse_a_checkpoint_and_a_file_and_make_nothing(tmp_path: Path, command: str) -> None:
    make(tmp_path / "run")
    config = tmp_path / "config.yaml"
    config.write_text("keep: {last: 1}\n")
    rest: list[object] = {"prune": ["--config", config], "pin": [1]}.get(command, [])
    result = invoke(command, tmp_path / "run" / "checkpoint-2", *rest)
    assert result.exit_code == 2
    assert f"pass the directory that holds it, {tmp_path}/run" in error_of(result)
    assert invoke(command, config, *rest).exit_code == 2
    assert invoke(command, tmp_path / "missing", *rest).exit_code == 3
    assert sorted(os.listdir(tmp_path)) == ["config.yaml", "run"]


# ------------------------------------------------------------------------------------------------------- spelling


@pytest.mark.parametrize(
    "root, match",
    [
        (Path("s3://bucket/run"), "pathlib.*'s3://bucket/run'"),
        ("s3:/bucket/run", "'s3://bucket/run'"),
        ("gs:/b/run", "'gs://b/run'"),
        ("S3:/b/run", "'s3://b/run'"),
        ("S3://b/run", "in capitals: write 's3://b/run'"),
        ("simplecache::S3://b/run", "write 'simplecache::s3://b/run'"),
        (Path("s3://bucket/run").absolute(), "the URL 's3://bucket/run'.*pathlib"),
        ("/nowhere/s3:/bucket/run", "the URL 's3://bucket/run'.*abspath"),
        ("outputs/gs:/bucket/run", "the URL 'gs://bucket/run'"),
        ("file:///nowhere/s3:/bucket/run", "the URL 's3://bucket/run'"),
        ("None", r"str\(None\)"),
        ("None/run", r"str\(None\)"),
        ("{run}", r"\{run\} is a place.*f-string without its f"),
        ("runs/{cfg.name}/x", r"\{cfg.name\} is a place"),
        ("%SCRATCH%/run", "%SCRATCH% is a variable"),
        ("s3:bucket/run", "'s3://bucket/run'"),
        ("memory:/run", "'memory://run'"),
        ("file:/data/run", "'file:///data/run'"),
        ("a::b", "chained URL"),
        ("simplecache::s3:/b/run", "'simplecache::s3://b/run'"),
        ("$SCRATCH/run", r"\$SCRATCH is a variable"),
        ("${SCRATCH}/run", r"\${SCRATCH} is a variable"),
        ("runs/$USER", r"\$USER is a variable"),
        ("file://$SCRATCH/run", r"\$SCRATCH is a variable"),
        ("~nosuchuser/run", "~nosuchuser is no user"),
        ("run\n", "'run' was meant"),
        (" run", "'run' was meant"),
        ("run\r", "'run' was meant"),
        ("s3://bucket/run\n", "'s3://bucket/run' was meant"),
        ("'run'", "quotes"),
        ("", "a path or a URL"),
        ("file://", "a path or a URL"),
        ("a\0b", "a path or a URL"),
        (b"run", "a path or a URL"),
        (None, "a path or a URL"),
        (7, "a path or a URL"),
    ],
)
def test_what_looks_like_a_typing_error_is_refused_with_what_was_meant(here: Path, root: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        CheckpointManager(root, state={})
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    "root",
    [
        "/nowhere/s3:/key:SECRET@bucket/run?t=SECRET",
        "S3://key:SECRET@b/run?t=SECRET",
        "s3:/key:SECRET@bucket/run",
        "s3://key:SECRET@bucket/run?token=SECRET ",
        "s3:/b?t=SECRET",
    ],
)
def test_no_refusal_repeats_a_secret(here: Path, root: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CheckpointManager(root, state={})
    assert "SECRET" not in str(caught.value)
    assert "s3:/" in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["s3:/bucket/run", "x/s3:/run", "None", "{run}", "%A%", "$SCRATCH/run", "${SCRATCH}", "a::b", "run ", "'run'"],
)
def test_a_directory_of_such_a_name_that_exists_is_what_was_meant(here: Path, name: str) -> None:
    (here / name).mkdir(parents=True)
    writer, _ = manager(name)
    with writer:
        writer.save(1)
    assert (here / name / "checkpoint-1").exists()


@pytest.mark.parametrize("name", ["s3:/bucket/run", "x/s3:/run", "None", "{run}", "%A%", "$SCRATCH/run", "a::b"])
def test_dot_slash_means_just_this_name(here: Path, name: str) -> None:
    writer, _ = manager(f"./{name}")
    with writer:
        writer.save(1)
    assert (here / name / "checkpoint-1").exists()


ORDINARY = ["{1}", "runs/None", "run:1", "minio:/x", "cost$5", "a b", ".", "x/../y", "~", "~/runs", "run%20"]


@pytest.mark.parametrize("name", ORDINARY)
def test_an_unusual_path_is_still_a_path(here: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("HOME", str(here))
    storage = open_storage(name)
    assert isinstance(storage, LocalStorage)
    assert storage.root == os.path.normpath(os.path.join(here, os.path.expanduser(name)))


@pytest.mark.skipif(os.name == "nt", reason="there it is a path")
@pytest.mark.parametrize("root", ["C:\\run", "C:/run", r"\\server\share\run"])
def test_a_path_of_windows_is_none_elsewhere(here: Path, root: str) -> None:
    with pytest.raises(ConfigError, match="looks like a path of Windows"):
        CheckpointManager(root, state={})
    assert list(here.iterdir()) == []


# ------------------------------------------------------------------------------------- what is not there, or a file


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("kind", ["file", "below a file", "dangling link", "below a dangling link", "loop"])
def test_a_root_that_cannot_be_a_directory_is_refused(
    tmp_path: Path,
    kind: str,
    read_only: bool,
) -> None:
    place = tmp_path / "run"
    if kind.endswith("file"):
        place.write_text("precious")
    else:
        place.symlink_to(place if kind == "loop" else tmp_path / "nowhere")
    words = {"file": "is a file", "below a file": "is a file", "loop": "circle"}.get(kind, "link to .*nowhere")
    refused(place / "sub" if kind.startswith("below") else place, words, read_only=read_only)
    assert os.listdir(tmp_path) == ["run"]


def test_every_call_of_a_reader_says_that_its_run_root_is_not_there(root: Root) -> None:
    reader, _ = manager(root.url, read_only=True, options=root.options)
    calls = [
        reader.restore_latest,
        lambda: reader.restore(1),
        lambda: reader.restore_best("loss"),
        reader.checkpoints,
        reader.latest,
        lambda: reader.best("loss"),
        reader.verify,
        lambda: reader.verify(1),
        lambda: reader.pin(1),
        lambda: reader.unpin(1),
        lambda: reader.annotate(1, note="x"),
        lambda: reader.prune(dry_run=True),
    ]
    for call in calls:
        with pytest.raises(CheckpointNotFoundError, match=r"there is no run root .*run.*check the path"):
            call()
    with pytest.raises(CheckpointNotFoundError):
        load_whole_model(root.url, trust_pickle=True, storage_options=root.options)
    assert not open_storage(root.url, root.options).exists("")


def test_a_watch_waits_for_a_run_root_that_is_not_there_yet(root: Root) -> None:
    reader, _ = manager(root.url, read_only=True, options=root.options)
    assert list(reader.watch(timeout=0)) == []
    watched = reader.watch(poll=0.01, timeout=60, stop=lambda: len(looks) > 3 or looks.append(None))
    looks: list[None] = []
    assert list(watched) == []
    watched = reader.watch(poll=0.01, timeout=60)
    make(root.url, (1,), options=root.options)
    assert next(watched).step == 1


def test_a_reader_of_a_run_that_has_only_begun_finds_nothing(local: Root) -> None:
    os.makedirs(local.url)
    reader, _ = manager(local.url, read_only=True)
    assert reader.restore_latest() is None
    assert reader.checkpoints() == []
    assert list(Path(local.url).iterdir()) == []


def test_a_run_root_that_has_become_a_file_is_no_empty_run(local: Root) -> None:
    os.makedirs(local.url)
    for read_only in (False, True):
        mgr, _ = manager(local.url, read_only=read_only)
        os.rmdir(local.url)
        Path(local.url).write_text("precious")
        with pytest.raises(OSError, match="cannot be read"):
            mgr.checkpoints()
        os.remove(local.url)
        os.makedirs(local.url)


def test_an_object_in_the_place_of_the_run_root_is_no_run(object_root: Root) -> None:
    storage: Any = open_storage(object_root.url, object_root.options)
    storage.fs.pipe_file(storage._path, b"weights")
    reader, _ = manager(object_root.url, read_only=True, options=object_root.options)
    with pytest.raises(ConfigError, match="is a file"):
        reader.restore_latest()


def test_a_writer_may_begin_a_run_where_nothing_is(root: Root) -> None:
    settings = {**SYNC, "require_resume": True}
    mgr = CheckpointManager(root.url, config=settings, storage_options=root.options, state={"value": 0})
    assert mgr.checkpoints() == []
    assert mgr.latest() is None

"""Names of checkpoints that hold none: said when the run is opened, by name and kind, with what to do."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from checkpointer.errors import CheckpointerWarning, CheckpointNotFoundError, CorruptCheckpointError, SaveError
from checkpointer.repository.doctor import Doctor
from checkpointer.repository.repository import Repository
from checkpointer.repository.sequence import SEQUENCE_LEAP
from checkpointer.storage import open_storage
from checkpointer.testing import Fault, faulty
from tests.conftest import Root
from tests.integration.cli.test_cli import document, error_of, invoke
from tests.integration.repository.test_unreadable import make, manager

FILES = {
    "Hugging Face's Trainer": ["trainer_state.json", "model.safetensors", "optimizer.pt"],
    "Hugging Face's Trainer (sharded)": [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ],
    "Hugging Face's Trainer (model alone)": ["config.json", "model.safetensors"],
    "Accelerate": ["random_states_0.pkl", "model.safetensors", "optimizer.bin"],
    "DeepSpeed": ["zero_to_fp32.py", "latest"],
    "torch.distributed.checkpoint": [".metadata", "__0_0.distcp"],
    "Lightning": ["last.ckpt"],
    "torch.save": ["model.pt"],
}


def stranger(root: str | Path, step: int, files: list[str]) -> Path:
    place = Path(root, f"checkpoint-{step}")
    place.mkdir(parents=True)
    for name in files:
        (place / name).write_bytes(b"x")
    return place


def said_by(call: Any) -> tuple[Any, list[str]]:
    """What a call returned, and the warnings of ours."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    said = [str(item.message) for item in caught if issubclass(item.category, CheckpointerWarning)]
    return result, [text for text in said if "its storage has no lock" not in text]


# ------------------------------------------------------------------------------------------------ when a run is opened


@pytest.mark.parametrize("whose", FILES)
def test_checkpoints_of_other_libraries_are_named_by_whose_they_look_like(local: Root, whose: str) -> None:
    place = stranger(local.url, 500, FILES[whose])
    for read_only in (False, True):
        mgr, _ = manager(local.url, read_only=read_only)
        restored, (text,) = said_by(mgr.restore_latest)
        assert restored is None
        assert f"{place} looks like a checkpoint of {whose.partition(' (')[0]}" in text
        assert "saving step 500 fails" in text
        assert "checkpointer import" in text
        assert said_by(mgr.restore_latest)[1] == []  # once
        mgr.close()


def test_the_weights_of_hugging_face_are_taken_over_by_the_command_that_the_warning_names(local: Root) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    place = stranger(local.url, 500, ["trainer_state.json"])
    model = torch.nn.Linear(2, 2)
    save_file(model.state_dict(), place / "model.safetensors")
    mgr, _ = manager(local.url, read_only=True)
    (text,) = said_by(mgr.restore_latest)[1]
    command = text.partition("'checkpointer ")[2].partition("'")[0].replace("NEW_ROOT", f"{local.url}-new").split()
    assert invoke(*command).exit_code == 0
    assert document("show", f"{local.url}-new")["step"] == 500


def test_a_half_copied_checkpoint_is_named_though_an_older_one_is_restored(local: Root) -> None:
    make(local.url)
    os.remove(Path(local.url, "checkpoint-3", "manifest.json"))
    mgr, _ = manager(local.url)
    with mgr:
        restored, (text,) = said_by(mgr.restore_latest)
        assert restored.step == 2
        assert "checkpoint-3 holds files of a checkpoint (index.json) without manifest.json" in text
        assert "copy it again as a whole, manifest.json last" in text
        with pytest.raises(SaveError, match=r"it has no manifest\.json"):
            mgr.save(3)


@pytest.mark.parametrize(
    "files, words, cure",
    [
        ([], "is empty", "'checkpointer doctor --fix' removes it"),
        (["notes.txt"], "holds no checkpoint but notes.txt", "move it away"),
    ],
)
def test_what_is_nobodys_checkpoint_is_named_too(local: Root, files: list[str], words: str, cure: str) -> None:
    stranger(local.url, 7, files)
    mgr, _ = manager(local.url)
    with mgr:
        _, (text,) = said_by(lambda: mgr.save(1))  # the first save opens a run as well
    assert f"checkpoint-7 {words}; {cure}" in text


def test_a_step_that_is_a_stranger_is_not_said_to_be_simply_not_there(local: Root) -> None:
    make(local.url, (1,))
    stranger(local.url, 500, FILES["Hugging Face's Trainer"])
    mgr, _ = manager(local.url, read_only=True)
    with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint of step 500.*checkpoint-500 is none: .*doctor"):
        mgr.restore(500)


def test_names_of_other_habits_are_said_where_there_is_no_checkpoint(local: Root) -> None:
    Path(local.url, "checkpoint_3").mkdir(parents=True)
    Path(local.url, "epoch=1-step=9.ckpt").write_bytes(b"x")
    mgr, _ = manager(local.url)
    with mgr:
        restored, (text,) = said_by(mgr.restore_latest)
        assert restored is None
        assert "checkpoint_3 looks like a checkpoint of Accelerate" in text
        assert "step=9.ckpt looks like a checkpoint of Lightning" in text
        mgr.save(1)
    assert said_by(manager(local.url, read_only=True)[0].restore_latest)[1] == []


def test_of_many_only_the_newest_are_looked_into(local: Root) -> None:
    for step in range(100, 120):
        stranger(local.url, step, ["pytorch_model.bin"])
    with faulty(Fault("EIO", at=10**9, on=["list_directory"])) as fault:
        mgr, _ = manager(local.url, read_only=True)
    _, (text,) = said_by(mgr.restore_latest)
    assert "checkpoint-119 looks" in text
    assert "and 15 more" in text
    assert sum("checkpoint-1" in operation for operation in fault.operations) == 5


def test_a_clean_run_costs_no_further_request(root: Root) -> None:
    make(root.url, options=root.options)
    asked = []
    for strange in (False, True):
        if strange:
            open_storage(root.url, root.options).put("checkpoint-9/index.json", b"x")
        with faulty(Fault("EIO", at=10**9)) as fault:
            mgr, _ = manager(root.url, read_only=True, options=root.options)
        _, said = said_by(mgr.restore_latest)
        assert len(said) == strange
        looks = [operation for operation in fault.operations if operation.startswith(("list_directory", "exists"))]
        asked.append([operation for operation in looks if "notes" not in operation])
    assert set(asked[0]) == {"list_directory()"}  # the root's own
    assert sorted(set(asked[1]) - set(asked[0])) == ["list_directory(checkpoint-9)"]
    assert len(asked[1]) == len(asked[0]) + 1


def test_what_a_writer_has_not_finished_in_a_bucket_is_no_stranger(object_root: Root) -> None:
    make(object_root.url, (1,), options=object_root.options)
    other, _ = manager(object_root.url, options=object_root.options)
    attempt = other._repository.begin(5, 0)
    attempt.write("index.json", [b"x"], 1)
    mgr, _ = manager(object_root.url, read_only=True, options=object_root.options)
    restored, said = said_by(mgr.restore_latest)
    assert restored.step == 1
    assert said == []


def test_a_root_that_cannot_be_looked_into_closer_is_restored_all_the_same(local: Root) -> None:
    make(local.url, (1,))
    stranger(local.url, 5, ["x"])
    with faulty(Fault("EIO", on=["list_directory"], path="checkpoint-5")):
        mgr, _ = manager(local.url, read_only=True)
    restored, (text,) = said_by(mgr.restore_latest)
    assert restored.step == 1
    assert "cannot be looked into" in text


# ---------------------------------------------------------------------------------------------------------- links


def moved_and_linked(root: str, step: int, to: Path) -> Path:
    place = Path(root, f"checkpoint-{step}")
    shutil.move(place, to)
    place.symlink_to(to)
    return place


def test_a_newest_checkpoint_that_was_linked_back_is_skipped_by_name_and_not_in_silence(
    local: Root, tmp_path: Path
) -> None:
    make(local.url)
    place = moved_and_linked(local.url, 3, tmp_path / "archive")
    mgr, _ = manager(local.url)
    with mgr:
        restored, said = said_by(mgr.restore_latest)
        assert restored.step == 2
        assert [(item.step, item.path) for item in restored.skipped] == [(3, str(place))]
        assert any(f"{place} is a link to {tmp_path}/archive" in text and "Move the directory" in text for text in said)
        with pytest.raises(CorruptCheckpointError, match="is a link to"):
            mgr.restore(3)
        with pytest.raises(SaveError, match=r"checkpoint-3 exists .*\(it is a link to.*back to this name"):
            mgr.save(3)
        assert mgr.save(4).result().sequence > SEQUENCE_LEAP  # also once the link's checkpoint is back
    assert place.is_symlink()
    listed = {row["step"]: row["reason"] for row in document("ls", local.url)["checkpoints"]}
    assert "is a link to" in listed[3]


@pytest.mark.parametrize("dangling", [False, True])
def test_a_run_that_holds_nothing_but_links_to_its_checkpoints_is_not_begun_anew(
    local: Root,
    tmp_path: Path,
    dangling: bool,
) -> None:
    make(local.url, (1,))
    moved_and_linked(local.url, 1, tmp_path / "archive")
    if dangling:
        os.rename(tmp_path / "archive", tmp_path / "not mounted")
    mgr, _ = manager(local.url)
    with mgr, pytest.warns(CheckpointerWarning, match="is a link to"), pytest.raises(CorruptCheckpointError):
        mgr.restore_latest()


def test_a_link_to_what_holds_no_checkpoint_is_a_stranger(local: Root, tmp_path: Path) -> None:
    os.makedirs(local.url)
    (tmp_path / "base").mkdir()
    Path(local.url, "checkpoint-0").symlink_to(tmp_path / "base")
    mgr, _ = manager(local.url)
    with mgr:
        restored, (text,) = said_by(mgr.restore_latest)
    assert restored is None
    assert f"checkpoint-0 is a link to {tmp_path}/base, which holds no checkpoint" in text


# ------------------------------------------------------------------------------------------------ doctor and commands


def test_the_doctor_says_what_to_do_with_each_kind(local: Root, tmp_path: Path) -> None:
    make(local.url)
    os.remove(Path(local.url, "checkpoint-2", "manifest.json"))
    stranger(local.url, 500, FILES["Hugging Face's Trainer"])
    stranger(local.url, 501, ["a.txt"])
    moved_and_linked(local.url, 3, tmp_path / "archive")
    diagnosis = Doctor(Repository(open_storage(local.url))).mend()
    found = {Path(item.path).name: item for item in diagnosis.findings}
    assert {name: item.kind for name, item in found.items()} == {
        "checkpoint-2": "no-manifest",
        "checkpoint-3": "link",
        "checkpoint-500": "in-the-way",
        "checkpoint-501": "in-the-way",
    }
    assert "manifest.json last" in found["checkpoint-2"].advice
    assert "move the checkpoint back" in found["checkpoint-3"].advice
    assert "checkpointer import" in found["checkpoint-500"].advice
    assert found["checkpoint-501"].advice == "move it away"
    assert Path(local.url, "checkpoint-3").is_symlink()


def test_the_commands_point_to_the_doctor_where_only_strangers_are(local: Root) -> None:
    stranger(local.url, 500, FILES["Hugging Face's Trainer"])
    result = invoke("ls", local.url)
    assert result.exit_code == 3
    assert "checkpoint-500 cannot be restored: 'checkpointer doctor' says more" in error_of(result)

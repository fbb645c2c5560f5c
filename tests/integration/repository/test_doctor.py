"""The doctor: each ailment is found by name, on each storage, and mended only where that is safe."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from checkpointer import CheckpointManager
from checkpointer.errors import CheckpointerWarning, CheckpointNotFoundError, RunLockedError
from checkpointer.format import paths, strict_json
from checkpointer.policy.retention import KeepPolicy, plan
from checkpointer.repository.doctor import Diagnosis, Doctor, Finding
from checkpointer.repository.notes import Note, read_notes
from checkpointer.repository.repository import Repository
from checkpointer.storage import LocalStorage, Storage, open_storage
from checkpointer.testing import Fault, faulty
from tests.conftest import Root
from tests.integration.cli.test_cli import document, error_of, invoke, on_terminal, visible
from tests.support import processes
from tests.support.forge import forge_manifest

REPOSITORY = Path(__file__).resolve().parents[3]
SYNC = {"write": {"mode": "sync", "durable": False}, "require_resume": False}
NEW = "a" * 32


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Stores without a lock say so; that is tested where the lock is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointerWarning)
        yield


def make(root: Root, steps: tuple[int, ...] = (1, 2, 3), **config: Any) -> CheckpointManager:
    mgr = CheckpointManager(
        root.url, storage_options=root.options, config={**SYNC, **config}, model=nn.Linear(50, 50), big=torch.ones(9999)
    )
    with mgr:
        for step in steps:
            mgr.save(step, files={"config.json": b"{}"})
    return mgr


def storage_of(root: Root) -> Storage:
    return open_storage(root.url, root.options)


def doctor(root: Root, *, deep: bool = False) -> Doctor:
    return Doctor(Repository(storage_of(root)), deep=deep)


def problems(diagnosis: Diagnosis) -> list[str]:
    return [finding.kind for finding in diagnosis.findings if finding.level == "problem"]


def finding(diagnosis: Diagnosis, kind: str) -> Finding:
    (found,) = [item for item in diagnosis.findings if item.kind == kind]
    assert found.meaning
    assert found.advice
    return found


def names(root: Root) -> list[str]:
    listed = storage_of(root).list_directory("")
    return sorted(entry.name for entry in listed if entry.name.startswith("checkpoint"))


def file_of(root: Root, step: int, name: str) -> str:
    """A file of a checkpoint, relative to the run root, wherever its data lies."""
    repository = Repository(storage_of(root))
    return f"checkpoint-{step}/{repository.manifest(repository.find(step)).place(name)}"


def flip(root: Root, path: str, position: int) -> None:
    storage = storage_of(root)
    data = bytearray(storage.read(path, 1 << 30))
    data[position] ^= 1
    storage.remove(path)
    storage.put(path, bytes(data))


def picture(root: Root) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path(root.url).rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------- health


def test_a_healthy_run_has_no_problems(root: Root) -> None:
    make(root)
    for deep in (False, True):
        diagnosis = doctor(root, deep=deep).examine()
        assert (problems(diagnosis), diagnosis.ok, diagnosis.checkpoints) == ([], True, 3)
    assert doctor(root).mend().fixed == ()


def test_an_examination_changes_no_byte(local: Root) -> None:
    make(local)
    Path(local.url, ".checkpointer", "tmp", NEW).mkdir()
    flip(local, "checkpoint-2/manifest.json", 100)
    before = picture(local)
    assert sorted(problems(doctor(local, deep=True).examine())) == ["damaged", "leftover"]
    assert picture(local) == before
    assert Path(local.url, ".checkpointer", "tmp", NEW).exists()


def test_a_run_root_that_is_not_there_is_an_error_and_not_a_finding(root: Root) -> None:
    with pytest.raises(CheckpointNotFoundError, match="there is no run root"):
        doctor(root).examine()


def test_a_run_root_without_checkpoints_is_healthy(local: Root) -> None:
    make(local, steps=())
    os.makedirs(local.url, exist_ok=True)
    assert doctor(local).examine() == Diagnosis(0, ())


# ------------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name, position", [("manifest.json", 200), ("index.json", 50), ("big.safetensors", 20)])
def test_damage_to_what_describes_a_checkpoint_is_found_without_reading_its_tensors(
    root: Root, name: str, position: int
) -> None:
    make(root)
    path = "checkpoint-2/manifest.json" if name == "manifest.json" else file_of(root, 2, _tensors(root, name))
    flip(root, path, position)
    found = finding(doctor(root).examine(), "damaged")
    assert "checkpoint-2" in found.path
    assert "restores pass over it" in found.advice


def _tensors(root: Root, name: str) -> str:
    return name if name != "big.safetensors" else paths.SHARED_TENSORS


def test_damage_to_a_tensor_is_found_by_a_deep_examination_alone(root: Root) -> None:
    make(root)
    flip(root, file_of(root, 2, paths.SHARED_TENSORS), -1)
    assert doctor(root).examine().ok
    assert problems(doctor(root, deep=True).examine()) == ["damaged"]


def test_a_checkpoint_that_lost_a_file_is_incomplete(root: Root) -> None:
    make(root)
    storage_of(root).remove(file_of(root, 2, "files/config.json"))
    assert "files/config.json" in finding(doctor(root).examine(), "incomplete").meaning


def test_a_deleted_manifest_does_not_make_a_checkpoint_vanish_in_silence(root: Root) -> None:
    make(root)
    storage_of(root).remove("checkpoint-2/manifest.json")
    assert [info.step for info in Repository(storage_of(root)).list_checkpoints().checkpoints] == [1, 3]
    diagnosis = doctor(root).mend()
    found = finding(diagnosis, "no-manifest")
    assert found.path.endswith("checkpoint-2")
    assert "put manifest.json back" in found.advice
    assert names(root) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]  # never touched: nobody knows whose it is


def test_a_checkpoint_of_a_newer_format_is_left_where_it_is(local: Root) -> None:
    make(local)
    forge_manifest(Path(local.url, "checkpoint-3"), lambda fields: fields.update(version=99))
    assert "update this library" in finding(doctor(local).mend(), "newer-format").advice
    assert names(local) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


@pytest.mark.parametrize("by", ["the manager", "the command"])
def test_what_verify_finds_is_remembered_until_a_check_passes(root: Root, by: str) -> None:
    mgr = make(root)
    path = file_of(root, 2, paths.SHARED_TENSORS)
    options = [f"--storage-option={key}={json.dumps(value)}" for key, value in root.options.items()]

    def verify() -> None:
        if by == "the command":
            invoke("verify", root.url, "2", *options)
        else:
            CheckpointManager(root.url, storage_options=root.options, read_only=True).verify(2)

    def known() -> list[str]:
        repository = Repository(storage_of(root))
        (info,) = [info for info in repository.list_checkpoints().checkpoints if info.step == 2]
        return [] if info.damaged is None else [info.damaged, *map(str, read_notes(storage_of(root), info.id))]

    verify()
    assert known() == []
    flip(root, path, -1)
    verify()
    verify()
    reason, *notes = known()
    assert "state.safetensors" in reason
    assert len(notes) == 1  # what is known already is not noted again
    assert reason in finding(doctor(root).examine(), "damaged").meaning
    kept = plan(mgr.checkpoints(), KeepPolicy(last=2), now=mgr.checkpoints()[-1].created).keep
    assert [info.step for info, why in kept if "last 2" in why] == [1, 3]
    flip(root, path, -1)
    verify()
    assert known() == []


def test_what_only_cannot_be_read_is_not_remembered_as_damage(local: Root) -> None:
    make(local)
    opened = LocalStorage.open

    def failing(self: LocalStorage, path: str) -> Any:
        if path == f"checkpoint-2/{paths.SHARED_TENSORS}":
            raise PermissionError(13, "Permission denied", path)
        return opened(self, path)

    repository = Repository(storage_of(local))
    with mock.patch.object(LocalStorage, "open", failing):
        assert not repository.verify(repository.find(2)).ok
    assert repository.find(2).damaged is None


def test_a_reader_who_may_not_note_what_verify_finds_is_told_of_the_damage_alone(root: Root) -> None:
    make(root)
    flip(root, file_of(root, 2, paths.SHARED_TENSORS), -1)
    denied = Fault("EACCES", on=["create", "put", "write"], forever=True)
    with faulty(denied):
        mgr = CheckpointManager(root.url, storage_options=root.options, read_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [item.ok for item in mgr.verify().checkpoints] == [True, False, True]
    assert denied.hits
    assert all(info.damaged is None for info in mgr.checkpoints())


def test_damage_that_a_restore_has_noted_is_named(local: Root) -> None:
    make(local)
    repository = Repository(storage_of(local))
    repository.note(repository.find(2), Note(damaged="a flipped bit"))
    assert "a flipped bit" in finding(doctor(local).examine(), "damaged").meaning


def test_fix_moves_what_is_damaged_to_quarantine_and_loses_no_byte_of_it(local: Root) -> None:
    make(local)
    flip(local, "checkpoint-2/index.json", 50)
    flip(local, "checkpoint-1/manifest.json", 100)
    before = Counter(picture(local).values())
    diagnosis = doctor(local).mend()
    assert sorted(item.kind for item in diagnosis.fixed) == ["damaged", "damaged"]
    assert diagnosis.ok
    assert finding_count(diagnosis, "quarantine") == 2
    assert names(local) == ["checkpoint-3"]
    assert not before - Counter(picture(local).values())


def finding_count(diagnosis: Diagnosis, kind: str) -> int:
    return sum(item.kind == kind for item in diagnosis.findings)


def test_fix_moves_nothing_where_no_checkpoint_is_whole_because_the_run_would_look_empty(local: Root) -> None:
    make(local, steps=(1, 2))
    for step in (1, 2):
        flip(local, f"checkpoint-{step}/index.json", 50)
    diagnosis = doctor(local).mend()
    assert problems(diagnosis) == ["damaged", "damaged"]
    assert "no checkpoint of this run is whole" in diagnosis.findings[0].advice
    assert names(local) == ["checkpoint-1", "checkpoint-2"]


def test_fix_leaves_a_damaged_checkpoint_that_is_pinned(local: Root) -> None:
    mgr = make(local)
    reader = CheckpointManager(local.url, read_only=True)
    reader.pin(2)
    flip(local, "checkpoint-2/index.json", 50)
    assert "pinned" in finding(doctor(local).mend(), "damaged").advice
    assert names(local) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert len(mgr.checkpoints()) == 3


def test_a_disk_that_cannot_be_read_is_no_damage_and_nothing_is_moved(local: Root) -> None:
    make(local)
    opened = LocalStorage.open

    def failing(self: LocalStorage, path: str) -> Any:
        if path == "checkpoint-2/index.json":
            raise OSError(5, "Input/output error", path)
        return opened(self, path)

    with mock.patch.object(LocalStorage, "open", failing):
        assert "Input/output error" in finding(doctor(local).mend(), "unreadable").meaning
    assert names(local) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert doctor(local).examine().ok


# ---------------------------------------------------------------------------------------------------- leftovers


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_save_that_a_dead_process_left_is_found_and_removed(root: Root) -> None:
    make(root)
    storage = storage_of(root)
    if storage.can_rename:
        data = f".checkpointer/tmp/{NEW}/model.safetensors"
    else:
        data = f"checkpoint-9/{NEW}/model.safetensors"
        record = {"step": 9, "host": socket.gethostname(), "pid": dead_process()}
        storage.put(f".checkpointer/tmp/{NEW}.json", strict_json.seal(record))
    storage.write(data, [b"half"], 4)
    assert problems(doctor(root).examine()) == ["leftover"]
    diagnosis = doctor(root).mend()
    assert ([item.kind for item in diagnosis.fixed], diagnosis.ok) == (["leftover"], True)
    assert not storage.exists(data)
    assert len(Repository(storage).list_checkpoints().checkpoints) == 3


def test_a_save_of_another_host_that_may_be_alive_is_no_leftover(s3: Root) -> None:
    make(s3)
    storage = storage_of(s3)
    storage.put(f".checkpointer/tmp/{NEW}.json", strict_json.seal({"step": 9, "host": "elsewhere", "pid": 1}))
    storage.write(f"checkpoint-9/{NEW}/model.safetensors", [b"half"], 4)
    assert doctor(s3).mend().ok
    assert storage.exists(f"checkpoint-9/{NEW}/model.safetensors")


def test_a_removal_that_was_interrupted_is_found_and_finished(local: Root) -> None:
    make(local)
    repository = Repository(storage_of(local))
    trash = Path(local.url, ".checkpointer", "trash")
    trash.mkdir(exist_ok=True)
    os.rename(Path(local.url, "checkpoint-1"), trash / repository.find(1).id)
    assert problems(doctor(local).examine()) == ["half-removed"]
    assert doctor(local).mend().ok
    assert os.listdir(trash) == []


def test_notes_of_a_checkpoint_that_is_gone_are_found_and_removed(root: Root) -> None:
    make(root)
    storage = storage_of(root)
    storage.put(f".checkpointer/notes/{NEW}/00000001-{'b' * 16}.json", Note(pinned=True).to_bytes())
    assert problems(doctor(root).examine()) == ["orphaned-notes"]
    assert [item.kind for item in doctor(root).mend().fixed] == ["orphaned-notes"]
    assert not storage.exists(f".checkpointer/notes/{NEW}/00000001-{'b' * 16}.json")


def test_a_note_that_cannot_be_read_is_named_because_it_pins(root: Root) -> None:
    make(root)
    info = Repository(storage_of(root)).find(2)
    path = f".checkpointer/notes/{info.id}/00000001-{'b' * 16}.json"
    storage_of(root).put(path, b"not a note")
    assert finding(doctor(root).mend(), "damaged-note").path.endswith(path.rpartition("/")[2])
    assert storage_of(root).exists(path)


def test_an_interrupted_replacement_gets_its_plain_name_and_one_beside_a_pinned_one_is_only_mentioned(
    local: Root,
) -> None:
    make(local)
    info = Repository(storage_of(local)).find(2)
    second = Path(local.url, paths.checkpoint_name(2, info.id))
    os.rename(info.path, second)
    assert problems(doctor(local).examine()) == ["second-name"]
    assert doctor(local).mend().ok
    assert names(local) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    shutil.copytree(info.path, second)
    diagnosis = doctor(local).examine()
    assert (finding(diagnosis, "second-name").level, diagnosis.ok) == ("note", True)


def test_what_only_bears_the_name_of_a_checkpoint_is_in_the_way_and_not_touched(local: Root) -> None:
    make(local)
    Path(local.url, "checkpoint-7").mkdir()
    Path(local.url, "checkpoint-8").mkdir()
    Path(local.url, "checkpoint-8", "mine.txt").write_text("mine")
    Path(local.url, "checkpoint-9").write_text("a file")
    diagnosis = doctor(local).mend()
    assert problems(diagnosis) == ["in-the-way"] * 2
    assert [item.kind for item in diagnosis.fixed] == ["in-the-way"]  # the empty one: nothing is lost with it
    assert all("cannot be saved" in item.meaning for item in (*diagnosis.findings, *diagnosis.fixed))
    assert names(local)[-2:] == ["checkpoint-8", "checkpoint-9"]
    assert len(names(local)) == 5


def test_files_of_others_are_mentioned_and_stay(root: Root) -> None:
    make(root)
    storage = storage_of(root)
    for path in ("checkpoint-2/mine.txt", ".checkpointer/tmp/mine.txt"):
        storage.put(path, b"mine")
    diagnosis = doctor(root).mend()
    assert (finding_count(diagnosis, "foreign-file"), diagnosis.ok) == (2, True)
    assert storage.exists("checkpoint-2/mine.txt")
    assert storage.exists(".checkpointer/tmp/mine.txt")


# ------------------------------------------------------------------------------------------------- the run root

KILLED = """
import os, signal, sys, torch
from checkpointer import CheckpointManager
mgr = CheckpointManager(sys.argv[1], state=torch.ones(3))
mgr.restore_latest()
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_lock_whose_owner_was_killed_is_orphaned_and_removed(local: Root) -> None:
    make(local)
    processes.run([sys.executable, "-c", KILLED, local.url])
    found = finding(doctor(local).examine(), "orphaned-lock")
    assert "ended without closing" in found.meaning
    assert [item.kind for item in doctor(local).mend().fixed] == ["orphaned-lock"]
    assert not Path(local.url, ".checkpointer", "owner.json").exists()


def test_beside_a_living_writer_its_unfinished_save_is_no_finding_and_fix_is_refused_by_name(local: Root) -> None:
    make(local)
    with CheckpointManager(local.url, config=SYNC, state=torch.ones(3)) as mgr:
        mgr._lock()
        Path(local.url, ".checkpointer", "tmp", NEW).mkdir()
        diagnosis = doctor(local).examine()
        assert str(os.getpid()) in finding(diagnosis, "busy").meaning
        assert diagnosis.ok
        flip(local, "checkpoint-2/index.json", 50)
        with pytest.raises(RunLockedError, match=f"pid {os.getpid()}.*needs no lock"):
            doctor(local).mend()
        assert Path(local.url, ".checkpointer", "tmp", NEW).exists()
        assert names(local) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_a_checkpoint_that_was_replaced_before_the_lock_was_taken_is_not_moved(local: Root) -> None:
    mgr = make(local)
    flip(local, "checkpoint-3/index.json", 50)
    examined = doctor(local)
    acquire = examined._repository.lock.acquire

    def after_a_save(*holder: str) -> None:
        with CheckpointManager(local.url, config=SYNC, state=torch.ones(3)) as other:
            other.restore(1, strict=False, ignore_keys=["*"], components=[])
            other.save(3)
        acquire(*holder)

    with mock.patch.object(examined._repository.lock, "acquire", after_a_save):
        examined.mend()
    assert names(local) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert len(mgr.checkpoints()) == 3


def test_a_free_lock_is_asked_for_without_making_a_file(local: Root) -> None:
    os.makedirs(local.url)
    repository = Repository(storage_of(local))
    assert repository.lock.taken() is False
    assert os.listdir(local.url) == []
    repository.lock.acquire()
    assert repository.lock.taken() is True
    repository.lock.release()
    assert repository.lock.taken() is False


def test_what_does_not_protect_from_two_writers_is_mentioned(s3: Root) -> None:
    make(s3)
    with mock.patch("checkpointer.storage.remote._creates_natively", return_value=False):
        diagnosis = doctor(s3).examine()
    assert finding(diagnosis, "no-lock").level == "note"
    assert finding(diagnosis, "no-conditional-writes").level == "note"
    assert diagnosis.ok


def test_a_store_that_refuses_to_be_written_is_a_problem(s3: Root) -> None:
    make(s3)
    storage = storage_of(s3)
    with mock.patch.object(storage, "_pipe", side_effect=PermissionError("Access Denied")):
        diagnosis = Doctor(Repository(storage)).examine()
    assert "Access Denied" in finding(diagnosis, "unwritable").meaning


@pytest.mark.parametrize("free, kinds", [(1.5, []), (0.5, ["no-space"])])
def test_missing_space_is_a_problem_before_the_next_save_fails(local: Root, free: float, kinds: list[str]) -> None:
    make(local)
    size = Repository(storage_of(local)).find(3).size
    with mock.patch.object(LocalStorage, "free_bytes", return_value=int(free * size)):
        diagnosis = doctor(local).examine()
    assert problems(diagnosis) == kinds
    assert finding_count(diagnosis, kinds[0] if kinds else "little-space") == 1


def test_what_this_user_may_not_read_or_write_is_named(local: Root) -> None:
    without_privileges: list[str] = []
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may read and write everywhere, and setpriv is not there to change that")
        without_privileges = ["setpriv", "--bounding-set=-dac_override,-dac_read_search,-fowner"]
    make(local)
    unreadable, unwritable = Path(local.url, "checkpoint-1", "index.json"), Path(local.url, "checkpoint-2")
    unreadable.chmod(0)
    unwritable.chmod(0o555)
    command = [*without_privileges, sys.executable, "-m", "checkpointer", "doctor", local.url, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    unwritable.chmod(0o755)
    if "setpriv" in done.stderr:
        pytest.skip("privileges cannot be dropped here")
    found = {(item["kind"], item["path"]) for item in json.loads(done.stdout)["findings"]}
    assert {("unreadable", str(unreadable)), ("unwritable", str(unwritable))} <= found
    assert done.returncode == 1


READ_ONLY = """
import subprocess, sys
from pathlib import Path
base = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "none", base], check=True)
from tests.conftest import Root
from tests.integration.repository.test_doctor import doctor, flip, make
root, part = Root("local", str(base / "run")), Root("local", str(base / "part"))
make(root)
make(part)
flip(root, "checkpoint-2/state.safetensors", -1)
bind = [Path(part.url, "checkpoint-2")] * 2
subprocess.run(["mount", "--bind", *bind], check=True)
subprocess.run(["mount", "-o", "remount,ro,bind", bind[0]], check=True)
kinds = [(finding.kind, finding.path) for finding in doctor(part).examine().findings]
assert kinds.count(("read-only", str(bind[0]))) == 1, kinds
assert {kind for kind, _ in kinds} == {"read-only", "unremovable"}, kinds
subprocess.run(["mount", "-o", "remount,ro", base], check=True)
for call in (doctor(root).examine, doctor(root).mend):
    (finding,) = call().findings
    assert (finding.kind, finding.level, finding.path) == ("read-only", "problem", root.url), finding
    assert "the file system is mounted read-only" in finding.meaning
    assert "this user" not in f"{finding}" and "write access" not in f"{finding}", finding
from checkpointer import CheckpointManager
report = CheckpointManager(root.url, read_only=True).verify()  # what it finds cannot be remembered: that is no error
assert [item.ok for item in report.checkpoints] == [True, False, True]
print("ok")
"""


def test_on_a_read_only_mount_there_is_one_finding_that_says_so(tmp_path: Path) -> None:
    allowed = (
        "mount -t tmpfs none /mnt && mkdir /mnt/a && mount --bind /mnt/a /mnt/a && mount -o remount,ro,bind /mnt/a"
    )
    command = ["unshare", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*command, "sh", "-c", allowed], check=False).returncode:
        pytest.skip("file systems can be mounted by root alone, and not in every container")
    command += [sys.executable, "-W", "ignore", "-c", READ_ONLY, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.stdout == "ok\n", done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user: run the test as root")
def test_a_file_of_another_user_is_mentioned(local: Root) -> None:
    make(local)
    os.chown(Path(local.url, "checkpoint-1"), 12345, -1)
    diagnosis = doctor(local).examine()
    assert "owner 12345" in finding(diagnosis, "foreign-owner").meaning
    assert diagnosis.ok


# -------------------------------------------------------------------------------------------------- the command


def test_the_command_says_each_finding_in_a_line_and_exits_by_whether_there_are_problems(local: Root) -> None:
    make(local)
    result = invoke("doctor", local.url)
    unread = "(bytes not read; --deep reads them)"
    assert (result.exit_code, result.stdout) == (0, f"3 checkpoints, healthy {unread}\n")
    assert invoke("doctor", local.url, "--deep").stdout == "3 checkpoints, healthy\n"
    flip(local, "checkpoint-2/index.json", 50)
    result = invoke("doctor", local.url)
    assert result.exit_code == 1
    first, summary = result.stdout.splitlines()
    assert first.startswith(f"problem: damaged: {local.url}/checkpoint-2: ")
    assert first.endswith("restores pass over it; --fix moves it to quarantine")
    assert summary == "3 checkpoints, 1 problem"
    result = invoke("doctor", local.url, "--fix")
    assert result.exit_code == 0
    assert "\nfixed: damaged: " in result.stdout
    assert result.stdout.endswith(f"2 checkpoints, 1 fixed, healthy {unread}\n")


def test_the_command_prints_json_on_each_storage(root: Root) -> None:
    make(root)
    storage_of(root).remove("checkpoint-2/manifest.json")
    options = [f"--storage-option={key}={json.dumps(value)}" for key, value in root.options.items()]
    shown = document("doctor", root.url, "--deep", *options)
    assert (shown["ok"], shown["checkpoints"], shown["deep"]) == (False, 2, True)
    assert [item["kind"] for item in shown["findings"] if item["level"] == "problem"] == ["no-manifest"]
    assert set(shown["findings"][0]) == {"level", "kind", "path", "meaning", "advice"}


def test_the_command_on_a_run_root_that_is_not_there_says_so(tmp_path: Path) -> None:
    result = invoke("doctor", tmp_path / "nothing")
    assert result.exit_code == 3
    assert "there is no run root" in error_of(result)


def test_on_a_terminal_findings_are_a_table(local: Root) -> None:
    make(local)
    Path(local.url, ".checkpointer", "quarantine", "checkpoint-5-abcdef01").mkdir(parents=True)
    text = visible(on_terminal("doctor", local.url, width=200))
    assert "quarantine" in text
    assert "meaning" in text
    assert "3 checkpoints, healthy" in text

"""Files that checkpoints share: when, and that each checkpoint stays whole whatever happens to the others."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from checkpointer import CheckpointManager
from checkpointer.cli.gather import details
from checkpointer.errors import CheckpointerWarning, CorruptCheckpointError
from checkpointer.format.info import CheckpointInfo
from checkpointer.format.tensor_files import ComponentTensors, TensorFile, plan_files
from checkpointer.policy.retention import KeepPolicy, physical_size
from checkpointer.policy.reuse import ReuseSource, candidate
from checkpointer.repository.copies import on_disk
from checkpointer.repository.notes import Note
from checkpointer.repository.prune import prune
from checkpointer.repository.repository import Repository
from checkpointer.restore.request import restore_request
from checkpointer.restore.restorer import Restorer
from checkpointer.state import RngState, adapter_for
from checkpointer.storage import open_storage
from tests.conftest import Root
from tests.support.forge import flip
from tests.support.successor import files_in, source_of, succeed

FROZEN = "model-00002-of-00002.safetensors"
CONFIG = {"write": {"mode": "sync", "durable": False, "share": False}, "require_resume": False}


def backbone() -> nn.Module:
    """A frozen layer and one that is trained."""
    torch.manual_seed(0)
    layers = [nn.Linear(30, 20), nn.Linear(20, 2), nn.Linear(2, 2)]
    return nn.Sequential(*(layer.requires_grad_(layer is layers[2]) for layer in layers))


@pytest.fixture(autouse=True)
def no_lock_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "s3://.*no lock that a dead owner frees")
        yield


@pytest.fixture
def repository(root: Root) -> Iterator[Repository]:
    """A run with one checkpoint, of step 1, in the hands of a writer."""
    with CheckpointManager(root.url, storage_options=root.options, config=CONFIG, model=backbone()) as manager:
        manager.save(1)
    yield from writer(root)


@pytest.fixture
def local_repository(local: Root) -> Iterator[Repository]:
    with CheckpointManager(local.url, config=CONFIG, model=backbone()) as manager:
        manager.save(1)
    yield from writer(local)


def writer(root: Root) -> Iterator[Repository]:
    repository = Repository(open_storage(root.url, root.options, durable=False))
    repository.lock.acquire()
    yield repository
    repository.lock.release()


def newest(repository: Repository) -> CheckpointInfo:
    return repository.list_checkpoints().checkpoints[-1]


def chain(repository: Repository, steps=(2, 3, 4), share=(FROZEN,)) -> list[CheckpointInfo]:
    for step in steps:
        succeed(repository, newest(repository), step, share)
    return list(repository.list_checkpoints().checkpoints)


def planned(repository: Repository, info: CheckpointInfo) -> list[TensorFile]:
    """The files that a new checkpoint of the same model has."""
    with repository.open(info) as reader:
        components = reader.index.components
    frozen = frozenset(key for key in components["model"].tensors if not key.startswith("2."))
    tensors = {
        name: ComponentTensors(part.kind, part.tensors, frozen if name == "model" else frozenset())
        for name, part in components.items()
    }
    return plan_files(tensors)


# --------------------------------------------------------------------------------------------- on every storage


def test_the_frozen_file_of_a_real_checkpoint_is_the_only_candidate(repository):
    info = newest(repository)
    files = planned(repository, info)
    found = {file.path: candidate(file, source_of(repository, info), 8).record for file in files}
    assert [path for path, record in found.items() if record is not None] == [FROZEN]


@pytest.mark.thorough(lambda root, gone: root == "s3" and gone != 2)
@pytest.mark.parametrize("gone", [1, 2, 3, 4])
def test_deleting_one_of_several_that_share_a_file_leaves_the_others_whole(repository, gone):
    infos = chain(repository)
    assert repository.remove(next(info for info in infos if info.step == gone))
    assert repository.verify_all().ok
    assert [info.step for info in repository.list_checkpoints().checkpoints] == [s for s in (1, 2, 3, 4) if s != gone]


def test_deleting_all_but_the_last_leaves_it_whole(repository):
    for info in chain(repository)[:-1]:
        repository.remove(info)
    assert repository.verify_all().ok
    assert newest(repository).step == 4


def test_every_file_may_be_shared(repository):
    infos = chain(repository, share="all")
    assert repository.verify_all().ok
    repository.remove(infos[0])
    assert repository.verify_all().ok


def test_what_was_shared_restores(repository, root):
    chain(repository, (2,))
    repository.remove(repository.find(1))
    live = backbone()
    with torch.no_grad():
        for parameter in live.parameters():
            parameter.zero_()
    with CheckpointManager(root.url, storage_options=root.options, read_only=True, model=live) as reader:
        assert reader.restore_latest().step == 2
    assert all(torch.equal(a, b) for a, b in zip(live[0].parameters(), backbone()[0].parameters(), strict=True))


def test_the_manifest_counts_the_turns_from_the_checkpoint_that_wrote_the_bytes(repository):
    infos = chain(repository)
    records = [files_in(repository, info)[FROZEN] for info in infos]
    assert [record.turn for record in records] == [1, 2, 3, 4]
    assert [record.origin for record in records] == [None, *[infos[0].id] * 3]
    assert len({record.xxh3 for record in records}) == 1


def test_a_replaced_checkpoint_whose_file_its_successor_shares_goes_in_peace(repository):
    info = newest(repository)
    again = succeed(repository, info, 1, [FROZEN])
    assert repository.verify_all().ok
    assert [found.id for found in repository.list_checkpoints().checkpoints] == [again.id]


def test_a_file_that_is_gone_or_has_another_size_is_not_shared(repository):
    info = newest(repository)
    attempt = repository.begin(2, 0)
    record = files_in(repository, info)[FROZEN]
    earlier = source_of(repository, info)
    assert not repository.reuse(attempt, "missing.safetensors", earlier, record)
    assert not repository.reuse(attempt, FROZEN, earlier, replace(record, size=record.size + 1))
    assert not attempt.files
    attempt.write(FROZEN, [b"x"], 1)  # nothing is in the way
    repository.abandon(attempt)


def test_an_attempt_that_is_given_up_takes_nothing_from_the_checkpoint_that_it_shared_with(repository):
    info = newest(repository)
    attempt = repository.begin(2, 0)
    record = files_in(repository, info)[FROZEN]
    assert repository.reuse(attempt, FROZEN, source_of(repository, info), replace(record, origin=info.id, turn=2))
    assert attempt.bytes_shared == record.size
    repository.abandon(attempt)
    assert repository.verify_all().ok


def test_a_checkpoint_that_is_gone_or_was_replaced_is_no_source(repository):
    info = newest(repository)
    earlier = source_of(repository, info)
    assert repository.current_source(earlier) == earlier
    succeed(repository, info, 1, [FROZEN])
    assert repository.current_source(earlier) is None


def test_damage_that_another_process_found_is_seen_before_sharing(repository):
    info = newest(repository)
    earlier = source_of(repository, info)
    repository.note(info, Note(damaged="a hash differs"))
    now = repository.current_source(earlier)
    (file,) = (file for file in planned(repository, info) if file.path == FROZEN)
    assert candidate(file, now, 8).reason == "checkpoint-1 (sequence 1) is damaged: a hash differs"


def test_only_files_that_were_verified_are_shared(repository):
    info = newest(repository)
    with repository.open(info) as reader:
        chunks = reader.chunks_by_tensor
        part = ReuseSource.of(info, reader.manifest.data, reader.files, chunks, verified=["index.json"])
    (file,) = (file for file in planned(repository, info) if file.path == FROZEN)
    assert candidate(file, part, 8).record is None


@pytest.mark.parametrize(
    "options, shared",
    [
        ({}, True),
        ({"verify": "before"}, True),
        ({"verify": "off"}, False),
        ({"components": ["model"]}, True),
        ({"components": ["rng"]}, False),
        ({"ignore_keys": ["0.bias"], "strict": False}, False),
        ({"ignore_keys": ["2.bias"], "strict": False}, True),
    ],
)
def test_a_restore_makes_a_source_of_what_it_has_verified_as_a_whole(local, options, shared):
    with CheckpointManager(local.url, config=CONFIG, model=backbone()) as manager:
        info = manager.save(1).result()
    repository = Repository(open_storage(local.url))
    restorer = Restorer(repository, {"model": adapter_for("model", backbone(), {}), "rng": RngState()})
    assert restorer.source is None
    restorer.one(info, restore_request(**options, configured="stream", read_only=True))
    (file,) = (file for file in planned(repository, info) if file.path == FROZEN)
    assert (candidate(file, restorer.source, 8).record is not None) is shared


def test_a_restore_that_finds_damage_makes_no_source(local):
    with CheckpointManager(local.url, config=CONFIG, model=backbone()) as manager:
        good, bad = manager.save(1).result(), manager.save(2).result()
    restorer = Restorer(
        Repository(open_storage(local.url)), {"model": adapter_for("model", backbone(), {}), "rng": RngState()}
    )
    restorer.one(good, restore_request(configured="stream", read_only=True))
    flip(Path(bad.path, FROZEN), in_place=True)
    with pytest.raises(CorruptCheckpointError):
        restorer.one(bad, restore_request(configured="stream", read_only=True))
    assert restorer.source is None


# ---------------------------------------------------------------------------------------------- hard links


def files(repository: Repository, path: str = FROZEN) -> list[Path]:
    return [Path(info.path, path) for info in repository.list_checkpoints().checkpoints]


def test_shared_files_are_one_file_on_disk_and_read_only(local_repository):
    chain(local_repository)
    status = [file.stat() for file in files(local_repository)]
    assert {found.st_ino for found in status} == {status[0].st_ino}
    assert status[0].st_nlink == 4
    assert not stat.S_IMODE(status[0].st_mode) & 0o222
    assert len({file.stat().st_ino for file in files(local_repository, "index.json")}) == 4


def test_the_physical_size_is_what_the_disk_says(local_repository):
    infos = chain(local_repository)
    found = {}
    for info in infos:
        for file in Path(info.path).rglob("*"):
            if file.is_file() and file.name != "manifest.json":
                found[file.stat().st_ino] = file.stat().st_size
    assert physical_size(infos) == sum(found.values()) < sum(info.size for info in infos)


def test_a_budget_on_disk_space_counts_shared_files_once(local_repository):
    infos = chain(local_repository)
    enough = physical_size(infos)
    assert not prune(local_repository, KeepPolicy(max_size=enough)).remove
    assert len(prune(local_repository, KeepPolicy(max_size=enough - 1)).remove) == 1
    assert local_repository.verify_all().ok


@pytest.mark.skipif(sys.platform != "linux", reason="only the cp of GNU keeps hard links")
@pytest.mark.parametrize("command, linked", [(["cp", "-a"], True), (["cp", "-r"], False)])
def test_a_budget_on_disk_space_counts_what_a_copied_run_takes_on_its_disk(
    local_repository, tmp_path, command, *, linked
):
    enough = physical_size(chain(local_repository))
    subprocess.run([*command, local_repository.url, tmp_path / "copy"], check=True)
    copy = Repository(open_storage(tmp_path / "copy", durable=False))
    names = {path: names for path, names in details(copy, 4).shared.items() if path == FROZEN}
    assert names == ({FROZEN: ("checkpoint-1", "checkpoint-2", "checkpoint-3")} if linked else {})
    before = on_its_disk(copy)
    dry = prune(copy, KeepPolicy(max_size=enough), dry_run=True)
    done = prune(copy, KeepPolicy(max_size=enough))
    removed = [info.step for info, _ in done.remove]
    assert removed == [info.step for info, _ in dry.remove] == ([] if linked else [1])
    assert dry.freed == before - on_its_disk(copy)
    assert on_its_disk(copy) <= enough
    assert not prune(copy, KeepPolicy(max_size=enough)).remove
    assert copy.verify_all().ok


def test_of_a_run_of_which_only_some_links_are_broken_each_physical_copy_counts(local_repository):
    chain(local_repository)
    for file in files(local_repository)[2:]:
        data = file.read_bytes()
        file.unlink()
        file.write_bytes(data)
    first, second, third, fourth = files(local_repository)
    fourth.unlink()
    os.link(third, fourth)  # two that share one copy, and two that share another
    assert first.stat().st_ino == second.stat().st_ino != third.stat().st_ino
    listed = local_repository.list_checkpoints().checkpoints
    corrected = on_disk(local_repository.storage, listed, local_repository.shared_files)
    assert physical_size(corrected) == on_its_disk(local_repository)
    assert physical_size(listed) < on_its_disk(local_repository)


def on_its_disk(repository: Repository) -> int:
    """Bytes of all files but the manifests."""
    found = [
        file.stat()
        for info in repository.list_checkpoints().checkpoints
        for file in Path(info.path).rglob("*")
        if file.is_file() and file.name != "manifest.json"
    ]
    return sum({status.st_ino: status.st_size for status in found}.values())


def test_a_copy_of_one_directory_is_a_full_backup(local_repository, tmp_path):
    info = chain(local_repository)[-1]
    shutil.copytree(info.path, tmp_path / "backup" / "checkpoint-4")
    shutil.rmtree(local_repository.url)
    assert Repository(open_storage(tmp_path / "backup")).verify_all().ok


def test_a_damaged_block_is_found_in_every_checkpoint_that_lies_on_it(local_repository):
    chain(local_repository)
    flip(files(local_repository)[0], in_place=True)
    damaged = [report.step for report in local_repository.verify_all().checkpoints if not report.ok]
    assert damaged == [1, 2, 3, 4]


def test_a_link_in_the_place_of_the_file_is_not_shared(local_repository, tmp_path):
    info = newest(local_repository)
    earlier, record = source_of(local_repository, info), files_in(local_repository, info)[FROZEN]
    (file,) = files(local_repository)
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    attempt = local_repository.begin(2, 0)
    assert not local_repository.reuse(attempt, FROZEN, earlier, record)
    local_repository.abandon(attempt)
    assert (tmp_path / "elsewhere").stat().st_mode & 0o200


def test_a_foreign_file_beside_shared_ones_survives_the_removal(local_repository):
    infos = chain(local_repository)
    Path(infos[0].path, "mine.txt").write_text("precious")
    with pytest.warns(CheckpointerWarning, match="quarantine"):
        local_repository.remove(infos[0])
    assert local_repository.verify_all().ok
    (kept,) = Path(local_repository.url, ".checkpointer", "quarantine").iterdir()
    assert [path.name for path in kept.iterdir()] == ["mine.txt"]

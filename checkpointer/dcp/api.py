"""DCP's functions with ordinary errors."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from checkpointer.dcp.reader import SafetensorsReader
from checkpointer.dcp.writer import SafetensorsWriter
from checkpointer.errors import CheckpointerError, SaveError

PathLike = str | os.PathLike[str]


def save(state_dict: dict[str, Any], where: PathLike | SafetensorsWriter, **options: Any) -> None:
    """``dcp.save`` to ``<run root>/checkpoint-<step>``: on every rank, or in one process without a process group.

    Args:
        state_dict: as for ``dcp.save``.
        where: the checkpoint's directory, or a writer for it.
        **options: handed to ``dcp.save``: ``process_group``, ``planner``, …

    Raises:
        SaveError: (or a more precise CheckpointerError) a rank failed: it is named, with its cause, on all ranks.
            Nothing was committed.
    """
    writer = where if isinstance(where, SafetensorsWriter) else SafetensorsWriter(where)
    with _ordinary_errors(SaveError, f"the save to {writer.checkpoint_id}"), writer.given_up_on_error():
        dcp_save(state_dict, storage_writer=writer, **options)


def load(state_dict: dict[str, Any], where: PathLike | SafetensorsReader, **options: Any) -> None:
    """``dcp.load`` from ``<run root>/checkpoint-<step>``, at any layout, in place.

    Raises:
        CheckpointerError: what kept a rank from it, which is named: CorruptCheckpointError for damage.
    """
    reader = where if isinstance(where, SafetensorsReader) else SafetensorsReader(where)
    with _ordinary_errors(CheckpointerError, f"the load from {reader.checkpoint_id}"), reader:
        dcp_load(state_dict, storage_reader=reader, **options)


def async_save(state_dict: dict[str, Any], where: PathLike | SafetensorsWriter, **options: Any) -> Future[None]:
    """``dcp.async_save``: the state is copied when this returns, and committed when the future is done.

    DCP needs a process group with a CPU backend of its own for it (``cpu:gloo,cuda:nccl``), or none at all.

    Raises:
        SaveError: from the future's ``result()``, as :func:`save` does.
    """
    writer = where if isinstance(where, SafetensorsWriter) else SafetensorsWriter(where)
    begun: Any = dcp_async_save(state_dict, storage_writer=writer, **options)
    pending = getattr(begun, "upload_completion", begun)
    outcome: Future[None] = Future()

    def finish(_: object) -> None:
        try:
            with _ordinary_errors(SaveError, f"the save to {writer.checkpoint_id}"), writer.given_up_on_error():
                pending.result()
        except BaseException as error:  # noqa: BLE001  handed to whoever asks
            outcome.set_exception(error)
        else:
            outcome.set_result(None)

    pending.add_done_callback(finish)
    return outcome


@contextmanager
def _ordinary_errors(kind: type[CheckpointerError], what: str) -> Iterator[None]:
    with _without_a_warning_of_one_process():
        try:
            yield
        except CheckpointException as failure:
            raise _translated(kind, what, failure) from failure


def _translated(kind: type[CheckpointerError], what: str, failure: CheckpointException) -> CheckpointerError:
    """One error that names the ranks that failed, and is of their own kind where that is one of ours."""
    causes = {rank: wrapped[0] for rank, wrapped in sorted(failure.failures.items())}
    first = next(iter(causes.values()), None)
    told = "; ".join(f"rank {rank}: {type(cause).__name__}: {cause}" for rank, cause in list(causes.items())[:8])
    if isinstance(first, CheckpointerError) and all(type(cause) is type(first) for cause in causes.values()):
        kind = type(first)
    return kind(f"{what} failed on {len(causes)} ranks: {told}")


@contextmanager
def _without_a_warning_of_one_process() -> Iterator[None]:
    """DCP warns at each call that there is no process group; here that is a case like any other."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield

"""Modes of torch around a call: the one that a save or a restore leaves, and those in which neither can work.

``no_grad``, ``autocast``, a default device or dtype and a mode of the user's own stay as they are: code of this package
names the device and the dtype of all that it makes, and code of the user's (``load_state_dict``, ``adapt``) finds the
modes that it was called in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.utils import _python_dispatch

from checkpointer.errors import IncompatibleStateError, UnsupportedStateError


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leave ``torch.inference_mode`` for a while; whether gradients are recorded stays as it is.

    A tensor that is made in it is an inference tensor for ever: no optimizer can step over it.
    """
    if not torch.is_inference_mode_enabled():
        yield
        return
    recorded = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(recorded):
        yield


def writing_to(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Where ``tensor`` may be changed in place and nothing is recorded: an inference tensor in inference mode alone."""
    return torch.inference_mode() if tensor.is_inference() else torch.no_grad()


def unreal_mode() -> str | None:
    """The mode around this call in which tensors have no memory, or are others than they seem; ``None``: there is none.

    FakeTensorMode, tracing (``make_fx``, ``torch.export``), and the transforms of ``torch.func`` (``vmap``, ``grad``).
    """
    for mode in _python_dispatch._get_current_dispatch_mode_stack():  # noqa: SLF001  there is no public way to ask
        if getattr(mode, "_mode_key", None) is not None:  # torch's own infrastructure; modes of users have none
            return type(mode).__name__
    if torch._C._functorch.peek_interpreter_stack() is not None:  # noqa: SLF001  as above
        return "a transform of torch.func"
    return None


def refuse_to_save() -> None:
    """Raise :class:`UnsupportedStateError` where what would be saved has no memory."""
    mode = unreal_mode()
    if mode is not None:
        raise UnsupportedStateError(
            f"nothing can be saved inside {mode}: tensors have no memory of their own there. Save before it begins, or "
            "after it has ended. Nothing was written"
        )


def refuse_to_restore(path: str) -> None:
    """Raise :class:`IncompatibleStateError` where what the checkpoint ``path`` is restored to has no memory."""
    mode = unreal_mode()
    if mode is not None:
        raise IncompatibleStateError(
            f"{path} cannot be restored inside {mode}: tensors have no memory of their own there. Restore before it "
            "begins, or after it has ended. Nothing was changed"
        )


def wait_for_streams(tensors: Iterable[torch.Tensor]) -> None:
    """Wait until what the current streams were given before is done, where ``tensors`` are on CUDA devices.

    For threads that read them next: each has a current stream of its own, the default one, which waits for no other.
    """
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


def wait_for_devices(tensors: Iterable[torch.Tensor]) -> None:
    """Wait until the CUDA devices of ``tensors`` have nothing left to do, on any stream."""
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.synchronize(device)

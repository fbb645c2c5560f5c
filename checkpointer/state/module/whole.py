"""A module together with its architecture: the weights as ever, and beside them a program that makes the module.

The program is a ``torch.export`` archive, or a pickle. Loading either can run code of whoever wrote it, so an ordinary
restore never looks at it, and :func:`checkpointer.load_whole_model` does so only when it is told to trust it.
"""

from __future__ import annotations

import io
import pickle
import types
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from checkpointer.errors import ConfigError, CorruptCheckpointError, IncompatibleStateError, UnsupportedStateError
from checkpointer.format.index import Json
from checkpointer.state.destinations import Destinations, check_kind
from checkpointer.state.module.adapter import ModuleAdapter, ModuleComponent, check_meta
from checkpointer.state.module.names import loads_plainly, registered_tensors, unwrap
from checkpointer.state.module.restore import ModuleRestore
from checkpointer.state.protocol import Captured, ComponentReport, RestoreOptions, RestorePlan, SavedState
from checkpointer.state.tensors import as_bytes, is_plain
from checkpointer.system import messages

PROGRAM = "checkpointer.program"
"""Key of the program: a uint8 tensor."""

PICKLE, EXPORT = "torch.save", "torch.export"


class WholeModel(ModuleComponent):
    """A module whose architecture is saved too, so that it can be loaded where its code is not at hand.

    The weights are saved and restored as those of a module. With ``example_inputs`` the architecture is a
    ``torch.export`` program, which needs no code of yours to be loaded; without, or where the module does not export,
    it is a pickle, which imports the module's classes. Either can run code when it is loaded, so it is loaded by
    :func:`checkpointer.load_whole_model` alone, and only with ``trust_pickle=True``.
    """

    __module__ = "checkpointer"

    def __init__(
        self,
        module: nn.Module,
        example_inputs: tuple[Any, ...] | None = None,
        *,
        include_non_persistent: bool = False,
        silence: Iterable[str] = (),
    ) -> None:
        """Choose how the architecture is saved.

        Args:
            module: the module.
            example_inputs: positional arguments of ``forward``. The first save exports the module with them, once, in
                the mode it is in (``model.eval()`` or ``model.train()``); that takes seconds.
            include_non_persistent: as for :class:`ModuleComponent`.
            silence: as for :class:`ModuleComponent`.

        Raises:
            ConfigError: an argument makes no sense.
        """
        super().__init__(module, include_non_persistent=include_non_persistent, silence=silence)
        if example_inputs is not None and not isinstance(example_inputs, tuple):
            raise ConfigError(f"example_inputs is a tuple of arguments, got {type(example_inputs).__name__}")
        self.example_inputs = example_inputs


class WholeModelAdapter(ModuleAdapter):
    """A module's adapter that also stores the program. Restores weights alone."""

    def __init__(self, name: str, component: WholeModel) -> None:
        super().__init__(name, component)
        self._example_inputs = component.example_inputs
        self._exported: bytes | None = None

    def capture(self) -> Captured:
        """The module, and the program: meta ``program`` has its ``format`` and the key of its ``tensor``.

        Raises :class:`UnsupportedStateError` where the module can be neither exported nor pickled.
        """
        captured = super().capture()
        form, program = self._program(unwrap(self.live))
        key = PROGRAM
        while key in captured.tensors:
            key += "#"
        captured.tensors[key] = torch.frombuffer(bytearray(program), dtype=torch.uint8)
        inner = captured.meta["inner"]
        assert isinstance(inner, list)
        captured.meta["inner"] = [*inner, key]
        captured.meta["program"] = {"format": form, "tensor": key}
        return captured

    def _program(self, root: nn.Module) -> tuple[str, bytes]:
        if self._example_inputs is not None and self._exported is None:
            try:
                self._exported = _export(root, self._example_inputs)
            except Exception as error:  # noqa: BLE001  torch.export fails in as many ways as there are models
                self._example_inputs = None
                reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
                messages.warn(
                    f"component {self.name!r} does not export, so its architecture is saved as a pickle: {reason}",
                )
        if self._exported is not None:
            return EXPORT, self._exported
        try:
            return PICKLE, _pickle(root)
        except Exception as error:
            raise UnsupportedStateError(
                f"component {self.name!r}: the architecture can be saved neither as an exported program nor as a "
                f"pickle: {error!r}. Give example_inputs that it exports with, or register the module itself"
            ) from error


class WholeModelLoader:
    """Reads one component back into a new module. It has nothing to capture.

    Its plan's ``apply`` runs whatever code the program holds: never make one without the user's explicit trust.
    """

    kind = "module"

    def __init__(self, name: str) -> None:
        self.name = name
        self.model: nn.Module | None = None

    def capture(self) -> Captured:
        """There is no state to save."""
        raise UnsupportedStateError(f"component {self.name!r} is only loaded")

    def prepare(self, saved: SavedState, options: RestoreOptions) -> RestorePlan:
        """Read everything; ``apply`` makes the module and fills it.

        Raises :class:`IncompatibleStateError` where the component was saved without its architecture.
        """
        check_kind(saved, self.kind, self)
        check_meta(saved)
        form, key = _saved_program(saved)
        places = Destinations(self.name, saved.component.tensors, options.map_location)
        places.allocate(key, "cpu")
        places.allocate_all(saved.component.tensors)
        report = ComponentReport(self.name)

        def apply() -> None:
            data = as_bytes(places.reads[key]).numpy().tobytes()
            self.model = _load(self.name, form, data, options)
            report.restored += _fill(self.name, self.model, saved, places.reads, options, exported=form == EXPORT)

        return RestorePlan(places.reads, apply, report)


def _export(root: nn.Module, example_inputs: tuple[Any, ...]) -> bytes:
    """A ``torch.export`` archive without the weights, which are stored as those of any module."""
    program = torch.export.export(root, example_inputs)
    for name, tensor in program.state_dict.items():
        program.state_dict[name] = _without_data(tensor)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _pickle(root: nn.Module) -> bytes:
    """What ``torch.save`` makes of the module. Entries of its ``state_dict`` are on the meta device, without data.

    A module that takes part in its own loading (hooks, overrides) keeps its tensors in the pickle as well.
    """
    stored: set[int] = set()
    if loads_plainly(root):
        state = {id(value) for value in root.state_dict(keep_vars=True).values() if _is_strippable(value)}
        stored = state & registered_tensors(root)

    class Pickler(pickle.Pickler):
        def reducer_override(self, value: Any) -> Any:
            return _without_data(value).__reduce_ex__(2) if id(value) in stored else NotImplemented

    buffer = io.BytesIO()
    torch.save(root, buffer, pickle_module=types.SimpleNamespace(__name__="pickle", Pickler=Pickler))
    return buffer.getvalue()


def _is_strippable(value: object) -> bool:
    return isinstance(value, torch.Tensor) and is_plain(value)


def _without_data(tensor: torch.Tensor) -> torch.Tensor:
    """The same kind of tensor on the meta device, with the attributes that were set on it."""
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    if isinstance(tensor, nn.Parameter):
        made = nn.Parameter(made, requires_grad=tensor.requires_grad)
    vars(made).update(vars(tensor))
    return made


def _saved_program(saved: SavedState) -> tuple[str, str]:
    """Format and key of the program. Checks the index only."""
    program: Any = saved.component.meta.get("program")
    if program is None:
        raise IncompatibleStateError(
            f"component {saved.name!r} was saved without its architecture: build the model and restore into it, or "
            "save it as checkpointer.WholeModel(model)"
        )
    form, key = (program.get("format"), program.get("tensor")) if type(program) is dict else (None, None)
    spec = saved.component.tensors.get(key) if type(key) is str else None
    if form not in (PICKLE, EXPORT) or spec is None or spec.dtype != "uint8" or len(spec.shape) != 1:
        raise CorruptCheckpointError(f"{saved.name}: the index entry of the program is not well formed")
    return str(form), str(key)


def _load(name: str, form: str, data: bytes, options: RestoreOptions) -> nn.Module:
    """Make the module. Runs code from the checkpoint."""
    buffer = io.BytesIO(data)
    try:
        if form == EXPORT:
            made: object = torch.export.load(buffer).module()
        else:
            made = torch.load(buffer, map_location=options.map_location or "cpu", weights_only=False)
    except Exception as error:
        raise IncompatibleStateError(
            f"component {name!r}: its {form} program cannot be loaded here: {error!r}. The weights alone can be "
            "restored into a module that you build yourself"
        ) from error
    if not isinstance(made, nn.Module):
        raise IncompatibleStateError(f"component {name!r}: the program made a {type(made).__name__}, not a module")
    return made


def _fill(
    name: str,
    model: nn.Module,
    saved: SavedState,
    reads: dict[str, torch.Tensor],
    options: RestoreOptions,
    *,
    exported: bool,
) -> list[str]:
    """Put the saved weights into the new module; returns their keys.

    An exported program lacks entries that it does not compute with, and has no submodules: only tensors are compared.
    """
    if exported:
        saved, options = _only(saved, set(model.state_dict())), replace(options, partial=True)
    include = "non_persistent" in saved.component.meta and not exported
    plan = ModuleRestore(name, model, saved, options, include_non_persistent=include).plan()
    with torch.no_grad():
        for key, target in plan.reads.items():
            target.copy_(reads[key])
    plan.apply()
    return plan.report.restored


def _only(saved: SavedState, keys: set[str]) -> SavedState:
    """Without the entries that are not among ``keys``."""
    component = saved.component
    tree, inner = component.tree, component.meta.get("inner", [])
    assert isinstance(tree, dict)
    assert isinstance(inner, list)
    hidden = [*inner, *(key for key in component.tensors if key not in keys and key not in inner)]
    kept: dict[str, Json] = {key: node for key, node in tree.items() if key in keys}
    return SavedState(saved.name, replace(component, tree=kept, meta={**component.meta, "inner": hidden}))

"""One restore of one module: destinations for what was matched, and putting it in place."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from checkpointer.errors import CheckpointerError, IncompatibleStateError
from checkpointer.state.destinations import Destinations
from checkpointer.state.dtensor import PLAIN_TYPES, is_sharded, local_part
from checkpointer.state.modes import writing_to
from checkpointer.state.module.match import match
from checkpointer.state.module.names import Names, assign, loads_plainly, module_versions, wrapped_attribute
from checkpointer.state.protocol import ComponentReport, RestoreOptions, RestorePlan, SavedState
from checkpointer.state.tensors import is_ordinary, memory_key
from checkpointer.state.tree.decode import Decoder, skeleton


class ModuleRestore:
    """Restores a saved module into ``root``, a live module that is no wrapper."""

    def __init__(
        self,
        name: str,
        root: nn.Module,
        saved: SavedState,
        options: RestoreOptions,
        *,
        include_non_persistent: bool = False,
    ) -> None:
        self.name = name
        self.root = root
        self.component = saved.component
        self.options = options
        self.names = Names(root)
        self.report = ComponentReport(name)
        self.match = match(
            name, root, saved.component, options, self.report, include_non_persistent=include_non_persistent
        )
        self.places = Destinations(name, saved.component.tensors, options.map_location)
        versions = saved.component.meta.get("versions", {})
        self.direct = loads_plainly(root) and module_versions(self.names) == versions
        self.in_place: set[str] = set()
        """Live keys whose memory is read into, or is the memory of one that is."""

    def plan(self) -> RestorePlan:
        """Choose destinations and foresee the changes; nothing live is changed."""
        self._check_nodes()
        for key, entry in self.match.pairs.items():
            if entry.stored is not None:
                self._place(key, entry.stored)
        if self.options.restores_flags:
            self._flags(apply=False)
        else:
            self._report_flags()
        self._report_unfilled()
        self.places.announce()
        return RestorePlan(self.places.reads, self._apply, self.report)

    def _check_nodes(self) -> None:
        """Check the trees of entries that are not plain tensors, and allocate what they refer to."""
        for key, entry in self.match.pairs.items():
            if entry.stored is None:
                place = f"{self.name}[{key!r}]"
                _, used = skeleton(entry.node, self.component.tensors, self.match.live[key], place=place)
                self.places.allocate_all(used)

    def _place(self, key: str, stored: str) -> None:
        live = self.match.live[key]
        plain = self.direct or key in self.match.beside
        readable = plain and key not in self.match.extra and key not in self.match.adapt
        if readable and self.places.offer(stored, live):
            self.in_place.add(key)
            return
        if stored in self.places.reads:
            self._place_alias(key, stored, live)
            return
        if isinstance(live, torch.Tensor) and is_sharded(live):
            self.places.allocate_like(stored, live)
        else:
            self.places.allocate(stored, self._device(live))

    def _place_alias(self, key: str, stored: str, live: Any) -> None:
        """The second live entry for one stored tensor."""
        if not isinstance(live, torch.Tensor) or not is_ordinary(live) or not self.direct:
            return
        if memory_key(live.detach()) == memory_key(self.places.reads[stored]):
            self.in_place.add(key)
        elif key not in self.match.adapt:
            self.report.changed.append(f"{key!r} was one tensor with {stored!r} when saved and is not here: copied")

    def _device(self, live: Any) -> torch.device | None:
        """Where a new tensor goes: next to the live one, unless the caller said where or the live one has no memory."""
        if self.options.map_location is not None or not isinstance(live, torch.Tensor):
            return None
        return None if is_lazy(live) or live.device.type == "meta" else live.device

    # Applying

    def _apply(self) -> None:
        with torch.no_grad():
            values = {key: self._value(key) for key in self.match.pairs if key not in self.in_place}
            for key in [key for key in values if self.direct or key in self.match.beside]:
                self._put(key, values.pop(key))
            if not self.direct:
                self._load(values)
        if self.options.restores_flags:
            self._flags(apply=True)

    def _value(self, key: str) -> Any:
        """What was read for a live key: a tensor, decoded state, or what ``adapt`` made of it."""
        entry = self.match.pairs[key]
        if entry.stored is None:
            place = f"{self.name}[{key!r}]"
            reads, specs = self.places.reads, self.component.tensors
            return Decoder({name: specs[name] for name in reads}, reads, place=place).run(
                entry.node, self.match.live[key]
            )
        value = self.places.reads[entry.stored]
        return self._adapted(key, value) if key in self.match.adapt else value

    def _adapted(self, key: str, value: torch.Tensor) -> torch.Tensor:
        assert self.options.adapt is not None
        live: torch.Tensor = self.match.live[key]
        made = self.options.adapt(key, value, live.detach())
        if not isinstance(made, torch.Tensor) or made.shape != live.shape:
            found = list(made.shape) if isinstance(made, torch.Tensor) else type(made).__name__
            raise IncompatibleStateError(f"{self.name}: adapt gave {found} for {key!r}, needed is {list(live.shape)}")
        return made.detach()

    def _put(self, key: str, value: Any) -> None:
        live = self.match.live[key]
        if key in self.match.extra:
            path = self.match.raw[key].removesuffix("_extra_state").removesuffix(".")
            self.root.get_submodule(path).set_extra_state(value)
        elif live.device.type == "meta" or not _copy_inside(live, value.detach()):
            assign(self.root, live, value.detach())

    def _load(self, values: dict[str, Any]) -> None:
        """Through ``load_state_dict``, with hooks and overrides. Entries that are not restored load themselves."""
        raw = self.match.raw
        state: OrderedDict[str, Any] = OrderedDict()
        for key, live in self.match.live.items():
            if key not in self.match.beside and (key in values or self.options.strict):
                state[raw[key]] = values.get(key, live)
        state._metadata = self._metadata()  # type: ignore[attr-defined]  # noqa: SLF001
        meta = any(isinstance(live, torch.Tensor) and live.device.type == "meta" for live in self.match.live.values())
        arguments: dict[str, Any] = {} if self.options.strict else {"strict": False}
        if meta:
            arguments["assign"] = True
        try:
            self.root.load_state_dict(state, **arguments)
        except CheckpointerError:
            raise
        except Exception as error:
            kind = type(self.root).__qualname__
            raise IncompatibleStateError(f"{self.name}: {kind}.load_state_dict refused the state: {error}") from error

    def _metadata(self) -> dict[str, dict[str, Any]]:
        """``_metadata`` as it was when saved: versions other than 1 are stored."""
        versions: Any = self.component.meta.get("versions", {})
        raw = (path for path, _ in self.root.named_modules(remove_duplicate=False))
        pairs = zip(raw, self.names.modules, strict=True)
        return {path: {"version": versions.get(clean, 1)} for path, (clean, _) in pairs}

    # Flags

    def _flags(self, *, apply: bool) -> None:
        """Restore ``requires_grad`` and training flags, or (``apply`` False) report what will change."""
        for name, parameter, saved in self._grad_differences():
            if apply:
                with writing_to(parameter):
                    parameter.requires_grad_(saved)
            else:
                self.report.changed.append(f"requires_grad of {name!r}: {not saved} -> {saved}")
        for path, module, saved in self._mode_differences():
            if apply:
                module.training = saved
            elif wrapped_attribute(module) is None:
                self.report.changed.append(f"training flag of {path or 'the module'!r}: {not saved} -> {saved}")

    def _report_flags(self) -> None:
        for name, _, saved in self._grad_differences():
            self.report.changed.append(f"requires_grad of {name!r} is {not saved} and was {saved}: left as it is")
        for path, _, saved in self._mode_differences():
            where = repr(path) if path else "the module"
            self.report.changed.append(f"training flag of {where} is {not saved} and was {saved}: left as it is")

    def _grad_differences(self) -> list[tuple[str, nn.Parameter, bool]]:
        frozen: Any = self.component.meta.get("frozen")
        if frozen is None:  # an imported checkpoint: no state_dict knows the flags
            return []
        known = set(frozen)
        found: dict[int, tuple[str, nn.Parameter, bool]] = {}
        for name, parameter in self.names.parameters():
            entry = self.match.pairs.get(name)
            trainable = parameter.is_floating_point() or parameter.is_complex()
            if entry is not None and trainable and parameter.requires_grad != (entry.key not in known):
                found.setdefault(id(parameter), (name, parameter, entry.key not in known))
        return list(found.values())

    def _mode_differences(self) -> list[tuple[str, nn.Module, bool]]:
        saved: Any = self.component.meta.get("eval")
        if saved is None:
            return []
        known = set(saved)
        found: dict[int, tuple[str, nn.Module, bool]] = {}
        for path, module in self.names.modules:
            if module.training == (path in known):
                found.setdefault(id(module), (path, module, path not in known))
        return list(found.values())

    def _report_unfilled(self) -> None:
        """Buffers that are not stored, and have no memory here either."""
        for raw, buffer in self.root.named_buffers():
            if buffer.device.type == "meta" and self.names.clean(raw) not in self.match.live:
                name = self.names.clean(raw)
                self.report.changed.append(f"buffer {name!r} is not persistent and still on the meta device: fill it")


def _copy_inside(live: torch.Tensor, value: torch.Tensor) -> bool:
    """Copy a value into a live tensor of the same kind; False where the live one has to be exchanged."""
    if live.layout is torch.strided:  # detaching a sparse tensor would give it indices and values of its own
        live = live.detach()
    elif type(live) is nn.Parameter:
        value = nn.Parameter(value, requires_grad=False)
    if is_sharded(live) and is_sharded(value):
        with writing_to(local_part(live)):
            local_part(live).copy_(local_part(value))
        return True
    if type(live) is not type(value) or live.layout != value.layout:
        return False
    if type(live) not in PLAIN_TYPES:
        return _copy_subclass(live, value)
    if live.is_quantized or value.is_quantized:
        return False
    try:
        with writing_to(live):
            live.copy_(value)
    except RuntimeError:
        return False
    return True


def _copy_subclass(live: Any, value: Any) -> bool:
    names, context = live.__tensor_flatten__()
    other_names, other_context = value.__tensor_flatten__()
    if list(names) != list(other_names) or live.shape != value.shape or context != other_context:
        return False
    pairs = [(getattr(live, name), getattr(value, name)) for name in names]
    if any(a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
        return False
    return all(_copy_inside(a.detach(), b.detach()) for a, b in pairs)

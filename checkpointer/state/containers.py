"""Plain containers, arrays and tensors as components: restored recursively in place.

A live dict, list, set, deque or bytearray keeps its identity where the saved value has the same type at the same path;
a live tensor or array of the same dtype and shape is filled in place. What the checkpoint lacks is removed.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import numpy as np
import torch
from torch import nn

from checkpointer.errors import IncompatibleStateError
from checkpointer.state.destinations import Destinations, check_kind
from checkpointer.state.modes import writing_to
from checkpointer.state.protocol import Captured, ComponentReport, RestoreOptions, RestorePlan, SavedState
from checkpointer.state.settings import names_any, with_kept
from checkpointer.state.tensors import is_ordinary, is_plain, memory_key
from checkpointer.state.tree.decode import Leaf, decode, skeleton
from checkpointer.state.tree.encode import encode

MAPPINGS = (dict, OrderedDict, defaultdict, Counter)
CONTAINERS: tuple[type, ...] = (*MAPPINGS, list, set, deque, bytearray)
COMPONENT_TYPES: tuple[type, ...] = (*CONTAINERS, np.ndarray, torch.Tensor, nn.Parameter)


class ContainerAdapter:
    """Stores a mutable container, numpy array or tensor, and restores it in place."""

    kind = "container"

    def __init__(self, name: str, live: Any) -> None:
        self.name = name
        self.live = live

    def capture(self) -> Captured:
        """Encode the object. Raises :class:`UnsupportedStateError`."""
        tree, tensors = encode(self.live, self.name)
        return Captured(self.kind, tree, tensors)

    def prepare(self, saved: SavedState, options: RestoreOptions) -> RestorePlan:
        """Check the tree against the live object and find the live tensors and arrays to read into."""
        check_kind(saved, self.kind, self.live)
        component = saved.component
        value, keys = skeleton(component.tree, component.tensors, self.live, place=self.name)
        self._check_root(value)
        report = ComponentReport(self.name, self._names(value, options))
        value = self._without_ignored(value, options)
        places = Destinations(self.name, component.tensors, options.map_location)
        place_leaves(places, value, self.live, set())
        places.allocate_all(keys)
        if isinstance(self.live, dict) and isinstance(value, dict):
            report.changed += [f"{key!r} removed: it was not saved" for key in self.live if key not in value]

        def apply() -> None:
            value = decode(component.tree, places.tensors(), self.live, place=self.name, specs=component.tensors)
            self._restore(self._without_ignored(value, options), options, report)

        return RestorePlan(places.reads, apply, report)

    def _without_ignored(self, value: Any, options: RestoreOptions) -> Any:
        """With the live value, or none, of what ``ignore_keys`` names."""
        if not any(names_any(state, self.name, options) for state in (value, self.live)):
            return value
        return with_kept(value, self.live, self.name, options)

    def _names(self, value: Any, options: RestoreOptions) -> list[str]:
        if not isinstance(value, dict):
            return [self.name]
        return [str(key) for key in value if not options.ignored(self.name, str(key))]

    def _check_root(self, value: Any) -> None:
        """The live object itself cannot be exchanged for another, so its type has to fit."""
        live, problem = self.live, ""
        if isinstance(value, Leaf):
            problem = _leaf_mismatch(value, live)
        elif type(value) is not type(live):
            problem = f"saved as {type(value).__name__}, live is {type(live).__name__}"
        elif isinstance(value, deque) and value.maxlen != live.maxlen:
            problem = f"saved with maxlen {value.maxlen}, live has {live.maxlen}"
        if problem:
            raise IncompatibleStateError(f"{self.name}: {problem}; register an object like the one that was saved")

    def _restore(self, value: Any, options: RestoreOptions, report: ComponentReport) -> None:
        live = self.live
        with torch.no_grad():
            if isinstance(live, torch.Tensor):
                _fill_tensor(live, value)
                _restore_flag(self.name, live, value, options, report)
            elif isinstance(live, np.ndarray):
                if not np.shares_memory(live, value):
                    np.copyto(live, value)
            else:
                merge(value, live, set())


def _leaf_mismatch(leaf: Leaf, live: Any) -> str:
    if leaf.kind == "array":
        return _array_mismatch(leaf, live)
    if not isinstance(live, torch.Tensor):
        return f"saved as a tensor, live is {type(live).__name__}"
    if leaf.spec is None:
        return "saved as another kind of tensor" if is_plain(live) else ""
    if not is_ordinary(live):
        return f"saved as an ordinary tensor, live has layout {live.layout}"
    found = (str(live.dtype)[6:], tuple(live.shape))
    if found != (leaf.spec.dtype, leaf.spec.shape):
        return f"saved as {leaf.spec.dtype} {list(leaf.spec.shape)}, live is {found[0]} {list(found[1])}"
    return ""


def _array_mismatch(leaf: Leaf, live: Any) -> str:
    if type(live) is not np.ndarray:
        return f"saved as a numpy array, live is {type(live).__name__}"
    if (live.dtype.str, live.shape) != (leaf.dtype, leaf.shape):
        return f"saved as {leaf.dtype} {list(leaf.shape)}, live is {live.dtype.str} {list(live.shape)}"
    return "" if live.flags.writeable else "the live array is read-only"


def _fill_tensor(live: torch.Tensor, value: torch.Tensor) -> None:
    with writing_to(live):
        if live.layout is not torch.strided:  # detached, it would be given indices and values of its own
            live.copy_(value.detach())
        elif memory_key(live.detach()) != memory_key(value.detach()):
            live.detach().copy_(value.detach())


def _restore_flag(name: str, live: torch.Tensor, value: torch.Tensor, options: RestoreOptions, report: Any) -> None:
    if not live.is_leaf or live.requires_grad == value.requires_grad:
        return
    change = f"requires_grad of {name}: {live.requires_grad} here, {value.requires_grad} when saved"
    if options.restores_flags:
        with writing_to(live):
            live.requires_grad_(value.requires_grad)
        report.changed.append(f"{change}: restored")
    else:
        report.changed.append(f"{change}: left as it is")


def place_leaves(places: Destinations, value: Any, live: Any, seen: set[int]) -> None:
    """Offer live memory for every :class:`Leaf` in an outline, walking the live value alongside."""
    if isinstance(value, Leaf):
        _place_leaf(places, value, live)
        return
    if type(value) is not type(live) or id(live) in seen:
        return
    if isinstance(value, dict):
        seen.add(id(live))
        for key, item in value.items():
            found = _get(live, key)
            if type(item) is Leaf and item.kind == "tensor" and type(found) is torch.Tensor and not found.requires_grad:
                places.offer(item.key, found)  # nearly all that optimizers have
            else:
                place_leaves(places, item, found, seen)
    elif isinstance(value, (list, tuple, deque)):
        seen.add(id(live))
        for item, live_item in zip(value, live, strict=False):
            place_leaves(places, item, live_item, seen)


def _place_leaf(places: Destinations, leaf: Leaf, live: Any) -> None:
    if leaf.kind == "array":
        places.offer_array(leaf, live)
    elif leaf.kind in ("tensor", "parameter", "leaf") and _same_wrapper(leaf.kind, live):
        places.offer(leaf.key, live)


def _same_wrapper(kind: str, live: Any) -> bool:
    if kind == "parameter":
        return isinstance(live, nn.Parameter)
    if not isinstance(live, torch.Tensor) or isinstance(live, nn.Parameter):
        return False
    return live.is_leaf and live.requires_grad == (kind == "leaf")


def merge(value: Any, live: Any, seen: set[int]) -> Any:
    """``value`` with live objects in the places where they can be kept; those are changed to hold it.

    A live object that occurs twice is kept once, so that two saved values never end up in one object.
    """
    if isinstance(value, torch.Tensor):
        return live if value is live else _merge_tensor(value, live)
    if isinstance(value, np.ndarray):
        return live if _same_array(value, live) else value
    if value is live or type(value) is not type(live) or type(value) not in (*CONTAINERS, tuple) or id(live) in seen:
        return value
    seen.add(id(live))
    if isinstance(value, dict):
        return _merge_dict(value, live, seen)
    if isinstance(value, (list, tuple, deque)):
        return _merge_sequence(value, live, seen)
    live.clear()
    (live.update if isinstance(value, set) else live.extend)(value)
    return live


def _merge_dict(value: dict[Any, Any], live: dict[Any, Any], seen: set[int]) -> dict[Any, Any]:
    items = [(key, merge(item, _get(live, key), seen)) for key, item in value.items()]
    live.clear()
    live.update(dict(items))
    if isinstance(live, defaultdict) and isinstance(value, defaultdict):
        live.default_factory = value.default_factory
    return live


def _merge_sequence(value: Any, live: Any, seen: set[int]) -> Any:
    known = [*live, *[None] * (len(value) - len(live))]
    items = [merge(item, known[index], seen) for index, item in enumerate(value)]
    if isinstance(value, tuple):
        return tuple(items)
    if isinstance(value, deque) and value.maxlen != live.maxlen:
        return deque(items, value.maxlen)
    live.clear()
    live.extend(items)
    return live


def _merge_tensor(value: torch.Tensor, live: Any) -> Any:
    """The live tensor if the saved one was read into its memory."""
    if not isinstance(live, torch.Tensor) or type(live) is not type(value):
        return value
    if any(item.layout is not torch.strided or item.is_quantized for item in (value, live)):
        return value
    if live.requires_grad != value.requires_grad and not isinstance(live, nn.Parameter):
        return value
    if value.numel() == 0 or memory_key(live.detach()) != memory_key(value.detach()):
        same = value.numel() == 0 and (live.shape, live.dtype) == (value.shape, value.dtype)
        return live if same else value
    if live.is_leaf and live.requires_grad != value.requires_grad:
        with writing_to(live):
            live.requires_grad_(value.requires_grad)
    return live


def _same_array(value: np.ndarray[Any, Any], live: Any) -> bool:
    if type(live) is not np.ndarray or (live.dtype.str, live.shape) != (value.dtype.str, value.shape):
        return False
    same_place = live.__array_interface__["data"][0] == value.__array_interface__["data"][0]
    return live.flags.writeable and live.strides == value.strides and (same_place or live.size == 0)


def _get(live: Any, key: Any) -> Any:
    """``live[key]`` without making a defaultdict grow."""
    return dict.get(live, key)

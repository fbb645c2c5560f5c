"""Which tensor goes into which file: each once, within the limit, and so that stock safetensors reads it."""

from __future__ import annotations

import itertools
import json
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from checkpointer.errors import CorruptCheckpointError
from checkpointer.format import paths
from checkpointer.format.index import Chunk, TensorSpec
from checkpointer.format.tensor_files import (
    PAGE,
    SMALL_COMPONENT,
    ComponentTensors,
    TensorFile,
    check_header,
    count_files,
    cut,
    plan_files,
    shard_indexes,
)

ANY = settings(max_examples=100, deadline=None)
KINDS = {"model": "module", "optimizer": "optimizer", "loader": "stateful", "rng": "rng"}

specs = st.builds(
    TensorSpec,
    st.sampled_from(["float32", "bfloat16", "uint8", "float64", "complex64", "float8_e4m3fn", "complex128", "bool"]),
    st.lists(st.integers(0, 5), max_size=3).map(tuple),
)
keys = st.sampled_from(["a", "b.weight", "__metadata__", "format", "c", "ü", "a#2"])


@st.composite
def states(draw: st.DrawFn) -> dict[str, ComponentTensors]:
    found = {}
    for name in draw(st.lists(st.sampled_from(list(KINDS)), unique=True)):
        tensors = draw(st.dictionaries(keys, specs, max_size=7))
        frozen = frozenset(key for key in tensors if draw(st.booleans()))
        aliases = {f"tied to {key}": key for key in tensors if draw(st.booleans())}
        found[name] = ComponentTensors(KINDS[name], tensors, frozen, aliases)
    return found


limits = st.integers(1, 400)


@ANY
@given(states(), limits)
def test_every_tensor_has_one_place_as_large_as_it_is_and_none_overlap(components, limit):
    files = plan_files(components, limit)
    slots = [(slot.component, slot.key) for file in files for slot in file.slots]
    assert sorted(slots) == sorted((name, key) for name, part in components.items() for key in part.specs)
    assert len({file.path for file in files}) == len(files)
    for file in files:
        end = 0
        for slot, spec in zip(file.slots, file.specs, strict=True):
            assert spec == components[slot.component].specs[slot.key]
            assert (slot.begin, slot.end) == (end, end + spec.nbytes)
            end = slot.end
        assert file.data_size == end


@ANY
@given(states(), limits)
def test_a_file_above_the_limit_holds_one_tensor_and_what_has_no_bytes(components, limit):
    for file in plan_files(components, limit):
        if file.path != paths.SHARED_TENSORS:
            assert file.data_size <= limit or sum(spec.nbytes > 0 for spec in file.specs) == 1


@ANY
@given(states(), limits)
def test_frozen_tensors_share_no_file_with_others(components, limit):
    for file in plan_files(components, limit):
        frozen = {slot.key in components[slot.component].frozen for slot in file.slots}
        if file.path != paths.SHARED_TENSORS:
            assert frozen == {file.frozen}
        assert file.frozen == (frozen == {True})


@ANY
@given(states(), limits)
def test_stock_safetensors_reads_every_file_and_headers_are_whole_pages(components, limit):
    for file in plan_files(components, limit):
        header = file.header
        assert len(header) % PAGE == 0
        assert file.size == len(header) + file.data_size
        found = {name: (info["dtype"], len(info["data"])) for name, info in deserialize(header + bytes(file.data_size))}
        assert len(found) == len(file.slots)
        assert sorted(size for _, size in found.values()) == sorted(spec.nbytes for spec in file.specs)
        metadata = json.loads(header[8:])["__metadata__"]
        assert metadata["format"] == "pt"


@ANY
@given(states(), limits)
def test_the_index_of_hugging_face_names_the_file_of_every_tensor_of_a_component_in_shards(components, limit):
    files = plan_files(components, limit)
    indexes = {path: json.loads(data) for path, data in shard_indexes(files, components).items()}
    sharded = {
        file.slots[0].component
        for file in files
        if file.path not in (paths.SHARED_TENSORS, paths.tensor_file(file.slots[0].component))
    }
    assert set(indexes) == {paths.shard_index(name) for name in sharded}
    for name in sharded:
        places = {slot.key: file.path for file in files for slot in file.slots if slot.component == name}
        index = indexes[paths.shard_index(name)]
        assert index["weight_map"] == places
        assert index["metadata"]["total_size"] == sum(spec.nbytes for spec in components[name].specs.values())


@ANY
@given(states(), limits)
def test_as_many_files_are_counted_as_are_planned(components, limit):
    files = plan_files(components, limit)
    for name, part in components.items():
        own = [file for file in files if file.path != paths.SHARED_TENSORS and file.slots[0].component == name]
        assert count_files(part, limit) == len(own)


@given(st.lists(st.integers(0, 50)), st.integers(1, 60))
def test_tensors_are_cut_in_their_order_and_no_file_could_have_taken_the_next(sizes, limit):
    shards = cut(sizes, limit)
    assert [number for shard in shards for number in shard] == list(range(len(sizes)))
    for shard, following in itertools.pairwise(shards):
        assert shard
        assert sum(sizes[number] for number in shard) + sizes[following[0]] > limit


@pytest.mark.parametrize("size, shares", [(SMALL_COMPONENT - 1, True), (SMALL_COMPONENT, False)])
def test_a_small_component_shares_a_file_unless_it_is_a_module_or_an_optimizer(size, shares):
    tensors = {"a": TensorSpec("uint8", (size,))}
    for kind, own in (("stateful", not shares), ("module", True), ("optimizer", True)):
        (file,) = plan_files({"x": ComponentTensors(kind, tensors)})
        assert file.path == ("x.safetensors" if own else paths.SHARED_TENSORS)


def chunks_of(file: TensorFile) -> list[tuple[str, Chunk]]:
    start = len(file.header)
    return [
        (spec.dtype, Chunk((0,) * len(spec.shape), spec.shape, file.path, start + slot.begin, start + slot.end, ""))
        for slot, spec in zip(file.slots, file.specs, strict=True)
    ]


@ANY
@given(states(), limits)
def test_a_header_agrees_with_the_chunks_that_it_was_made_of(components, limit):
    for file in plan_files(components, limit):
        check_header(file.header, chunks_of(file), "the header")


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["a"].update(shape=[3, 2]),
        lambda header: header["a"].update(dtype="I32"),
        lambda header: header["a"].update(data_offsets=[4, 28]),
        lambda header: header.pop("a"),
        lambda header: header.update(c=header["a"]),
        lambda header: header["a"].update(shape="2,3"),
        lambda header: header["a"].pop("data_offsets"),
        lambda header: header.update(a=[]),
    ],
)
def test_a_header_that_tells_another_story_is_damage(change):
    tensors = {"a": TensorSpec("float32", (2, 3)), "b": TensorSpec("float32", (1,))}
    (file,) = plan_files({"model": ComponentTensors("module", tensors)})
    header = json.loads(file.header[8:])
    change(header)
    length = len(file.header) - 8
    text = json.dumps(header).encode().ljust(length)  # as long as before: the tensors' bytes lie where they did
    with pytest.raises(CorruptCheckpointError):
        check_header(struct.pack("<Q", length) + text, chunks_of(file), "the header")

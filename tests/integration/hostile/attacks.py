"""A folder of attacks: each a function that turns a whole checkpoint into a hostile one, with hashes that fit.

``directory`` is the checkpoint of step 2 in a run that also has step 1; ``victim`` is a file outside the run root.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

from tests.support.forge import Forgery, overwrite, seal, seal_text

Attack: TypeAlias = Callable[[Path, Path], None]
ATTACKS: dict[str, Attack] = {}
MODEL = "model-00001-of-00002.safetensors"
WEIGHT = "1.weight"


def attack(function: Attack) -> Attack:
    """Add a function to the folder, under its own name."""
    ATTACKS[function.__name__.replace("_", " ")] = function
    return function


class RunsWhenUnpickled:
    """What every pickle can do."""

    def __init__(self, place: str) -> None:
        self._place = place

    def __reduce__(self) -> object:
        return os.mkdir, (self._place,)


# ------------------------------------------------------------------------------------------- sizes out of proportion


@attack
def a_file_of_exabytes(directory: Path, victim: Path) -> None:
    forgery = Forgery(directory)
    forgery.files[MODEL]["size"] = 2**62
    forgery.write_index()


@attack
def a_tensor_of_exabytes(directory: Path, victim: Path) -> None:
    """File, range, shape and lengths agree with each other: only the file on disk does not."""
    forgery = Forgery(directory)
    entry = forgery.tensor("model", WEIGHT)
    chunk = entry["chunks"][0]
    chunk["range"][1] = chunk["range"][0] + 4 * 2**58
    entry["shape"] = chunk["lengths"] = [2**58]
    chunk["offsets"] = [0]
    forgery.write_index()


@attack
def a_manifest_of_a_terabyte_of_nothing(directory: Path, victim: Path) -> None:
    os.truncate(directory / "manifest.json", 2**40)


@attack
def an_index_of_a_terabyte_of_nothing(directory: Path, victim: Path) -> None:
    forgery = Forgery(directory)
    os.truncate(directory / "index.json", 2**40)
    forgery.manifest["index"]["index.json"][0] = 2**40
    forgery.write_manifest()


@attack
def a_table_of_a_terabyte_of_nothing(directory: Path, victim: Path) -> None:
    forgery = Forgery(directory)
    os.truncate(directory / "index.safetensors", 2**40)
    forgery.manifest["index"]["index.safetensors"][0] = 2**40
    forgery.write_manifest()


def _table(directory: Path, change: Callable[[dict[str, Any], dict[str, str]], object]) -> None:
    Forgery(directory).write_table(change)


@attack
def a_column_of_another_dtype(directory: Path, victim: Path) -> None:
    _table(directory, lambda columns, _: columns.update(chunk_begin=columns["chunk_begin"].astype("u1")))


@attack
def a_column_that_is_too_short(directory: Path, victim: Path) -> None:
    _table(directory, lambda columns, _: columns.update(dtype=columns["dtype"][:-1]))


@attack
def chunks_out_of_order(directory: Path, victim: Path) -> None:
    _table(directory, lambda columns, _: columns.update(chunk_tensor=columns["chunk_tensor"][::-1]))


@attack
def a_chunk_of_a_tensor_that_is_not_there(directory: Path, victim: Path) -> None:
    _table(directory, lambda columns, _: columns["chunk_tensor"].__setitem__(-1, 2**32 - 1))


@attack
def a_chunk_that_begins_before_its_file(directory: Path, victim: Path) -> None:
    _table(directory, lambda columns, _: columns["chunk_begin"].__setitem__(0, -(2**63)))


@attack
def a_chunk_in_the_table_itself(directory: Path, victim: Path) -> None:
    _table(directory, lambda columns, _: columns["chunk_file"].__setitem__(0, 2**32 - 1))


@attack
def keys_that_are_longer_than_their_text(directory: Path, victim: Path) -> None:
    _table(directory, lambda columns, _: columns["key_lengths"].__setitem__(0, 2**32 - 1))


@attack
def keys_that_are_no_text(directory: Path, victim: Path) -> None:
    _table(directory, lambda columns, _: columns.update(keys=columns["keys"] | 0x80))


@attack
def a_dtype_that_is_not_listed(directory: Path, victim: Path) -> None:
    _table(directory, lambda columns, _: columns["dtype"].__setitem__(0, 255))


@attack
def a_shape_of_negative_sizes(directory: Path, victim: Path) -> None:
    _table(directory, lambda columns, _: columns.update(shape=-columns["shape"]))


@attack
def a_shape_that_overflows(directory: Path, victim: Path) -> None:
    _table(directory, lambda columns, _: columns.update(shape=columns["shape"] * 0 + 2**62))


@attack
def boxes_of_chunks_that_are_not_there(directory: Path, victim: Path) -> None:
    _table(directory, lambda columns, _: columns.update(boxed=np.array([2**32 - 1], np.uint32)))


@attack
def two_parts_of_one_rank(directory: Path, victim: Path) -> None:
    parts = {"part": np.array([1, 1], np.uint32), "part_size": np.array([9, 9]), "part_hash": np.zeros((2, 16), "u1")}
    _table(directory, lambda columns, _: columns.update(parts))


@attack
def a_part_that_is_not_there(directory: Path, victim: Path) -> None:
    parts = {"part": np.array([1], np.uint32), "part_size": np.array([9]), "part_hash": np.zeros((1, 16), "u1")}
    _table(directory, lambda columns, _: columns.update(parts))


@attack
def layouts_over_ranks_that_have_no_part(directory: Path, victim: Path) -> None:
    def change(columns: dict[str, Any], texts: dict[str, str]) -> None:
        count = len(columns["dtype"])
        columns.update({name: columns[name][:0] for name in list(columns) if name.startswith(("chunk_", "box"))})
        columns.update(layout=np.zeros(count, np.uint16), owner=np.zeros(count, np.uint32))
        columns["layout_ranks"] = np.array([0], np.uint32)
        texts["layouts"] = json.dumps([{"mesh": [1], "cuts": [], "ranks": 1}])

    _table(directory, change)


@attack
def a_table_with_bytes_behind_its_columns(directory: Path, victim: Path) -> None:
    forgery = Forgery(directory)
    forgery.write("index.safetensors", forgery.read("index.safetensors") + b"more")
    forgery.write_manifest()


@attack
def a_million_numbers_again_and_again(directory: Path, victim: Path) -> None:
    forgery = Forgery(directory)
    forgery.index["components"]["progress"]["tree"] = [{"$count": [0, 1_000_000]}] * 1000
    forgery.write_index()


@attack
def all_tensors_again_and_again(directory: Path, victim: Path) -> None:
    forgery = Forgery(directory)
    forgery.index["components"]["rng"]["tree"] = [{"$tensors": ""} for _ in range(1000)]
    forgery.write_index()


@attack
def totals_that_are_not_those_of_the_index(directory: Path, victim: Path) -> None:
    forgery = Forgery(directory)
    forgery.manifest["size"] = 1
    forgery.counts = False
    forgery.write_manifest()


@attack
def a_deque_and_a_range_without_end(directory: Path, victim: Path) -> None:
    forgery = Forgery(directory)
    tree = {"d": {"$deque": [2**62, []]}, "r": {"$range": [0, 2**62, 1]}, "x": {"$ndarray": {"shape": [2**40]}}}
    forgery.index["components"]["progress"]["tree"] = tree
    forgery.write_index()


@attack
def a_number_of_a_million_digits(directory: Path, victim: Path) -> None:
    forgery = Forgery(directory)
    text = json.dumps(forgery.manifest).replace(f'"step": {forgery.manifest["step"]}', '"step": ' + "9" * 1_000_000)
    overwrite(directory / "manifest.json", seal_text(text[:-1]))


@attack
def an_integer_of_a_million_hexadecimal_digits(directory: Path, victim: Path) -> None:
    forgery = Forgery(directory)
    forgery.index["components"]["progress"]["tree"] = {"$size": [{"$int": "7" + "f" * 1_000_000}]}
    forgery.write_index()


@attack
def a_hundred_thousand_levels(directory: Path, victim: Path) -> None:
    forgery = Forgery(directory)
    forgery.write_index(b'{"format": "checkpointer-index", "version": 1, "files": {}, "components": ' + b"[" * 100_000)


@attack
def eight_hundred_levels_of_a_tree(directory: Path, victim: Path) -> None:
    forgery = Forgery(directory)
    forgery.index["components"]["progress"]["tree"] = "here"
    forgery.write_index()
    deep = '{"a": [' * 400 + "1" + "]}" * 400
    forgery.write_index(forgery.read("index.json").replace(b'"here"', deep.encode()))


# ----------------------------------------------------------------------------------------------- numbers and keys


def _in_manifest(directory: Path, old: str, new: str) -> None:
    """Change the text of the manifest, and seal it."""
    forgery = Forgery(directory)
    text = json.dumps(forgery.manifest)
    assert old in text
    overwrite(directory / "manifest.json", seal_text(text.replace(old, new, 1)[:-1]))


@attack
def a_size_that_is_not_a_number(directory: Path, victim: Path) -> None:
    size = Forgery(directory).manifest["index"]["index.json"][0]
    _in_manifest(directory, f"[{size},", "[NaN,")


@attack
def a_size_that_is_infinite(directory: Path, victim: Path) -> None:
    size = Forgery(directory).manifest["index"]["index.json"][0]
    _in_manifest(directory, f"[{size},", "[1e999,")


@attack
def a_size_that_is_a_float(directory: Path, victim: Path) -> None:
    size = Forgery(directory).manifest["index"]["index.json"][0]
    _in_manifest(directory, f"[{size},", f"[{size}.0,")


@attack
def a_key_given_twice_in_the_manifest(directory: Path, victim: Path) -> None:
    _in_manifest(directory, '"step": 2', '"step": 1, "step": 2')


@attack
def a_key_given_twice_in_the_index(directory: Path, victim: Path) -> None:
    forgery = Forgery(directory)
    forgery.write_index(forgery.read("index.json").replace(b'"components":', b'"components":[],"components":', 1))


@attack
def chunks_that_overlap(directory: Path, victim: Path) -> None:
    forgery = Forgery(directory)
    entry = forgery.tensor("model", WEIGHT)
    entry["chunks"] = entry["chunks"] * 2
    forgery.write_index()


@attack
def an_offset_below_zero(directory: Path, victim: Path) -> None:
    forgery = Forgery(directory)
    chunk = forgery.tensor("model", WEIGHT)["chunks"][0]
    chunk["offsets"] = [-1 for _ in chunk["offsets"]]
    forgery.write_index()


@attack
def a_range_that_begins_before_the_file(directory: Path, victim: Path) -> None:
    forgery = Forgery(directory)
    chunk = forgery.tensor("model", WEIGHT)["chunks"][0]
    begin, end = chunk["range"]
    chunk["range"] = [begin - end, 0]
    forgery.write_index()


@attack
def a_header_that_tells_another_story(directory: Path, victim: Path) -> None:
    """Stock safetensors would read other tensors than this library does."""
    forgery = Forgery(directory)

    def swap(header: dict[str, dict[str, object]]) -> None:
        for entry in header.values():
            if "shape" in entry:
                entry["data_offsets"] = [0, 4]

    forgery.edit_header(MODEL, swap)
    forgery.write_index()


# ------------------------------------------------------------------------------------------ names that lead elsewhere


def _file_named(directory: Path, name: str) -> None:
    forgery = Forgery(directory)
    forgery.files[name] = {"path": name, "size": 6, "xxh3": "0" * 32}
    forgery.write_index()


@attack
def a_name_that_climbs(directory: Path, victim: Path) -> None:
    _file_named(directory, os.path.relpath(victim, directory))


@attack
def a_name_that_climbs_from_a_folder(directory: Path, victim: Path) -> None:
    _file_named(directory, f"files/../{os.path.relpath(victim, directory)}")


@attack
def an_absolute_name(directory: Path, victim: Path) -> None:
    _file_named(directory, str(victim))


@attack
def a_name_with_backslashes(directory: Path, victim: Path) -> None:
    _file_named(directory, os.path.relpath(victim, directory).replace("/", "\\"))


@attack
def a_name_with_a_null(directory: Path, victim: Path) -> None:
    _file_named(directory, "index.json\0.txt")


@attack
def a_name_in_fullwidth_letters(directory: Path, victim: Path) -> None:
    """Compatibility normalization would make a path of it: ``../``."""
    _file_named(directory, "．．／secret.txt")


@attack
def a_name_written_from_right_to_left(directory: Path, victim: Path) -> None:
    _file_named(directory, "files/\u202etxt.exe")


@attack
def two_names_that_some_systems_hold_for_one(directory: Path, victim: Path) -> None:
    _file_named(directory, "files/\u00e9")
    _file_named(directory, "files/e\u0301")


@attack
def a_data_folder_elsewhere(directory: Path, victim: Path) -> None:
    forgery = Forgery(directory)
    forgery.manifest["data"] = "../checkpoint-1"
    forgery.write_manifest()


# ------------------------------------------------------------------------------------------- links, devices, pipes


def _replaced(path: Path) -> Path:
    path.unlink()
    return path


@attack
def a_link_to_a_file_outside(directory: Path, victim: Path) -> None:
    forgery = Forgery(directory)
    forgery.write(MODEL, victim.read_bytes())
    forgery.write_index()
    _replaced(directory / MODEL).symlink_to(victim)


@attack
def a_manifest_that_is_a_link(directory: Path, victim: Path) -> None:
    elsewhere = victim.parent / "manifest.json"
    (directory / "manifest.json").rename(elsewhere)
    (directory / "manifest.json").symlink_to(elsewhere)
    elsewhere.write_bytes(elsewhere.read_bytes().replace(b'"step": 2', b'"step": 3'))


@attack
def a_link_to_itself(directory: Path, victim: Path) -> None:
    _replaced(directory / "index.json").symlink_to(directory / "index.json")


@attack
def a_manifest_that_is_a_pipe(directory: Path, victim: Path) -> None:
    os.mkfifo(_replaced(directory / "manifest.json"))


@attack
def tensors_that_come_from_a_pipe(directory: Path, victim: Path) -> None:
    os.mkfifo(_replaced(directory / MODEL))


@attack
def tensors_that_come_from_a_device(directory: Path, victim: Path) -> None:
    try:
        os.mknod(_replaced(directory / MODEL), stat.S_IFCHR | 0o600, os.makedev(1, 5))  # /dev/zero
    except PermissionError:
        pytest.skip("only root makes devices: run as root")


# ------------------------------------------------------------------------------------------------ code in disguise


@attack
def a_pickle_that_is_called_safetensors(directory: Path, victim: Path) -> None:
    forgery = Forgery(directory)
    forgery.write(MODEL, pickle.dumps(RunsWhenUnpickled(str(victim.parent / "ran"))))
    forgery.write_index()


@attack
def a_file_of_torch_that_is_called_safetensors(directory: Path, victim: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(RunsWhenUnpickled(str(victim.parent / "ran"))))
    forgery = Forgery(directory)
    forgery.write(MODEL, buffer.getvalue())
    forgery.write_index()


@attack
def a_pickle_in_the_place_of_the_index(directory: Path, victim: Path) -> None:
    Forgery(directory).write_index(pickle.dumps(RunsWhenUnpickled(str(victim.parent / "ran"))))


@attack
def a_pickle_in_the_place_of_the_manifest(directory: Path, victim: Path) -> None:
    overwrite(directory / "manifest.json", pickle.dumps(RunsWhenUnpickled(str(victim.parent / "ran"))))


@attack
def a_class_by_its_name(directory: Path, victim: Path) -> None:
    forgery = Forgery(directory)
    forgery.index["components"]["progress"]["tree"] = {"x": {"$custom": ["os.mkdir", str(victim.parent / "ran")]}}
    forgery.write_index()


@attack
def a_tensor_class_by_its_name(directory: Path, victim: Path) -> None:
    forgery = Forgery(directory)
    fields = {"class": "os.mkdir", "inner": {}, "ctx": str(victim.parent / "ran"), "size": [], "stride": []}
    forgery.index["components"]["progress"]["tree"] = {"x": {"$subclass": fields}}
    forgery.write_index()


@attack
def a_default_factory_that_is_a_function(directory: Path, victim: Path) -> None:
    forgery = Forgery(directory)
    forgery.index["components"]["progress"]["tree"] = {"x": {"$defaultdict": ["os.getcwd", []]}}
    forgery.write_index()


@attack
def a_manifest_without_its_fields(directory: Path, victim: Path) -> None:
    overwrite(directory / "manifest.json", seal({"format": "checkpointer", "version": 1}))


OWNERS = {
    "text that commands the terminal": json.dumps(
        {"host": "\x1b]0;owned\x07\x1b[2J", "pid": "\u202e1", "user": "\n\n"}
    ),
    "a hundred thousand levels": '{"host": ' + "[" * 100_000,
    "a host without end": json.dumps({"host": "x" * 3000, "pid": 1}),
    "a list": "[]",
    "no text": "\udcff",
    "numbers without end": '{"pid": ' + "9" * 4000 + "}",
}
"""What may lie in the place of ``owner.json``."""

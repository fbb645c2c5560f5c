"""Run roots that are not what was meant: refused when they are opened, before anything is made there."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path, PurePath

from checkpointer.errors import CheckpointerError, ConfigError, FormatVersionError
from checkpointer.format import foreign, paths
from checkpointer.format.manifest import FORMAT, parse_manifest

_ONE_SLASH = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/(?!/)(.*)", re.DOTALL)
"""A protocol of two letters or more (``C:/run`` is a drive) and one slash in place of two."""

_NO_SLASH = re.compile(r"(s3|s3a|gs|gcs|abfs|abfss|az|adl|oci|oss|hf):(?![/\\])(.+)", re.DOTALL | re.IGNORECASE)
_PROTOCOL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")
_WINDOWS = re.compile(r"[A-Za-z]:[/\\]|\\\\")
_FORGOTTEN_F = re.compile(r"\{[A-Za-z_][^{}/]*\}")
_WINDOWS_VARIABLE = re.compile(r"%[A-Za-z_]\w*%")
_VARIABLE = re.compile(r"\$[A-Za-z_]\w*|\$\{[^}/]*\}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_EXPLICIT = ("./", "../", ".\\", "..\\")
_PRIVATE_NAMES = frozenset(
    path.rpartition("/")[2] for path in (paths.LOCK, paths.OWNER, paths.NOTES, paths.TMP, paths.TRASH, paths.QUARANTINE)
)


def text_of(root: object) -> str:
    """A run root as it was given, as text.

    Raises:
        ConfigError: it is neither a path nor a URL, or is empty.
    """
    text = os.fspath(root) if isinstance(root, (str, os.PathLike)) else None
    if not isinstance(text, str) or not text.strip() or text in ("file://", "local://") or "\0" in text:
        raise ConfigError(f"the run root must be a path or a URL, got {root!r}")
    return text


def check_spelling(text: str, given: object) -> None:
    """Refuse what looks like a mistyped URL, or like a shell's variable that nobody has replaced.

    A directory of that very name that exists is what was meant, and so is ``./NAME``. ``given``: what ``text`` was.

    Raises:
        ConfigError: and nothing is made; it says what was meant.
    """
    if "://" in text:
        _refuse_blanks(text)
        for part in text.split("::"):
            _refuse_capitals(part, text)
            _refuse_one_slash(part, text, given)
        return
    if os.path.isdir(os.path.expanduser(text)):
        return
    _refuse_blanks(text)
    if text.startswith(_EXPLICIT):
        return
    for part in text.split("::"):
        _refuse_one_slash(part, text, given)
    if "::" in text and not (os.path.isabs(text) or text.startswith("~")):
        raise _refused(text, "it looks like a chained URL without its '://', such as 'simplecache::s3://bucket/run'")
    _refuse_protocol_inside(text)
    _refuse_what_a_shell_expands(text)
    _refuse_what_python_left(text)
    if os.name != "nt" and _WINDOWS.match(text):
        raise _refused(text, "it looks like a path of Windows, and this system is none: pass a path of this system")


def _refuse_capitals(part: str, text: str) -> None:
    """Of a protocol: file systems are looked up by the name in lower case."""
    name, found, rest = part.partition("://")
    if found and name != name.lower() and _is_protocol(name):
        meant = text.replace(part, f"{name.lower()}://{rest}")
        raise ConfigError(f"the run root {_shown(text)!r} has a protocol in capitals: write {_shown(meant)!r}")


def _refuse_protocol_inside(text: str) -> None:
    """What ``Path.resolve``, ``os.path.abspath``, Hydra or argparse make of a URL: ``/data/s3:/bucket/run``."""
    parts = text.replace("\\", "/").split("/")
    for index, part in enumerate(parts):
        found = _PROTOCOL.fullmatch(part)
        if found is None or not _is_protocol(found[1]):
            continue
        if not os.path.isdir(os.path.expanduser("/".join(parts[: index + 1]))):
            rest = "/".join(parts[index + 1 :]).lstrip("/")
            name = found[1].lower()
            meant = f"{name}:///{rest}" if name in ("file", "local") else f"{name}://{rest}"
            raise _refused(
                text,
                f"it looks like the URL {_shown(meant)!r} that pathlib, os.path.abspath or a configuration has made a "
                "path of: pass it as a string that nothing resolves",
            )


def _refuse_what_python_left(text: str) -> None:
    found = _FORGOTTEN_F.search(text)
    if found is not None:
        raise _refused(
            text, f"{found[0]} is a place for a value that nothing has filled in: an f-string without its f?"
        )
    first = text.replace("\\", "/").partition("/")[0]
    if first == "None" and not os.path.isdir(first):
        raise _refused(text, "it is what str(None) gives: an argument or a setting that nobody has set?")


def _refuse_blanks(text: str) -> None:
    if text != text.strip() or _CONTROL.search(text):
        raise ConfigError(
            f"the run root {_shown(text)!r} begins or ends with blanks, or holds a line break: that comes from a "
            f"shell, or from a file that was read as it is. {_shown(text.strip())!r} was meant?"
        )
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        raise ConfigError(f"the run root {text} has quotes that belong to a shell: pass it without them")


def _refuse_one_slash(part: str, text: str, given: object) -> None:
    found = _ONE_SLASH.fullmatch(part) or _NO_SLASH.fullmatch(part)
    if found is None or not _is_protocol(found[1]):
        return
    rest = found[2].lstrip("/")
    name = found[1].lower()
    meant = text.replace(part, f"{name}:///{rest}" if name in ("file", "local") else f"{name}://{rest}")
    why = "pathlib makes one slash of two: pass a URL as a string, " if isinstance(given, PurePath) else ""
    raise _refused(text, f"it looks like a URL with a slash missing: {why}{_shown(meant)!r}")


def _refuse_what_a_shell_expands(text: str) -> None:
    found = _VARIABLE.search(text) or _WINDOWS_VARIABLE.search(text)
    if found is not None:
        raise _refused(
            text,
            f"{found[0]} is a variable that nothing has replaced: pass os.path.expandvars(...) of it, or set it where "
            "the configuration is read",
        )
    if text.startswith("~") and os.path.expanduser(text) == text:
        raise _refused(text, f"{text.replace(os.sep, '/').partition('/')[0]} is no user whose home directory is known")


def _refused(text: str, reason: str) -> ConfigError:
    meant = "make it first" if text.startswith(("/", "\\", "~")) else f"write './{_shown(text)}', or make it first"
    return ConfigError(
        f"the run root {_shown(text)!r} would become a local directory of this name, and {reason}. "
        f"If such a directory is meant, {meant}"
    )


def _shown(text: str) -> str:
    """``text`` for a message: what may be a URL loses what may be a secret in it."""
    found = re.match(r"((?:[^?:]*[/\\])?[A-Za-z][\w+.:-]*:/{0,2})(?:[^/@]*@)?([^?]*)", text, re.DOTALL)
    return found[1] + found[2] if found and len(found[1]) > 2 else text


def _is_protocol(name: str) -> bool:
    from fsspec.registry import known_implementations, registry  # imported late: hardly anybody comes here

    return name.lower() in known_implementations or name.lower() in registry


def check_place(root: str) -> None:
    """Refuse a local run root that is no directory, or that lies inside a checkpoint or a run's private directory.

    Raises:
        ConfigError: names what it is, and the run root that was meant.
    """
    _refuse_what_is_no_directory(root)
    for place in dict.fromkeys((root, os.path.realpath(root))):
        folders = [Path(place), *Path(place).parents]
        for folder in folders:
            if folder.name == paths.PRIVATE and any(map(os.path.lexists, map(folder.joinpath, _PRIVATE_NAMES))):
                raise _inside_private(place, str(folder.parent))
        for folder in folders:
            if folder == folders[0] or foreign.step_in_name(folder.name) is not None:
                in_a_run = _is_checkpoint_name(folder.name) and os.path.isdir(folder.parent / paths.PRIVATE)
                found = _Found(_local_manifest(folder), _local_files(folder), in_a_run=in_a_run)
                _refuse_checkpoint(place, str(folder), str(folder.parent), found)


def check_url(
    url: str,
    path: str,
    read: Callable[[str], bytes],
    files_in: Callable[[str], Collection[str]],
    is_run: Callable[[str], bool],
) -> None:
    """The same for a run root elsewhere; asks the store only where a part of ``path`` has the name of a checkpoint.

    ``read`` returns the manifest in a directory, ``files_in`` the names of the files there, ``is_run`` says whether a
    directory is a run root.

    Raises:
        ConfigError: as above.
    """
    parts = path.rstrip("/").split("/")
    for count, name in enumerate(parts, 1):
        above = len(parts) - count
        outer = url.rsplit("/", above + 1)[0]
        if name == paths.PRIVATE and (not above or parts[count] in _PRIVATE_NAMES):
            raise _inside_private(url, outer)
        if foreign.step_in_name(name) is not None:
            folder, parent = "/".join(parts[:count]), "/".join(parts[: count - 1])
            found = _Found()
            with contextlib.suppress(FileNotFoundError, CheckpointerError):
                found = _Found(read(folder))
            if found.manifest is None:
                found = _Found(None, files_in(folder), in_a_run=_is_checkpoint_name(name) and is_run(parent))
            place = url.rsplit("/", above)[0] if above else url
            _refuse_checkpoint(url, place, outer, found)


def check_content(url: str, data: bytes) -> None:
    """Refuse a run root that holds the manifest ``data``: then it is a checkpoint, whatever it is called.

    Raises:
        ConfigError: if the manifest is ours.
    """
    _refuse_checkpoint(url, url, url.rstrip("/").rpartition("/")[0], _Found(data))


@dataclass(frozen=True)
class _Found:
    """What lies in a directory that may be a checkpoint."""

    manifest: bytes | None = None
    files: Collection[str] = ()
    """Names of files in it."""
    in_a_run: bool = False
    """Whether it has the name of a checkpoint of this library, and lies in a run root."""


def _refuse_checkpoint(root: str, folder: str, outer: str, found: _Found) -> None:
    name = folder.replace("\\", "/").rstrip("/").rpartition("/")[2]
    step = paths.parse_checkpoint_name(name)
    ours, written = _step_in(found.manifest)
    if not ours:
        _refuse_no_checkpoint_of_ours(root, folder, outer, found)
        return
    if root != folder:
        raise ConfigError(
            f"the run root {root} lies inside a checkpoint, {folder}: retention would remove it with that. "
            f"The run root is {outer}; for another run choose a directory outside of it"
        )
    if step is None:
        shown = "<step>" if written is None else str(written)
        raise ConfigError(
            f"{root} is one checkpoint (of step {shown}), not a run root: move it to checkpoint-{shown} in a "
            f"directory of its own, pass that directory, and mgr.restore({shown})"
        )
    raise ConfigError(
        f"{root} is one checkpoint, not a run root: pass the directory that holds it, {outer}, and restore this one "
        f"with mgr.restore({step}); restore_latest() takes the newest. (If a run was saved inside it all the same, "
        "move its directories checkpoint-* to a directory of their own)"
    )


def _refuse_no_checkpoint_of_ours(root: str, folder: str, outer: str, found: _Found) -> None:
    """What has the name of one checkpoint, and the files of another library's, or a place in a run."""
    step = foreign.step_in_name(folder.replace("\\", "/").rstrip("/").rpartition("/")[2])
    if step is None:
        return
    kind, telling = foreign.kind_of(found.files)
    what = foreign.described(kind, min(telling, default=""))
    if what is None and not found.in_a_run:
        return
    if what is None:
        what = f"has the name of a checkpoint of the run in {outer}, and holds none"
    where = f"{root} is no run root: it" if root == folder else f"{root} is no run root: it lies in {folder}, which"
    danger = "Whoever rotates such directories would delete the run with it"
    instead = f"the run in {outer}" if found.in_a_run else f"for instance {outer}, or one of its own"
    taken_over = foreign.import_command(kind, folder, found.files, step)
    raise ConfigError(
        f"{where} {what}. {danger}. Choose another directory as the run root: {instead}"
        + (f"; {taken_over}" if taken_over else "")
        + ". (If a run was saved inside it all the same, move its directories checkpoint-* to a directory of their own)"
    )


def _inside_private(root: str, outer: str) -> ConfigError:
    return ConfigError(
        f"the run root {root} lies inside {paths.PRIVATE}, which belongs to the run in {outer}: what is there is "
        f"removed without asking. Pass {outer} for that run, or a directory outside of it for another one"
    )


def _step_in(data: bytes | None) -> tuple[bool, int | None]:
    """Whether a manifest is one of ours, damaged or not, and its step if it can be read."""
    if data is None:
        return False, None
    try:
        return True, parse_manifest(data, paths.MANIFEST).step
    except FormatVersionError:
        return True, None
    except CheckpointerError:
        return f'"{FORMAT}"'.encode() in data, None


def _local_manifest(folder: Path) -> bytes | None:
    """The manifest in a directory; ``None`` where there is none, or none that can be read."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    if not os.path.lexists(folder / paths.MANIFEST):
        return None
    try:
        with open(os.open(folder / paths.MANIFEST, flags), "rb") as file:  # a pipe must not make it wait
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return None
            return file.read(paths.MANIFEST_LIMIT + 1)
    except OSError:
        return None


def _local_files(folder: Path) -> list[str]:
    """The names of the files in a directory; none where it is not there, or may not be listed."""
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if not entry.is_dir()]
    except OSError:  # told by the first call that has to read there
        return []


def _refuse_what_is_no_directory(root: str) -> None:
    try:
        if not stat.S_ISDIR(os.stat(root).st_mode):
            raise ConfigError(f"the run root {root} is a file, and must be a directory")
    except FileNotFoundError:
        for place in (Path(root), *Path(root).parents):
            if place.is_symlink():
                raise ConfigError(
                    f"the run root {root} cannot be reached: {place} is a link to {os.readlink(place)}, which is not "
                    "there. Mount it, or make that directory"
                ) from None
            if os.path.lexists(place):
                return
    except NotADirectoryError:
        raise ConfigError(f"the run root {root} cannot be: a part of its path is a file, not a directory") from None
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ConfigError(f"the run root {root} cannot be reached: its links lead in a circle") from None
        # Whatever else keeps it from being looked at is told by the first call that has to read there.


def _is_checkpoint_name(name: str) -> bool:
    return paths.parse_checkpoint_name(name) is not None

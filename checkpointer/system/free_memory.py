"""How much memory this process may still take before the system, or a limit on its control group, ends it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_PROC, _GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def free_memory(proc: Path = _PROC, groups: Path = _GROUPS) -> int | None:
    """Bytes, counting the page cache, which the system gives up; ``None`` where the system does not say."""
    found = [_available(proc), *_left_in_groups(proc, groups)]
    return min((left for left in found if left is not None), default=None)


def _available(proc: Path) -> int | None:
    kib = _numbers(proc / "meminfo").get("MemAvailable:")
    return None if kib is None else kib << 10


def _left_in_groups(proc: Path, groups: Path) -> Iterator[int]:
    """What the group of this process, and each group above it, leaves. In a container the uppermost is its own."""
    try:
        lines = (proc / "self" / "cgroup").read_text("utf-8").splitlines()
    except (OSError, ValueError):  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        inside = PurePosixPath(path).relative_to("/") if path.startswith("/") else PurePosixPath()
        for folder in (inside, *inside.parents):
            if not controllers:
                yield from _left(groups / folder, "memory.max", "memory.current", "")
            elif "memory" in controllers.split(","):
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
                yield from _left(groups / "memory" / folder, *names)


def _left(group: Path, limit_name: str, used_name: str, prefix: str) -> Iterator[int]:
    try:
        limit = int((group / limit_name).read_text("ascii"))
        used = int((group / used_name).read_text("ascii"))
    except (OSError, ValueError):  # no such group here, or its limit is "max"
        return
    cached = _numbers(group / "memory.stat")
    yield limit - used + sum(cached.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))


def _numbers(path: Path) -> dict[str, int]:
    """The lines ``name number`` of a file."""
    try:
        lines = [line.split() for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError):
        return {}
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}

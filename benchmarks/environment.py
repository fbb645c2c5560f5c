"""What it was measured on, without the names of machines, users or folders."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

PACKAGES = ("torch", "safetensors", "numpy", "torch_checkpointing", "lightning", "accelerate")


def describe(folder: Path) -> dict[str, str]:
    """By what it is of: processor, memory, file system of ``folder``, versions."""
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch",
        **({"GPU": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "file system": _file_system(folder),
        "kernel": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "packages": ", ".join(f"{name} {version}" for name in PACKAGES if (version := _version(name))),
    }


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        return next((line.split(":")[1].strip() for line in file if line.startswith("model name")), platform.machine())


def _file_system(folder: Path) -> str:
    """Type of the mount that holds the folder: the longest mount point that is a prefix of it."""
    path = str(folder.resolve())
    best, kind = "", "unknown"
    for line in Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
        _, point, name, *_ = line.split()
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, name
    return kind


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""

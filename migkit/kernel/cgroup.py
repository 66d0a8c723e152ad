"""How much memory a process's control groups leave it, version 1 and 2."""

from __future__ import annotations

from pathlib import Path

_V1 = "memory.limit_in_bytes", "memory.usage_in_bytes"
_V2 = "memory.max", "memory.current"


def memory_left(pid: int) -> int | None:
    """Return the bytes that the memory cgroups of a process still allow, None for no limit."""
    left: int | None = None
    for folder, top, (limit_name, usage_name) in _groups(pid):
        while folder.is_relative_to(top):
            limit, usage = _number(folder / limit_name), _number(folder / usage_name)
            if limit is not None and usage is not None:
                here = max(limit - usage, 0)
                left = here if left is None else min(left, here)
            if folder == top:
                break
            folder = folder.parent  # noqa: PLW2901 — up to the root: each may have a limit
    return left


def _groups(pid: int) -> list[tuple[Path, Path, tuple[str, str]]]:
    """Return (the process's folder, the mount point, the files' names) for v1 and v2."""
    mounts: dict[str, Path] = {}
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, kind, options, *_ = line.split()
        if kind == "cgroup2":
            mounts[""] = Path(point)
        elif kind == "cgroup" and "memory" in options.split(","):
            mounts["memory"] = Path(point)
    found = []
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        key = "memory" if "memory" in controllers.split(",") else controllers
        if key in mounts:
            folder = mounts[key] / path.lstrip("/")
            found.append((folder, mounts[key], _V1 if key else _V2))
    return found


def _number(file: Path) -> int | None:
    """Read a number of bytes; None where there is no limit, or no such file."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    number = int(text) if text.isdigit() else None
    return None if number is None or number >= 1 << 62 else number

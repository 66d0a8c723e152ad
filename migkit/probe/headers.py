"""Find a kernel header tree that bcc can compile in, or make one.

bcc takes the running kernel's tree from /lib/modules. Our program dereferences no kernel
structure (tracepoint arguments come from tracefs), so any recent tree serves as well; bcc is
told where it is by BCC_KERNEL_SOURCE. Debian splits a tree in two, ``-common`` and one of
the architecture: merged by symlinks in our cache folder, they are one. Nothing is ever
written under /lib/modules.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path

from migkit.errors import CapabilityError

ENVIRONMENT = "BCC_KERNEL_SOURCE"
MODULES = Path("/lib/modules")
SOURCES = Path("/usr/src")
IKHEADERS = Path("/sys/kernel/kheaders.tar.xz")
REMEDY = "apt install linux-headers-amd64, or dnf install kernel-devel"

_HAND_WRITTEN = "include/linux/kconfig.h"
_GENERATED = "include/generated/autoconf.h"
_PARTS = ("include", "arch")


def kernel_headers() -> Path | None:
    """Return the tree to name in BCC_KERNEL_SOURCE, or None when bcc finds its own.

    Raises CapabilityError when there is none.
    """
    if ENVIRONMENT in os.environ:
        return Path(os.environ[ENVIRONMENT])
    if (MODULES / os.uname().release / "build").exists() or IKHEADERS.exists():
        return None
    for tree in _candidates():
        if not (tree / _GENERATED).exists():
            continue
        if (tree / _HAND_WRITTEN).exists():
            return tree
        common = _common_tree(tree)
        if common is not None:
            return _merged(common, tree)
    raise CapabilityError(f"no kernel headers in {MODULES} or {SOURCES}")


def _candidates() -> list[Path]:
    trees = [
        *SOURCES.glob("linux-headers-*"),
        *SOURCES.glob("kernels/*"),
        *MODULES.glob("*/build"),
    ]
    return sorted(trees, key=_version, reverse=True)


def _version(tree: Path) -> list[int]:
    name = tree.parent.name if tree.name == "build" else tree.name
    return [int(number) for number in re.findall(r"\d+", name)]


def _common_tree(tree: Path) -> Path | None:
    """Return the other half of a split tree: its Makefile includes that half's Makefile."""
    makefile = tree / "Makefile"
    if not makefile.is_file():
        return None
    found = re.search(r"^include (\S+)/Makefile$", makefile.read_text(), re.MULTILINE)
    common = Path(found[1]) if found else None
    return common if common is not None and (common / _HAND_WRITTEN).exists() else None


def _merged(common: Path, generated: Path) -> Path:
    """Return the merged tree from our cache, built there when it is missing or dangling.

    It is built aside and renamed, so that two processes can do it at the same time.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    target = cache / "migkit" / "headers" / generated.name
    if _complete(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=target.name + ".", dir=target.parent))
        try:
            for part in _PARTS:
                _merge([common / part, generated / part], aside / part)
            if target.exists():
                shutil.rmtree(target)
            aside.rename(target)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    except OSError as error:
        if not _complete(target):  # else another process was faster
            message = f"cannot merge {common} and {generated} into {target}: {error}"
            raise CapabilityError(message) from error
    return target


def _complete(tree: Path) -> bool:
    return (tree / _HAND_WRITTEN).exists() and (tree / _GENERATED).exists()


def _merge(sources: list[Path], target: Path) -> None:
    """Lay folders over each other by symlinks; the last one wins.

    A folder that only one of them has becomes one symlink: dozens instead of 20,000.
    """
    target.mkdir()
    for name in {entry.name for source in sources for entry in source.iterdir()}:
        entries = [source / name for source in sources if (source / name).exists()]
        if len(entries) > 1 and all(entry.is_dir() for entry in entries):
            _merge(entries, target / name)
        elif entries:
            (target / name).symlink_to(entries[-1].resolve())

"""What this machine can do, tried out: never guessed from a version or a uid."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from migkit.errors import CapabilityError
from migkit.kernel.memory import HUGE_PAGE_SIZES, PAGE_SIZE, RamBlock, huge_pages_free
from migkit.kernel.pagemap import Category, Pagemap
from migkit.kernel.userfaultfd import Feature, Register, Userfaultfd, supported_features

MIGRATION_FEATURES = (
    Feature.MISSING_SHMEM
    | Feature.MISSING_HUGETLBFS
    | Feature.THREAD_ID
    | Feature.EVENT_REMOVE
    | Feature.PAGEFAULT_FLAG_WP
    | Feature.WP_HUGETLBFS_SHMEM
    | Feature.WP_UNPOPULATED
    | Feature.WP_ASYNC
)
"""The userfaultfd features that a guest asks for."""


@dataclass(frozen=True)
class Check:
    """One thing that was tried: did it work, what was seen, what to do if it did not.

    Without a required one nothing runs; without another something less does.
    """

    name: str
    ok: bool
    outcome: str
    remedy: str
    required: bool = True


def run_checks(
    checks: tuple[tuple[str, Callable[[], str], str, bool], ...],
) -> Iterator[Check]:
    """Try each of (name, trial, remedy, required); a trial returns what it saw, or raises."""
    for name, trial, remedy, required in checks:
        try:
            yield Check(name, True, trial(), "", required)
        except (CapabilityError, OSError) as error:
            yield Check(name, False, str(error), remedy, required)


def kernel_checks() -> tuple[Check, ...]:
    """Try everything that a migration needs of the kernel."""
    return tuple(run_checks(_CHECKS))


def _userfaultfd() -> str:
    features = supported_features()
    missing = MIGRATION_FEATURES & ~features
    if missing:
        raise CapabilityError(f"this kernel lacks {missing!r}")
    return f"Linux {os.uname().release}, {len(features)} features"


def _kernel_mode_faults() -> str:
    Userfaultfd.create(MIGRATION_FEATURES).close()
    return "a guest's own system calls may wait for a page"


def _place() -> str:
    """Register, place, read back: the whole way of a page."""
    block = RamBlock.create("trial", 4 * PAGE_SIZE)
    uffd = Userfaultfd.create(MIGRATION_FEATURES, user_mode_only=True)
    source = RamBlock.create("page", PAGE_SIZE)
    try:
        source.pages[0] = 7
        uffd.register(block.address, block.size, Register.MISSING)
        uffd.copy(block.address, source.address, PAGE_SIZE)
        if block.read(0, 1) != b"\7":
            raise CapabilityError("a page that was placed does not read back")
    finally:
        uffd.close()
        block.close()
        source.close()
    return "a page was placed on a memfd and read back"


def _dirty_log() -> str:
    """Write one page of four and find just that one."""
    block = RamBlock.create("trial", 4 * PAGE_SIZE)
    uffd = Userfaultfd.create(MIGRATION_FEATURES, user_mode_only=True)
    try:
        block.pages[:] = 1
        uffd.register(block.address, block.size, Register.WP)
        uffd.write_protect(block.address, block.size)
        block.pages[2, 0] = 2
        with Pagemap(os.getpid()) as pagemap:
            found = pagemap.scan(block.address, block.size, Category.WRITTEN, protect=True)
        if [int(region["start"]) for region in found] != [block.address + 2 * PAGE_SIZE]:
            raise CapabilityError(f"one page was written, PAGEMAP_SCAN found {found}")
    finally:
        uffd.close()
        block.close()
    return "one written page was found, and no other"


def _huge_pages() -> str:
    size = HUGE_PAGE_SIZES[0]
    free = huge_pages_free(size)
    if not free:
        raise CapabilityError("no huge page of 2 MiB is free")
    return f"{free} huge pages of 2 MiB are free"


_REMEDY_KERNEL = "use Linux 6.7 or newer with CONFIG_USERFAULTFD"
_CHECKS: tuple[tuple[str, Callable[[], str], str, bool], ...] = (
    ("userfaultfd", _userfaultfd, _REMEDY_KERNEL, True),
    ("placing pages (UFFDIO_COPY)", _place, _REMEDY_KERNEL, True),
    ("dirty logging (PAGEMAP_SCAN, WP_ASYNC)", _dirty_log, _REMEDY_KERNEL, True),
    (
        "faults within system calls",
        _kernel_mode_faults,
        "run as root, or: sysctl vm.unprivileged_userfaultfd=1",
        False,
    ),
    (
        "huge pages",
        _huge_pages,
        "only for page_size=2MiB; as root: echo 512 > /proc/sys/vm/nr_hugepages",
        False,
    ),
)

"""Loading before post-copy, while no guest runs: pages are written, discards thrown away."""

from __future__ import annotations

import struct

import numpy as np

from migkit.errors import MigrationError, ProtocolError
from migkit.kernel.memory import PAGE_SIZE, RamBlock, memory_available
from migkit.migration import wire
from migkit.migration.engine import GuestParts
from migkit.migration.framing import runs_of
from migkit.migration.placing import HostPages, Placer
from migkit.migration.records import Pages
from migkit.migration.stats import Counter
from migkit.trace.emit import Tracer


def require_same(what: str, theirs: object, ours: object) -> None:
    """Raise :class:`MigrationError`, with both values, when the two sides differ."""
    if theirs != ours:
        raise MigrationError(f"{what}: the source has {theirs}, the destination has {ours}")


def require_same_blocks(blocks: tuple[wire.BlockLayout, ...], ours: wire.BlockLayout) -> None:
    """Compare the RAM that a stream announces with our one block."""
    names = ", ".join(block.name for block in blocks)
    require_same("RAM blocks", names, ours.name)
    require_same(f"size of RAM block {ours.name}", blocks[0].size, ours.size)
    require_same(f"page size of RAM block {ours.name}", blocks[0].page_size, ours.page_size)


def require_memory(guest: GuestParts) -> None:
    """Raise :class:`MigrationError` when the RAM to come would not fit, before any of it comes.

    The pages are charged to the guest's process, by whomever they are placed.
    """
    ram = guest.ram
    need = f"RAM of {ram.size >> 10} KiB will come from the source, the destination"
    if ram.page_size == PAGE_SIZE:
        left = memory_available(guest.pid)
        if left < ram.size:
            raise MigrationError(f"{need} has {left >> 10} KiB left")


class Loader:
    """Loads one RAM block."""

    def __init__(
        self,
        ram: RamBlock,
        placer: Placer,
        pages: HostPages,
        counters: memoryview,
        trace: Tracer,
    ) -> None:
        """Take the parts; ``pages`` makes host pages of what comes on the main channel."""
        self._ram = ram
        self._placer = placer
        self._pages = pages
        self._counters = counters
        self._trace = trace

    def write(self, pages: Pages) -> None:
        """Load pages before post-copy, while no guest runs."""
        zero = pages.address == 0
        source = self._pages
        if source.huge:
            for page, data in source.assemble(pages):
                self._placer.write(np.array((page,)), data)
                self._loaded(1, zero=data is None)
        else:
            numbers = pages.offsets // wire.TARGET_PAGE
            self._placer.write(numbers, None if zero else source.strip(pages))
            self._loaded(len(numbers), zero=zero)
        if self._trace.on("ram_load_range"):
            self._trace_load(pages)

    def _loaded(self, count: int, *, zero: bool) -> None:
        self._counters[Counter.PRECOPY_PAGES] += count
        if zero:
            self._counters[Counter.ZERO_PAGES] += count

    def _trace_load(self, pages: Pages) -> None:
        zero = pages.address == 0
        for first, count in runs_of(pages.offsets // wire.TARGET_PAGE):
            self._trace.ram_load_range(
                self._ram.name, first * wire.TARGET_PAGE, count * wire.TARGET_PAGE, zero
            )

    def discard(self, data: bytes) -> None:
        """Carry out a discard command; raises :class:`ProtocolError` for one that is malformed."""
        trace = self._trace
        name_end = 2 + data[1] if len(data) > 1 else 0
        ranges = data[name_end + 1 :]
        if len(data) < 3 or data[0] != 0 or len(ranges) % 16 or len(ranges) > 16 * 12:
            raise ProtocolError(f"a discard of {len(data)} bytes, version {data[:1].hex()}")
        name = data[2:name_end].decode(errors="replace")
        require_same("RAM block to discard from", name, self._ram.name)
        trace.loadvm_postcopy_ram_handle_discard_header(name, len(ranges))
        for start, length in struct.iter_unpack(">QQ", ranges):
            self._placer.discard(start, length)
            self._counters[Counter.DISCARDED_PAGES] += length // self._ram.page_size
            trace.ram_discard_range(name, start, length)
        trace.loadvm_postcopy_ram_handle_discard_end()

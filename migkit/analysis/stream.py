"""A migration stream, out of a file, as a frame: ``migkit.stream("stream.xz")``.

The rows lie one behind the other without a gap, so their bytes add up to the file's. Pages of one
kind that follow each other, in the stream and in their RAM block, are one row.
"""

from __future__ import annotations

import dataclasses
import struct
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from migkit.analysis import schema
from migkit.analysis.blocktime import union
from migkit.errors import OptionError, ProtocolError, TraceWarning
from migkit.migration.records import Pages
from migkit.migration.stream import (
    CommandReceived,
    Configuration,
    EndOfStream,
    Header,
    RamSetup,
    SectionBegins,
    SectionEnds,
)
from migkit.migration.streamfile import (
    Description,
    DeviceBytes,
    EncodedPage,
    FileDecoder,
    Piece,
    RamMark,
)
from migkit.migration.wire import TARGET_PAGE, Command, Section
from migkit.trace.loglines import open_plain

if TYPE_CHECKING:
    import os


_MIB = 1 << 20


@dataclass(frozen=True)
class Stream:
    """A decoded stream: ``frame`` has its pieces, ``schema.describe("stream")`` their columns."""

    path: Path
    frame: pd.DataFrame
    blocks: dict[str, int]
    """The RAM blocks that the source named, and their sizes in bytes."""
    described: dict[str, int]
    """The devices whose size differs from what the stream's own description says, by how much."""
    is_described: bool
    """There is such a description: pre-copy has one, post-copy has none."""
    warnings: tuple[str, ...]

    def summary(self) -> StreamSummary:
        """Return its figures: ``print(stream.summary())``, or its ``to_dict()``."""
        return _summarize(self)


@dataclass(frozen=True)
class StreamSummary:
    """The figures of a stream; ``bytes`` are by what they are for and add up to ``total_bytes``."""

    path: str
    total_bytes: int
    machine: str
    postcopy: bool
    """The destination was told to run the guest while pages were still to come."""
    ended: bool
    bytes: dict[str, int]
    pages: dict[Any, dict[str, int]]
    """Pages by RAM block, then by flag."""
    absent: dict[str, int]
    """Pages by RAM block that a stream which has ended never had: they went another way."""
    block_bytes: dict[str, int]
    commands: dict[str, int]
    device_bytes: dict[str, int]
    devices_checked: bool | None
    """Whether all sizes of devices are those of the stream's description; None without one."""
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers, fit for JSON."""
        return {**dataclasses.asdict(self), "warnings": list(self.warnings)}

    def __str__(self) -> str:
        kind = "with post-copy" if self.postcopy else "pre-copy"
        end = "complete" if self.ended else "NOT COMPLETE"
        size = f"{self.total_bytes / _MIB:,.1f} MiB"
        lines = [f"{'stream':<13}{self.machine or 'no machine named'}, {kind}, {size}, {end}"]
        parts = ", ".join(f"{name} {n:,}" for name, n in self.bytes.items())
        lines.append(f"{'bytes':<13}{parts}")
        for block, n_bytes in self.block_bytes.items():
            counts = self.pages.get(block, {})
            came = ", ".join(f"{flag} {n:,}" for flag, n in counts.items()) or "none"
            lines.append(f"{'pages':<13}{block} ({n_bytes // TARGET_PAGE:,}): {came}")
        if self.absent:
            which = ", ".join(f"{count:,} of {block}" for block, count in self.absent.items())
            lines.append(
                f"{'not in it':<13}{which}: multifd and postcopy-preempt have channels of their "
                "own for pages, x-ignore-shared leaves shared ones out"
            )
        commands = ", ".join(f"{n} {name}" for name, n in self.commands.items())
        lines.append(f"{'commands':<13}{commands or 'none'}")
        largest = sorted(self.device_bytes.items(), key=lambda item: -item[1])
        names = ", ".join(f"{name} {n:,}" for name, n in largest[:5])
        more = f" and {len(largest) - 5} more" if len(largest) > 5 else ""
        lines.append(f"{'devices':<13}{names or 'none'}{more}")
        if self.devices_checked is not None:
            agree = "as the stream describes them" if self.devices_checked else "NOT as described"
            lines.append(f"{'':<13}their sizes are {agree}")
        lines += [f"{'warning':<13}{text}" for text in self.warnings]
        return "\n".join(lines)


def stream(path: str | os.PathLike[str], progress: Callable[[int], None] | None = None) -> Stream:
    """Decode a migration stream, ours or QEMU's, .xz or .gz as they are.

    A stream that is cut off, or goes on in a way that we do not understand, is decoded up to
    there: the last row is the rest, and a TraceWarning says why. ``progress`` is told how many
    bytes were decoded since it was last told. Raises ProtocolError for what is no stream.
    """
    rows = _Rows()
    decoder = FileDecoder()
    texts = []
    try:
        with open_plain(path) as file:
            try:
                for piece in decoder.pieces(file):
                    rows.take(piece, decoder)
                    if progress:
                        progress(piece.end - piece.offset)
            except ProtocolError as error:
                if not rows.end:
                    raise
                texts.append(str(error))
            rest = decoder.buffer.offset - rows.end + decoder.buffer.tail - decoder.buffer.head
            rest += _count_rest(file)
    except OSError as error:
        raise OptionError(f"{path}: {error.strerror or error}") from error
    except EOFError:
        rest = 0
        texts.append("the compressed file is cut off")
    if not rows.end:
        raise ProtocolError(f"{path} ends within the header of a stream")
    if rest:
        texts = texts or [f"the stream is cut off within what begins at {rows.end}"]
        rows.add(rows.end, rest, "undecoded", detail=texts[-1])
    elif not rows.ended:
        texts.append("the stream is cut off: it has no end")
    for text in texts:
        warnings.warn(f"{path}: {text}", TraceWarning, stacklevel=2)
    return Stream(
        path=Path(path),
        frame=rows.frame(),
        blocks=rows.blocks,
        described=rows.differences(),
        is_described=rows.described is not None,
        warnings=tuple(texts),
    )


def _absent(frame: pd.DataFrame, blocks: Mapping[str, int]) -> dict[str, int]:
    """Return how many pages of each RAM block are never sent, where there are such."""
    moved = frame[frame["flags"].isin(["page", "zero", "xbzrle", "compressed"])]
    missing = {}
    for block, n_bytes in blocks.items():
        mine = moved[moved["block"] == block]
        sent = union(mine["start"].to_numpy(np.int64), mine["end"].to_numpy(np.int64))
        missing[block] = (n_bytes - int((sent[:, 1] - sent[:, 0]).sum())) // TARGET_PAGE
    return {block: count for block, count in missing.items() if count}


def _count_rest(file: IO[bytes]) -> int:
    """Return how many bytes were not read."""
    count = 0
    while data := file.read(_MIB):
        count += len(data)
    return count


@dataclass
class _Rows:
    """Collects pieces: pages as arrays, a row a run, everything else as single rows."""

    single: list[dict[str, object]] = field(default_factory=list)
    runs: list[tuple[Any, ...]] = field(default_factory=list)
    blocks: dict[str, int] = field(default_factory=dict)
    devices: dict[tuple[str, int], int] = field(default_factory=dict)
    described: dict[tuple[str, int], int] | None = None
    end: int = 0
    ended: bool = False
    section: str = ""
    section_id: int = 0
    device: str = ""

    def add(self, offset: int, n_bytes: int, section: str, **columns: object) -> None:
        self.single.append({"offset": offset, "bytes": n_bytes, "section": section, **columns})
        self.end = offset + n_bytes

    def take(self, piece: Piece, decoder: FileDecoder) -> None:
        """Take one piece."""
        event = piece.event
        if isinstance(event, Pages):
            self._take_pages(piece, event)
            return
        columns = self._columns(event, decoder)
        section = str(columns.pop("section", self.section))
        self.add(
            piece.offset, piece.end - piece.offset, section, packaged=piece.packaged, **columns
        )

    def _take_pages(self, piece: Piece, pages: Pages) -> None:
        """Cut a batch into runs."""
        count = len(pages.offsets)
        width = (piece.end - piece.offset) // count
        breaks = np.flatnonzero(np.diff(pages.offsets) != TARGET_PAGE) + 1
        first = np.concatenate([[0], breaks])
        counts = np.diff(np.append(first, count))
        what = (pages.block, "page" if pages.address else "zero", piece.packaged,
                self.section, self.section_id)  # fmt: skip
        offsets = piece.offset + first * width
        self.runs.append((what, offsets, counts * width, pages.offsets[first], counts))
        self.end = piece.end

    def _columns(self, event: object, decoder: FileDecoder) -> dict[str, object]:
        """Return what a piece that is no batch of pages has in its row."""
        columns: dict[str, object]
        match event:
            case Header(version):
                columns = {"section": "header", "detail": f"version {version}"}
            case Configuration(machine):
                columns = {"section": "configuration", "detail": machine}
            case CommandReceived(command, data):
                columns = {"section": "command", "command": command.name, **_command(command, data)}
            case SectionBegins(kind, section_id, name):
                self.section, self.section_id, self.device = kind.name.lower(), section_id, name
                columns = {**self._here(), "flags": "head"}
            case SectionEnds(section_id):
                columns = {"section": "footer", "section_id": section_id, "device": self.device}
            case RamSetup(blocks):
                self.blocks |= {block.name: block.size for block in blocks}
                sizes = ", ".join(f"{block.name} {block.size:#x}" for block in blocks)
                columns = {**self._here(), "flags": "mem_size", "detail": sizes}
            case RamMark(flag):
                columns = {**self._here(), "flags": flag}
            case EncodedPage(block, offset, flag):
                end = offset + TARGET_PAGE
                columns = {**self._here(), "block": block, "start": offset, "end": end, "pages": 1,
                        "flags": flag}  # fmt: skip
            case DeviceBytes(_, n_bytes):
                self.devices[decoder.instances[self.section_id]] = n_bytes
                columns = {**self._here(), "flags": "state"}
            case Description(sizes):
                self.described = sizes
                columns = {"section": Section.VMDESCRIPTION.name.lower()}
            case EndOfStream():
                self.ended = True
                columns = {"section": "eof"}
            case _:
                raise TypeError(event)
        return columns

    def _here(self) -> dict[str, object]:
        return {"section_id": self.section_id, "device": self.device}

    def differences(self) -> dict[str, int]:
        """Return by how many bytes devices differ from their description."""
        described = self.described or {}
        return {
            f"{name} {instance}": n_bytes - described[name, instance]
            for (name, instance), n_bytes in self.devices.items()
            if described.get((name, instance), n_bytes) != n_bytes
        }

    def frame(self) -> pd.DataFrame:
        """Return all rows in the stream's order."""
        names = list(schema.table("stream").columns)
        columns: dict[str, list[object]] = {
            name: [row.get(name) for row in self.single] for name in names
        }
        columns["packaged"] = [bool(packaged) for packaged in columns["packaged"]]
        columns["detail"] = [text or "" for text in columns["detail"]]
        parts = [schema.frame("stream", columns)]  # type: ignore[arg-type]
        if self.runs:
            parts.append(_frame_of_runs(self.runs))
        return pd.concat(parts, ignore_index=True).sort_values(
            "offset", kind="stable", ignore_index=True
        )


def _frame_of_runs(runs: list[tuple[Any, ...]]) -> pd.DataFrame:
    """Return runs of pages as rows; a run that was cut by the end of a batch is one again."""
    kinds = list(dict.fromkeys(run[0] for run in runs))
    codes = np.repeat([kinds.index(run[0]) for run in runs], [len(run[1]) for run in runs])
    offset, n_bytes, start, pages = (np.concatenate([run[i] for run in runs]) for i in range(1, 5))
    goes_on = (codes[1:] == codes[:-1]) & (start[1:] == start[:-1] + pages[:-1] * TARGET_PAGE)
    goes_on &= offset[1:] == offset[:-1] + n_bytes[:-1]
    first = np.concatenate([[0], np.flatnonzero(~goes_on) + 1])
    n_bytes, pages = np.add.reduceat(n_bytes, first), np.add.reduceat(pages, first)
    offset, start, codes = offset[first], start[first], codes[first]

    def of_kind(index: int) -> list[object]:
        return [kinds[code][index] for code in codes.tolist()]

    return schema.frame(
        "stream",
        {
            "offset": offset, "bytes": n_bytes, "section": of_kind(3), "section_id": of_kind(4),
            "device": ["ram"] * len(offset), "command": [None] * len(offset), "block": of_kind(0),
            "start": start, "end": start + pages * TARGET_PAGE, "pages": pages,
            "flags": of_kind(1), "packaged": of_kind(2), "detail": [""] * len(offset),
        },
    )  # fmt: skip


def _command(command: Command, data: bytes) -> dict[str, object]:
    """Return what a command says."""
    match command:
        case Command.PING:
            return {"detail": f"{struct.unpack('>I', data)[0]:#x}"}
        case Command.PACKAGED:
            return {"detail": f"{struct.unpack('>I', data)[0]} bytes follow"}
        case Command.POSTCOPY_ADVISE if len(data) == 16:
            summary, page = struct.unpack(">QQ", data)
            return {"detail": f"page sizes {summary:#x}, target page {page:#x}"}
        case Command.RECV_BITMAP:
            return {"block": data[1:].decode(errors="replace")}
        case Command.POSTCOPY_RAM_DISCARD if len(data) > 2:
            length = data[1]
            name, ranges = data[2 : 2 + length], data[3 + length :]
            words = struct.unpack(f">{len(ranges) // 8}Q", ranges[: len(ranges) // 8 * 8])
            pairs = list(zip(words[::2], words[1::2], strict=False))
            text = ", ".join(f"{start:#x}+{size:#x}" for start, size in pairs)
            return {
                "block": name.decode(errors="replace"),
                "pages": sum(size for _, size in pairs) // TARGET_PAGE,
                "detail": text,
            }
    return {}


def _summarize(stream: Stream) -> StreamSummary:
    frame = stream.frame
    section, flags = frame["section"], frame["flags"]
    purposes = {
        "data pages": flags.isin(["page", "xbzrle", "compressed"]),
        "zero pages": flags == "zero",
        "commands": section == "command",
        "device state": flags == "state",
        "description": section == "vmdescription",
        "undecoded": section == "undecoded",
    }
    n_bytes = {name: int(frame.loc[rows, "bytes"].sum()) for name, rows in purposes.items()}
    n_bytes["framing"] = int(frame["bytes"].sum()) - sum(n_bytes.values())
    moved = frame[flags.isin(["page", "zero", "xbzrle", "compressed"])]
    pages = {
        block: {
            str(flag): int(count)
            for flag, count in mine.groupby("flags", observed=True)["pages"].sum().items()
        }
        for block, mine in moved.groupby("block")
    }
    devices = frame[purposes["device state"]].groupby("device", observed=True)["bytes"].sum()
    commands = frame["command"].value_counts(sort=False)
    machines = frame.loc[section == "configuration", "detail"].tolist()
    return StreamSummary(
        path=str(stream.path),
        total_bytes=int(frame["bytes"].sum()),
        machine=str(machines[0]) if machines else "",
        postcopy=bool((frame["command"] == "POSTCOPY_RUN").any()),
        ended=bool((section == "eof").any()),
        bytes={name: count for name, count in n_bytes.items() if count},
        pages=pages,
        absent=_absent(frame, stream.blocks) if (section == "eof").any() else {},
        block_bytes=stream.blocks,
        commands={str(name): int(count) for name, count in commands.items() if count},
        device_bytes={str(name): int(count) for name, count in devices.items()},
        devices_checked=not stream.described if stream.is_described else None,
        warnings=stream.warnings,
    )

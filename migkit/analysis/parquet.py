"""Traces of any size as one Parquet file of events, in memory for a piece of them at a time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from migkit.analysis import schema
from migkit.analysis.events import frame_of_pieces
from migkit.trace.simpletrace import read_pieces

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from migkit.trace.registry import Registry

_NAME = pa.dictionary(pa.int32(), pa.string())
_SCHEMA = pa.schema(
    {
        "ts_ns": pa.int64(), "process": _NAME, "tid": pa.int64(), "event": _NAME,
        "original": _NAME, "args": pa.large_string(),
    }
)  # fmt: skip


def write_events(
    traces: Mapping[str, str | os.PathLike[str]],
    target: str | os.PathLike[str],
    registry: Registry | None = None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write the events of simpletrace files, by process, as Parquet; return how many there are.

    The columns are those of ``schema.describe("events")``; rows are by process, then in the order
    of its file, by time only within some 100,000. A file that is there is replaced, but only by a
    whole one. ``progress`` is told how many events were written since it was last told.
    """
    path = Path(target)
    temporary = path.with_name(f".{path.name}.part")
    count = 0
    try:
        with pq.ParquetWriter(temporary, _SCHEMA, compression="zstd") as writer:
            for process, trace in traces.items():
                for piece in read_pieces(trace, registry):
                    frame = frame_of_pieces([(process, piece)])
                    schema.check(frame, "events")
                    table = pa.Table.from_pandas(frame, preserve_index=False)
                    writer.write_table(table.replace_schema_metadata().cast(_SCHEMA))
                    count += len(frame)
                    if progress:
                        progress(len(frame))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return count

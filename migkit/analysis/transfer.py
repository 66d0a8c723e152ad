"""How each page of the guest came: in a round of pre-copy, unasked, asked for, prefetched.

Ours says it at the source: every run of pages that went to a socket, every requested page. QEMU's
events of the source do not; there the destination's placed pages and requests tell it, for
post-copy only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from migkit.analysis import schema
from migkit.analysis.join import take

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from migkit.analysis.join import Ints
    from migkit.trace.simpletrace import Trace

_PRECOPY, _BACKGROUND, _PREFETCHED, _REQUESTED = range(4)
# The source keeps its background batches short, and close to the last request, for so long.
_NEAR_NS = 5_000_000


def transfer_frame(source: Trace, page_size: int, origin_ns: int) -> pd.DataFrame:
    """Return what the source sent, a row a run of pages; ``schema.describe("transfer")``."""
    ranges = source["ram_save_range"]
    alone = source["postcopy_preempt_send_host_page"]
    asked = source["migrate_handle_rp_req_pages"]
    asked = asked[np.argsort(asked["ts_ns"], kind="stable")]
    ts, page = _ints(ranges["ts_ns"]), _ints(ranges["offset"]) // page_size
    switch = source["postcopy_start_set_run"]["ts_ns"]
    postcopy = ts >= _ints(switch)[0] if len(switch) else np.zeros(len(ts), np.bool_)
    latest = np.searchsorted(_ints(asked["ts_ns"]), ts, "right") - 1
    since = ts - take(_ints(asked["ts_ns"]), latest)
    behind = page - take(_ints(asked["start"]) // page_size, latest)
    near = (latest >= 0) & (since < _NEAR_NS) & (behind > 0)
    how = np.select([~postcopy, near], [_PRECOPY, _PREFETCHED], _BACKGROUND)
    return _frame(
        ts=np.concatenate([ts, _ints(alone["ts_ns"])]),
        block=np.concatenate([ranges["rbname"], alone["str"]]),
        page=np.concatenate([page, _ints(alone["offset"])]),
        pages=np.concatenate([_ints(ranges["len"]) // page_size, np.ones(len(alone), np.int64)]),
        how=np.concatenate([how, np.full(len(alone), _REQUESTED)]),
        zero=np.concatenate([_ints(ranges["kind"]), np.full(len(alone), -1)]),
        rounds=source["ram_save_round"],
        page_size=page_size,
        origin_ns=origin_ns,
    )


def placed_frame(
    destination: Trace, page_size: int, origin_ns: int, blocks: Sequence[Mapping[str, Any]]
) -> pd.DataFrame:
    """Return what the destination placed in post-copy, as QEMU's events tell it.

    The frame of :func:`transfer_frame`, a row a page; ``blocks`` are the RAM blocks that are
    known: ``name``, ``address`` where they are mapped, ``size``, bytes.
    """
    data, zero = destination["postcopy_place_page"], destination["postcopy_place_page_zero"]
    ts = np.concatenate([_ints(data["ts_ns"]), _ints(zero["ts_ns"])])
    address = np.concatenate([_ints(data["host_addr"]), _ints(zero["host_addr"])])
    asked = _ints(destination["postcopy_page_req_add"]["addr"])
    block, base = _blocks_of(address, blocks)
    return _frame(
        ts=ts,
        block=block,
        page=(address - base) // page_size,
        pages=np.ones(len(ts), np.int64),
        how=np.where(np.isin(address, asked), _REQUESTED, _BACKGROUND),
        zero=np.repeat([0, 1], [len(data), len(zero)]),
        rounds=destination["ram_save_round"],
        page_size=page_size,
        origin_ns=origin_ns,
    )


def _blocks_of(
    address: Ints, blocks: Sequence[Mapping[str, Any]]
) -> tuple[npt.NDArray[np.object_], Ints]:
    """Return the RAM block that each address is in and where that begins; '' and 0 if unknown."""
    names, bases = np.full(len(address), "", object), np.zeros(len(address), np.int64)
    for block in blocks:
        begin = int(block["address"])
        inside = (address >= begin) & (address < begin + int(block["size"]))
        names[inside], bases[inside] = block["name"], begin
    return names, bases


def totals(transfer: pd.DataFrame) -> pd.DataFrame:
    """Return pages and bytes by how they came.

    Index ``how``; int64 ``pages``, ``zero_pages``, ``bytes``; float64 ``first_s``, ``last_s``.
    """
    zero = transfer["pages"].where(transfer["zero"].fillna(value=False).astype(bool), 0)
    grouped = transfer.assign(zero_pages=zero).groupby("how", observed=True)
    return grouped.agg(
        pages=("pages", "sum"), zero_pages=("zero_pages", "sum"), bytes=("bytes", "sum"),
        first_s=("time_s", "min"), last_s=("time_s", "max"),
    )  # fmt: skip


def over_time(transfer: pd.DataFrame, n_bins: int = 100) -> pd.DataFrame:
    """Return bytes by kind over time.

    Index ``time_s`` (a bin's begin, s); a float64 column of MiB a second for each value of
    ``how``, zero pages left out.
    """
    hows = list(transfer["how"].cat.categories)
    if transfer.empty:
        return pd.DataFrame(columns=hows, index=pd.Index([], name="time_s"), dtype="float64")
    first, last = float(transfer["time_s"].min()), float(transfer["time_s"].max())
    edges = np.linspace(first, max(last, first + 1e-6), n_bins + 1)
    width_s = edges[1] - edges[0]
    data = {}
    for how in hows:
        mine = transfer[transfer["how"] == how]
        counts, _ = np.histogram(mine["time_s"], edges, weights=mine["bytes"])
        data[how] = counts / (1 << 20) / width_s
    return pd.DataFrame(data, index=pd.Index(edges[:-1], name="time_s"))


def _frame(
    *, ts: Ints, block: npt.NDArray[np.object_], page: Ints, pages: Ints, how: Ints, zero: Ints,
    rounds: np.ndarray, page_size: int, origin_ns: int,
) -> pd.DataFrame:  # fmt: skip
    """Return rows in order of time as the table of the schema; ``zero`` is -1 where unknown."""
    order = np.argsort(ts, kind="stable")
    ts, page, pages, how, zero = (a[order] for a in (ts, page, pages, how, zero))
    block = block[order]
    index = np.searchsorted(_ints(rounds["ts_ns"]), ts, "right") - 1
    number = take(_ints(rounds["round"]), index)
    kinds = pd.CategoricalDtype(list(schema.table("transfer").columns["how"].choices))
    return schema.frame(
        "transfer",
        {
            "ts_ns": ts,
            "time_s": (ts - origin_ns) / 1e9,
            "how": pd.Categorical.from_codes(how, dtype=kinds),
            "round": pd.arrays.IntegerArray(number, (number == 0) | (how != _PRECOPY)),
            "block": block,
            "page": page,
            "pages": pages,
            "zero": pd.arrays.BooleanArray(zero == 1, zero < 0),
            "bytes": np.where(zero == 1, 0, pages * page_size),
        },
    )


def _ints(values: np.ndarray) -> Ints:
    return values.astype(np.int64)

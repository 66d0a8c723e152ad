"""The columns of the frames that are derived from others: the analyses of a run.

:mod:`migkit.analysis.schema` holds these tables with all others, documents them and checks them.
"""

from __future__ import annotations

from migkit.analysis.column import SIDES, Column, Table

_SIDE = Column("category", "the process: source or destination", SIDES)
_TS = Column("int64", "when, ns")
_TIME = Column("float64", "when, seconds since the run's first event")

DERIVED: dict[str, Table] = {
    "blocktime": Table(
        "one row a thread of the guest that faulted, then one for all of them at once",
        {
            "who": Column(
                "category",
                "thread: that thread stood still on faults; all at once: every one of these "
                "threads did at the same time, QEMU's postcopy-blocktime",
                ("thread", "all at once"),
            ),
            "tid": Column("Int64", "the thread; empty for all at once"),
            "faults": Column("int64", "faults that it waited for; of all threads for all at once"),
            "blocktime_ms": Column(
                "float64",
                "how long it stood still; waits at the same time count once, one that never ended "
                "until the run's last event, ms",
            ),
            "longest_ms": Column("float64", "the longest time without a break, ms"),
            "mean_latency_us": Column("float64", "mean latency of its faults, us"),
        },
    ),
    "latency_distribution": Table(
        "one row a bucket of QEMU's postcopy-latency-dist, from 1 us on, each twice as wide",
        {
            "from_us": Column("float64", "shortest latency, us; the first bucket begins at 0"),
            "to_us": Column("float64", "longest latency, this excluded, us; the last has no end"),
            "faults": Column(
                "int64", "faults that waited so long from fault to running (else read to placed)"
            ),
            "share": Column("float64", "part of all faults that waited, 0 to 1"),
            "mean_us": Column("float64", "their exact mean, us"),
            "engine_faults": Column(
                "int64", "faults that took so long from read to placed, as QEMU counts them"
            ),
        },
    ),
    "critical_path": Table(
        "one row a place in the distribution of latency: which stage takes most of it there",
        {
            "at": Column("str", "mean, p50, p90 or p99"),
            "latency_us": Column("float64", "latency there, us"),
            "stage": Column("str", "the stage that takes most, see faults; empty if none is known"),
            "stage_us": Column("float64", "how long it takes, us"),
            "share": Column("float64", "its part of the latency, 0 to 1"),
            "next_stage": Column("str", "the stage that takes most after it"),
            "next_us": Column("float64", "how long that takes, us"),
        },
    ),
    "rounds": Table(
        "one row a round of pre-copy",
        {
            "round": Column("int64", "counts from 1"),
            "start_ns": Column("int64", "begin, ns"),
            "duration_ms": Column("float64", "ms"),
            "dirty_pages": Column(
                "Int64", "pages to be sent when it began; of a QEMU those newly found dirty"
            ),
            "pages": Column("Int64", "pages that were sent"),
            "bytes": Column("Int64", "of those, the content of pages that were not zero, bytes"),
            "mib_s": Column("float64", "that content, MiB a second"),
            "left_pages": Column("Int64", "pages found dirty after it"),
            "left_share": Column(
                "float64", "left_pages as part of dirty_pages; pre-copy converges well below 1"
            ),
        },
    ),
    "transfer": Table(
        "one row a run of pages that was sent; of a QEMU, a page that was placed in post-copy",
        {
            "ts_ns": _TS,
            "time_s": _TIME,
            "how": Column(
                "category",
                "precopy: in a round; background: in post-copy, unasked; prefetched: unasked, from "
                "behind a page that was requested at most 5 ms before; requested: asked for",
                ("precopy", "background", "prefetched", "requested"),
            ),
            "round": Column("Int64", "the round of pre-copy"),
            "block": Column("str", "the RAM block; empty if the trace does not tell it"),
            "page": Column("int64", "the first host page; of no known block its address by size"),
            "pages": Column("int64", "how many pages"),
            "zero": Column("boolean", "they are zero; empty where the source did not say"),
            "bytes": Column("int64", "content that went over the wire: none of zero pages, bytes"),
        },
    ),
    "requests": Table(
        "one row a request for a missing page, in order",
        {
            "ts_ns": Column("int64", "when the destination sent it, ns"),
            "time_s": _TIME,
            "block": Column("str", "the RAM block"),
            "page": Column("int64", "host page"),
            "threads": Column("int64", "threads that waited for it"),
            "wasted": Column(
                "boolean", "the page was under way already; empty without the source's trace"
            ),
            "answered": Column("boolean", "the page came"),
            "wait_us": Column("float64", "from the request to the page's placing, us"),
            "limited_us": Column(
                "float64",
                "how much of the time from its arrival at the source until the page was sent the "
                "source was limited, us",
            ),
            "stalled": Column("boolean", "that was 5 ms or more"),
            "outage_us": Column("float64", "how much of the wait fell into an outage, us"),
        },
    ),
    "states": Table(
        "one row a state that a side entered, in order of time",
        {
            "ts_ns": _TS,
            "time_s": _TIME,
            "side": _SIDE,
            "old_state": Column("str", "the state before; empty if the trace begins later"),
            "new_state": Column("str", "the state entered"),
            "duration_ms": Column("float64", "how long it lasted: to the next, or the last event"),
            "legal": Column("bool", "the table of states has this transition"),
        },
    ),
    "working_set": Table(
        "one row a span of time: between two scans in pre-copy, a 50th of post-copy",
        {
            "kind": Column(
                "category",
                "written: pages found dirty by the scan at the end of the span; touched: pages "
                "on which the destination guest first faulted in the span",
                ("written", "touched"),
            ),
            "start_ns": Column("int64", "begin, ns"),
            "end_ns": Column("int64", "end, ns"),
            "time_s": Column("float64", "end, seconds since the run's first event"),
            "pages": Column("int64", "distinct host pages"),
            "bytes": Column("int64", "their size, bytes"),
            "pages_s": Column("float64", "pages a second; empty for a span of no length"),
            "total_pages": Column("Int64", "touched: distinct pages from the first span on"),
        },
    ),
    "rates": Table(
        "one row an interval between two samples",
        {
            "time_s": Column("float64", "its middle, seconds since the run's first event"),
            "source_steps_s": Column("float64", "steps a second of the source guest while it ran"),
            "destination_steps_s": Column("float64", "the same at the destination"),
            "precopy_mib_s": Column("float64", "guest RAM that came before post-copy, MiB/s"),
            "background_mib_s": Column("float64", "that came in post-copy, unasked, MiB/s"),
            "requested_mib_s": Column("float64", "that came in post-copy, asked for, MiB/s"),
        },
    ),
    "violations": Table(
        "one row a rule that the run breaks; none when all is well",
        {
            "rule": Column("str", "name of the rule, see migkit.analysis.rules"),
            "side": Column(
                "category", "where: source, destination or both", (*SIDES, "both")
            ),
            "ts_ns": Column("Int64", "when first, ns; empty where it is about the whole run"),
            "time_s": Column("float64", "the same, seconds since the run's first event"),
            "count": Column("int64", "how often"),
            "message": Column("str", "what was expected and what is there, with examples"),
        },
    ),
    "comparison": Table(
        "one row a figure and run, or group of runs",
        {
            "figure": Column("str", "what was measured"),
            "unit": Column("str", "of value"),
            "run": Column("str", "the run's or group's name"),
            "runs": Column("int64", "how many runs are in it"),
            "value": Column("float64", "the figure; of several runs the mean, of faults of all"),
            "ratio": Column("float64", "value as a multiple of the first run's"),
            "low": Column("float64", "lower end of the ratio's bootstrap 95 % interval, or empty"),
            "high": Column("float64", "its upper end"),
        },
    ),
}  # fmt: skip
"""The derived frames by name."""

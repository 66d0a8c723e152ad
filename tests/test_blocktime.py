"""How long the guest stood still on faults, by hand-made faults and against brute force."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migkit.analysis import schema
from migkit.analysis.blocktime import (
    BUCKETS,
    blocktime_frame,
    distribution_frame,
    query_migrate,
    standstill,
    union,
)

SPANS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 12)), max_size=12)


BLANK = {"int64": 0, "str": "", "float64": np.nan, "Int64": pd.NA, "boolean": pd.NA,
         "category": None}  # fmt: skip


def faults(*waits, resolution="requested"):
    """Faults of (tid, begin us, latency us); read 1 us after the begin, placed 1 us earlier."""
    tids, begin, latency = zip(*waits, strict=True) if waits else ((), (), ())
    begin_ns = np.array(begin, np.int64) * 1000
    known = np.array(latency, np.float64)
    end_ns = begin_ns + np.nan_to_num(known * 1000).astype(np.int64)
    columns = schema.table("faults").columns
    data = {name: [BLANK[column.dtype]] * len(tids) for name, column in columns.items()}
    data |= {
        "ts_ns": begin_ns,
        "tid": list(tids),
        "resolution": [resolution] * len(tids),
        "latency_us": known,
        "read_ns": begin_ns + 1000,
        "placed_ns": end_ns - 1000,
    }
    frame = schema.frame("faults", data)
    schema.check(frame, "faults")
    return frame


def test_each_thread_and_all_at_once():
    table = blocktime_frame(faults((1, 0, 100), (2, 50, 100), (1, 300, 10)), end_ns=10**9)
    schema.check(table, "blocktime")
    assert table["who"].tolist() == ["thread", "thread", "all at once"]
    assert table["tid"].tolist()[:2] == [1, 2]
    assert table["blocktime_ms"].tolist() == [0.110, 0.100, 0.050]
    assert table["longest_ms"].tolist() == [0.1, 0.1, 0.05]
    assert table["faults"].tolist() == [2, 1, 3]


def test_waits_of_a_thread_that_overlap_count_once():
    table = blocktime_frame(faults((1, 0, 100), (1, 40, 20), (1, 90, 30)), end_ns=10**9)
    assert table["blocktime_ms"].tolist() == [0.120, 0.120]


def test_a_fault_that_was_never_resolved_lasts_until_the_end():
    waiting = faults((1, 500, np.nan), resolution="unresolved")
    table = blocktime_frame(waiting, end_ns=2_000_000)
    assert table["blocktime_ms"].tolist() == [1.5, 1.5]


def test_a_vcpu_that_never_faulted_means_that_not_all_stood_still():
    table = blocktime_frame(faults((1, 0, 100)), end_ns=10**9, threads=[1, 2])
    assert table["blocktime_ms"].tolist() == [0.1, 0.0, 0.0]


def test_without_faults_the_tables_are_empty_and_the_buckets_zero():
    nothing = faults()
    assert blocktime_frame(nothing, 0).empty
    assert standstill(nothing, 0).shape == (0, 2)
    distribution = distribution_frame(nothing)
    schema.check(distribution, "latency_distribution")
    assert distribution["faults"].tolist() == [0] * BUCKETS
    assert query_migrate(nothing, 0)["postcopy-latency"] == 0


def test_qemus_figures_are_from_the_reading_to_the_placing():
    reported = query_migrate(faults((7, 0, 2002), (7, 5000, 4002)), end_ns=10**9)
    assert reported["postcopy-blocktime"] == 6
    assert reported["postcopy-vcpu-blocktime"] == [6]
    assert reported["postcopy-latency"] == 3_000_000
    assert reported["postcopy-vcpu-latency"] == [3_000_000]
    assert reported["postcopy-latency-dist"] == [0] * 10 + [1, 1] + [0] * 12  # 2000, 4000 us


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 2e8), max_size=30))
def test_a_bucket_is_the_highest_bit_of_whole_microseconds(latencies):
    distribution = distribution_frame(faults(*((1, 0, us) for us in latencies)))
    expected = [min(max(int(us), 1).bit_length() - 1, BUCKETS - 1) for us in latencies]
    assert distribution["faults"].tolist() == np.bincount(expected, minlength=BUCKETS).tolist()
    inside = distribution["faults"] > 0
    means = distribution.loc[inside, "mean_us"]
    assert (means >= distribution.loc[inside, "from_us"]).all()
    assert (means <= distribution.loc[inside, "to_us"]).all()


@given(SPANS)
def test_the_union_covers_what_any_span_covers(spans):
    begin = np.array([b for b, _ in spans], np.int64)
    end = begin + np.array([n for _, n in spans], np.int64)
    merged = union(begin, end)
    covered = {t for b, e in zip(begin, end, strict=True) for t in range(b, e)}
    assert {t for b, e in merged.tolist() for t in range(b, e)} == covered
    assert (merged[1:, 0] > merged[:-1, 1]).all()


@settings(max_examples=40, deadline=None)
@given(SPANS, SPANS)
def test_all_stand_still_when_each_does(first, second):
    waits = [(1, b, n) for b, n in first] + [(2, b, n) for b, n in second]
    table = blocktime_frame(faults(*waits), end_ns=10**9, threads=[1, 2])
    instants = [{t for b, n in some for t in range(b, b + n)} for some in (first, second)]
    lost_us = table["blocktime_ms"] * 1e3
    assert np.allclose(lost_us, [*map(len, instants), len(instants[0] & instants[1])])


@pytest.mark.parametrize("threads", [1, 3])
def test_all_at_once_is_never_longer_than_any_thread(threads):
    random = np.random.default_rng(threads)
    waits = [(int(t), int(b), int(n)) for t, b, n in zip(
        random.integers(1, threads + 1, 500), random.integers(0, 100_000, 500),
        random.integers(1, 900, 500), strict=True)]  # fmt: skip
    table = blocktime_frame(faults(*waits), end_ns=10**9)
    whole = table.loc[table["who"] == "all at once", "blocktime_ms"].item()
    assert whole <= table.loc[table["who"] == "thread", "blocktime_ms"].min()

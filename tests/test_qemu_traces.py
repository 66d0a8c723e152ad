"""What real QEMUs recorded, read by any version's style: logs, simpletrace, one set of frames."""

import gzip
import lzma
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import migkit
from migkit.analysis import schema
from migkit.analysis.clocks import align, shifted
from migkit.analysis.samples import manifest
from migkit.errors import MissingEventError, OptionError, TraceFormatError, TraceWarning
from migkit.trace import logtrace
from migkit.trace.dialect import ALIASES, Dialect
from migkit.trace.loglines import read_log
from migkit.trace.registry import Registry
from migkit.trace.scan import scan, scannable
from migkit.trace.simpletrace import dropped_record, header, mapping_record

TRACES = Path(__file__).parents[1] / "traces"

NEW = b"""\
2026-11-23T01:28:46.510528Z migrate_set_state new state setup
2026-11-23T01:28:46.510629Z runstate_set current_run_state 6 (prelaunch) new_state 9 (running)
2026-11-23T01:28:47Z migration_thread_setup_complete\x20
"""
OLD = b"""\
15313@1795396425.461369:migrate_set_state new state setup
15338@1795396427.987127:get_queued_page pc.ram/0x1ed7000 page_abs=0x1ed7
"""


@pytest.fixture(scope="module")
def qemu_runs():
    names = ("qemu-7.2-preempt", "qemu-11.1-plain", "qemu-11.1-rate-limited")
    return {name: open_sample(name) for name in names}


def open_sample(name):
    folder = TRACES / name
    destination = folder / "destination.log.xz"
    return migkit.load_qemu(
        folder / "source.log.xz",
        destination if destination.exists() else None,
        query_migrate=folder / "query-migrate.json",
    )


# Lines.


def test_both_styles_give_the_same_columns():
    new, old = read_log(NEW), read_log(OLD)
    assert new.names[:2] == ("migrate_set_state", "runstate_set")
    assert new.ts_ns.tolist()[0] == 1795397326510528000
    assert new.tid.tolist() == [0, 0, 0]
    assert new.args.to_pylist()[0] == "new state setup"
    assert old.tid.tolist() == [15313, 15338]
    assert old.ts_ns.tolist() == [1795396425461369000, 1795396427987127000]


def test_a_whole_second_has_no_fraction():
    assert read_log(NEW).ts_ns.tolist()[2] == 1795397327000000000


def test_a_zone_is_heeded_and_a_missing_one_is_told():
    zoned = b"2026-11-23T03:28:46.510528+02:00 migrate_set_state new state setup\n"
    local = b"2026-11-23T03:28:46.510528 migrate_set_state new state setup\n"
    assert read_log(zoned).ts_ns[0] == read_log(NEW).ts_ns[0]
    assert "without a zone" in read_log(local).warnings[0]


def test_lines_of_something_else_are_counted_and_shown():
    foreign = b"qemu-system-x86_64: warning: TCG\n" + NEW + b"\xff\xfe\x00junk\n" + OLD + b"2026-1"
    log = read_log(foreign)
    assert (len(log), log.n_lines, log.n_foreign) == (5, 8, 3)
    assert log.foreign[0] == (1, "qemu-system-x86_64: warning: TCG")
    assert "3 of 8 lines" in log.warnings[0]
    assert "no end" in log.warnings[1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"migrate_set_state new state setup\n", "line 1.*-msg timestamp=on"),
        (b"\0" * 5000, "line 1.*none of 1 lines"),
        (b"2026-13-45T01:28:46.510528Z migrate_set_state x\n", "line 1"),
        (b"3026-11-23T01:28:46.510528Z migrate_set_state x\n", "line 1"),
        (b"1@9795396425.461369:migrate_set_state x\n", "line 1"),
    ],
)
def test_what_is_no_log_is_refused_with_its_line(data, message):
    with pytest.raises(TraceFormatError, match=message):
        read_log(data)


def test_a_line_without_end_takes_no_memory():
    log = read_log(NEW + b"x" * (3 << 20) + b"\n" + NEW)
    assert (len(log), log.n_foreign) == (6, 1)


@pytest.mark.parametrize(("pack", "suffix"), [(lzma.compress, "xz"), (gzip.compress, "gz")])
def test_compressed_logs_are_read_as_they_are(tmp_path, pack, suffix):
    file = tmp_path / f"log.{suffix}"
    file.write_bytes(pack(NEW))
    assert len(read_log(file)) == 3
    noise = np.random.default_rng(1).integers(0, 10, 200_000).astype(str)
    lines = b"".join(NEW[:45] + b" x" + digit.encode() + b"\n" for digit in noise)
    file.write_bytes(pack(lines)[:-2000])
    assert "cut off" in read_log(file).warnings[0]


def test_windows_line_ends_and_empty_lines_are_no_text():
    log = read_log(NEW.replace(b"\n", b"\r\n\r\n"))
    assert log.args.to_pylist()[0] == "new state setup"
    assert len(log) == 3


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 400))
def test_whatever_the_bytes_no_line_is_lost_unseen(junk, cut):
    data = NEW + junk + b"\n" + OLD
    data = data[: max(len(NEW), len(data) - cut)]
    log = read_log(data)
    blank = sum(not line for line in data.split(b"\n"))
    blank -= data.endswith(b"\n")
    assert len(log) + log.n_foreign + blank == log.n_lines


# Arguments.


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_what_a_format_prints_is_parsed_back(data):
    import pyarrow as pa

    events = [event for event in Registry.load() if event.args and scannable(event)]
    event = data.draw(st.sampled_from(events))
    word = st.text(alphabet="abcxyz./@-", min_size=1, max_size=12)
    values = []
    for arg in event.args:
        low, high = (
            (-(1 << arg.bits - 1), 1 << arg.bits - 1) if arg.is_signed else (0, 1 << arg.bits)
        )
        values.append(data.draw(word if arg.is_string else st.integers(low, high - 1)))
    text = event.format_args(values)
    rows, fits = scan(event, pa.array([text], pa.large_string()))
    assert fits.tolist() == [True]
    printed = event.format_args(list(rows[0])[3:])
    assert printed == text


def test_no_form_that_fits_leaves_text_and_says_so():
    trace = logtrace.read(NEW + b"2026-11-23T01:28:48.000001Z my_own_event a=1 b=2\n")
    assert trace["my_own_event"]["args"].tolist() == ["a=1 b=2"]
    assert trace.unknown == {"my_own_event": 1}
    assert "my_own_event (1)" in trace.warnings[-1]


def test_a_registry_by_path_teaches_the_reader_events(tmp_path):
    file = tmp_path / "trace-events"
    file.write_text('my_own_event(int a, const char *b) "a=%d b=%s"\n')
    trace = logtrace.read(NEW + b"2026-11-23T01:28:48.000001Z my_own_event a=-1 b=x y\n",
                          Registry.load(file))  # fmt: skip
    assert trace["my_own_event"][["a", "b"]].tolist() == [(-1, "x y")]
    assert not trace.unknown


def test_records_of_another_form_are_told_when_they_are_asked_for():
    trace = logtrace.read(NEW + b"2026-11-23T01:28:48.000001Z migrate_set_state renewed\n")
    with pytest.warns(TraceWarning, match="1 of 2 records of migrate_set_state"):
        assert len(trace["migrate_set_state"]) == 1
    assert len(trace.log) == 4


@pytest.mark.parametrize("old", sorted(ALIASES))
def test_every_alias_is_read_under_its_canonical_name(old):
    text = Dialect().forms(old)[-1].format_args([1] * len(Dialect().forms(old)[-1].args))
    trace = logtrace.read(f"1@1795396425.461369:{old} {text}\n".encode())
    assert len(trace[ALIASES[old]]) == 1
    frame = migkit.analysis.events.events_frame({"source": trace})
    assert frame[["event", "original"]].iloc[0].tolist() == [ALIASES[old], old]


def test_the_names_of_2015_end_a_migration_too(tmp_path):
    names = (
        "migration_thread_low_pending 7", "migration_thread_end_of_iteration_postcopy_end",
        "migration_thread_end_of_iteration_postcopy_end_after_complete",
        "migration_thread_end_of_iteration_postcopy_end_before_rp",
        "migration_thread_end_of_iteration_postcopy_end_after_rp 0",
    )  # fmt: skip
    file = tmp_path / "log"
    file.write_text("".join(f"1@1795396425.{i:06d}:{name}\n" for i, name in enumerate(names)))
    run = migkit.load_qemu(source=file)
    with pytest.warns(TraceWarning, match="no trace of the destination"):
        run.traces  # noqa: B018
    assert run.events["event"].tolist()[1:] == [
        "migration_completion_postcopy_end", "migration_completion_postcopy_end_after_complete",
        "migration_return_path_end_before", "migration_return_path_end_after",
    ]  # fmt: skip
    assert run.event("migration_return_path_end_after")["rp_error"].tolist() == [0]


# Runs.


@pytest.mark.parametrize(
    ("name", "mean_us", "downtime_ms"),
    [("qemu-7.2-preempt", 342, 11.3), ("qemu-11.1-plain", 920, 12.8)],
)
def test_figures_are_those_measured_when_it_was_recorded(qemu_runs, name, mean_us, downtime_ms):
    run = qemu_runs[name]
    assert run.faults["latency_us"].mean() == pytest.approx(mean_us, abs=0.6)
    assert run.downtime.attrs["total_ms"] == pytest.approx(downtime_ms, abs=0.06)


@pytest.mark.parametrize("name", ["qemu-7.2-preempt", "qemu-11.1-plain", "qemu-11.1-rate-limited"])
def test_frames_agree_with_query_migrate(qemu_runs, name):
    run = qemu_runs[name]
    said = run.meta["query_migrate"]
    assert run.status == said["src"]["status"]
    assert len(run.faults) == said["src"]["ram"]["postcopy-requests"]
    assert run.faults["latency_us"].gt(0).all()
    # QEMU's own figure is the source's part of it alone.
    assert run.downtime.attrs["total_ms"] >= said["src"]["downtime"]
    total_ms = run.phases.loc[run.phases["side"] == "source", "duration_ms"].sum()
    assert total_ms == pytest.approx(said["src"]["total-time"], abs=3)
    # Of two processes of one machine: the clocks are one, and the messages say how surely.
    clock = run.meta["clock"]["alignment"]
    assert clock["offset_ns"] == 0
    assert clock["error_ns"] < 200_000
    for frame in ("events", "faults", "samples", "phases", "downtime"):
        schema.check(getattr(run, frame), frame)


@pytest.mark.parametrize("name", ["qemu-11.1-plain", "qemu-11.1-rate-limited"])
def test_our_mean_latency_is_explained_against_qemus(qemu_runs, name):
    """QEMU 11.1 sums up only the faults that leave no other one of their vCPU, and divides by all.

    Its buckets have all of them: those are ours. So are the single latencies, but for the time
    from one event's stamp to the next one's.
    """
    run = qemu_runs[name]
    said = run.meta["query_migrate"]["dst"]
    begun, ended = run.event("postcopy_blocktime_begin"), run.event("postcopy_blocktime_end")
    faults = begun.merge(ended, on="addr", suffixes=("_begin", "_end"), validate="1:1")
    latency_ns = faults["time_end"] - faults["time_begin"]
    counted = latency_ns[faults["affected_cpus"] > 0]
    assert len(counted) < len(latency_ns)
    assert int(counted.sum()) // len(latency_ns) == said["postcopy-latency"]
    buckets = np.log2(latency_ns // 1000).astype(int).value_counts()
    ours = [int(buckets.get(n, 0)) for n in range(24)]
    assert ours == said["postcopy-latency-dist"]
    ours_us, theirs_us = run.faults["latency_us"].mean(), latency_ns.mean() / 1e3
    assert theirs_us < ours_us < theirs_us + 30


@pytest.mark.parametrize("name", ["qemu-7.2-preempt", "qemu-11.1-plain"])
def test_every_line_is_in_the_events_frame(qemu_runs, name):
    files = [TRACES / name / f"{side}.log.xz" for side in ("source", "destination")]
    n_lines = sum(lzma.decompress(file.read_bytes()).count(b"\n") for file in files)
    assert len(qemu_runs[name].events) == n_lines
    assert not [text for trace in qemu_runs[name].traces.values() for text in trace.warnings]


def test_derived_events_are_in_frames_but_nobody_recorded_them(qemu_runs):
    run = qemu_runs["qemu-11.1-plain"]
    assert len(run.event("guest_stopped")) == 1
    assert not run.events["event"].isin(["guest_stopped", "postcopy_request_placed"]).any()
    assert "postcopy_preempt_send_host_page" in run.traces["source"].derived
    older = qemu_runs["qemu-7.2-preempt"]
    assert "postcopy_preempt_send_host_page" not in older.traces["source"].derived


def test_the_monotonic_clock_is_tied_to_the_logs(qemu_runs):
    tied = qemu_runs["qemu-11.1-plain"].meta["clock"]["monotonic"]
    assert tied["error_ns"] < 10_000
    assert "monotonic" not in qemu_runs["qemu-7.2-preempt"].meta["clock"]  # it counted otherwise


def test_one_side_alone_says_what_is_missing():
    run = open_sample("qemu-11.1-destination-killed")
    with pytest.warns(TraceWarning, match="no trace of the destination"):
        assert run.faults.empty
    assert run.phases["name"].tolist()[-2:] == ["paused", "cancelling"]
    assert run.downtime.empty
    assert any("postcopy_ram_fault_thread_request" in text for text in run.warnings)
    assert run.summary().pages == {}
    with pytest.raises(MissingEventError, match="-trace postcopy_place_page"):
        run.event("postcopy_place_page")


@pytest.mark.parametrize("offset_ns", [5_000_000, -3_600_000_000_000])
def test_clocks_that_differ_are_put_on_one(qemu_runs, offset_ns):
    traces = qemu_runs["qemu-11.1-plain"].traces
    moved = shifted(traces["source"], -offset_ns)
    found = align(moved, traces["destination"])
    assert found.error_ns is not None
    assert abs(found.offset_ns - offset_ns) <= found.error_ns + 1000
    assert found.low_ns <= offset_ns <= found.high_ns


def test_a_clock_that_was_set_halfway_is_told(qemu_runs):
    traces = qemu_runs["qemu-11.1-plain"].traces
    log = traces["source"].log
    ts = log.ts_ns + np.where(np.arange(len(log)) > len(log) // 2, 10_000_000, 0)
    broken = logtrace.read(as_text(replace(log, ts_ns=ts)))
    assert not align(broken, traces["destination"]).consistent


def as_text(log):
    """Write a log anew, in the older style."""
    lines = [
        f"1@{ts // 10**9}.{ts % 10**9 // 1000:06d}:{log.names[code]} {args}\n"
        for ts, code, args in zip(log.ts_ns.tolist(), log.code.tolist(), log.args.to_pylist(),
                                  strict=True)
    ]  # fmt: skip
    return "".join(lines).encode()


def test_faults_of_several_blocks_are_kept_apart(tmp_path):
    """GIVEN requests for page 1 of two blocks, answered in the other order."""
    source = tmp_path / "source.log"
    destination = tmp_path / "destination.log"
    at = "1@1795396425."
    destination.write_text(
        f"{at}000100:postcopy_init_range pc.ram: 0x10000000 offset=0x0 length=0x100000\n"
        f"{at}000110:postcopy_init_range vga.vram: 0x20000000 offset=0x100000 length=0x10000\n"
        f"{at}000200:postcopy_ram_fault_thread_request Request for HVA=0x10001000 rb=pc.ram "
        "offset=0x1000 pid=7\n"
        f"{at}000210:postcopy_page_req_add new page req 0x10001000 total 1\n"
        f"{at}000300:postcopy_ram_fault_thread_request Request for HVA=0x20001000 rb=vga.vram "
        "offset=0x1000 pid=8\n"
        f"{at}000310:postcopy_page_req_add new page req 0x20001000 total 2\n"
        f"{at}000700:postcopy_place_page host=0x20001000\n"
        f"{at}000900:postcopy_place_page_zero host=0x10001000\n"
    )
    source.write_text(
        f"{at}000250:migrate_handle_rp_req_pages in pc.ram at 0x1000 len 0x1000\n"
        f"{at}000350:migrate_handle_rp_req_pages in vga.vram at 0x1000 len 0x1000\n"
    )
    faults = migkit.load_qemu(source, destination).faults
    assert faults["block"].tolist() == ["pc.ram", "vga.vram"]
    assert faults["latency_us"].tolist() == [700, 400]
    assert faults["received_by_source_us"].tolist() == [40, 40]
    assert faults["zero"].tolist() == [True, False]


def test_a_simpletrace_of_qemus_is_the_same_run(qemu_runs, tmp_path):
    """GIVEN QEMU's log, written as QEMU's simpletrace backend would, under 7.2's names."""
    run = qemu_runs["qemu-7.2-preempt"]
    paths = {}
    for role, trace in run.traces.items():
        paths[role] = tmp_path / f"{role}.trace"
        paths[role].write_bytes(as_simpletrace(trace))
    again = migkit.load_qemu(**paths)
    assert len(again.events) == len(run.events)
    assert again.meta["clock"]["name"] == "CLOCK_MONOTONIC"
    assert again.faults["latency_us"].tolist() == run.faults["latency_us"].tolist()
    originals = set(again.events["original"])
    assert "mark_postcopy_blocktime_begin" in originals


def as_simpletrace(trace):
    import struct

    parts = [header()]
    records = []
    backward = {new: old for old, new in ALIASES.items() if old in trace.log.names}
    for number, name in enumerate(n for n in trace.events if n not in trace.derived):
        parts.append(mapping_record(number, backward.get(name, name)))
        event = trace.registry[name]
        for ts, tid, seq, *values in trace[name].tolist():
            payload = b"".join(
                struct.pack("=L", len(value)) + value.encode() if arg.is_string
                else struct.pack("=Q", value & (1 << 64) - 1)
                for arg, value in zip(event.args, values, strict=True)
            )  # fmt: skip
            head = struct.pack("=QQQLL", 1, number, ts, 24 + len(payload), tid)
            records.append((seq, head + payload))
    return b"".join([*parts, *(data for _, data in sorted(records)), dropped_record(0, 1, 1)])


def test_what_cannot_be_opened_says_why(tmp_path):
    with pytest.raises(OptionError, match="of both"):
        migkit.load_qemu()
    with pytest.raises(OptionError, match="No such file"):
        migkit.load_qemu(tmp_path / "none.log")
    broken = tmp_path / "query.json"
    broken.write_text("{")
    with pytest.raises(TraceFormatError, match="query-migrate"):
        migkit.load_qemu(TRACES / "qemu-11.1-plain" / "source.log.xz", query_migrate=broken)
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"\x89PNG\r\n" + bytes(range(256)) * 100)
    with pytest.raises(TraceFormatError, match="line 1"):
        migkit.load_qemu(picture)


def test_two_migrations_in_one_log_are_refused():
    at = b"1@1795396425.000100:postcopy_ram_fault_thread_request Request for HVA=0x"
    data = (
        at
        + b"10001000 rb=pc.ram offset=0x1000 pid=7\n"
        + at
        + b"30001000 rb=pc.ram offset=0x1000 pid=7\n"
    )
    from migkit.analysis.qemu import _blocks

    with pytest.raises(TraceFormatError, match="several migrations"):
        _blocks(logtrace.read(data))


# The samples.


@pytest.mark.parametrize("name", sorted(manifest()))
@pytest.mark.filterwarnings("ignore:.*no trace of the destination")
def test_every_sample_opens_and_is_what_its_manifest_says(name):
    run = migkit.sample(name)
    assert run.meta["sample"]["versions"]
    assert set(run.meta["sample"]) >= {"what", "how", "machine", "files"}
    kept = {file.name for file in (TRACES / name).iterdir() if file.suffix != ".parquet"}
    assert kept == set(run.meta["sample"]["files"])
    for frame in ("events", "faults", "samples", "phases", "downtime"):
        schema.check(getattr(run, frame), frame)
    assert run.summary().phases_ms
    if "stream" in run.meta:
        assert migkit.stream(run.meta["stream"]).summary().ended


def test_the_samples_show_what_they_are_for():
    recovered = migkit.sample("recovered").phases["name"].tolist()
    assert "paused" in recovered
    assert "recovery" in recovered
    failed = migkit.sample("rp-error")
    assert failed.status == "failed"
    assert failed.event("migration_return_path_end_after")["rp_error"].tolist() == [1]
    assert migkit.sample("precopy").phases["name"].str.contains("post-copy").sum() == 0
    slow = migkit.sample("slow-link").summary()
    assert 200e6 / 8 / (1 << 20) * 0.5 < slow.throughput_mib_s < 200e6 / 8 / (1 << 20) * 1.1


def test_an_unknown_sample_names_the_closest():
    with pytest.raises(OptionError, match=r"did you mean 'qemu-11"):
        migkit.sample("qemu-11.1-plane")


def test_a_sample_that_was_changed_is_not_opened(tmp_path, monkeypatch):
    import shutil

    copy = tmp_path / "traces"
    shutil.copytree(TRACES, copy)
    monkeypatch.setattr("migkit.analysis.samples.TRACES", copy)
    (copy / "qemu-11.1-plain" / "query-migrate.json").write_text("{}")
    with pytest.raises(TraceFormatError, match="not what was recorded"):
        migkit.sample("qemu-11.1-plain")

"""What a run is written as: opened again with the tools of the formats, it says the same."""

from __future__ import annotations

import sys
from collections import defaultdict

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migkit.errors import CapabilityError, MissingEventError, OptionError
from migkit.view.export import FRAMES
from migkit.view.packets import _varint
from migkit.view.perfetto import _lanes

RUNS = ("plain_run", "recovered_run", "precopy_run", "cancelled_run")
BEGIN, END, INSTANT, COUNTER = 1, 2, 3, 4


class Opened:
    """A Perfetto trace, read with the package's own protobuf classes."""

    def __init__(self, path):
        from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace

        trace = Trace()
        trace.ParseFromString(path.read_bytes())
        self.packets = trace.packet
        tracks = [p.track_descriptor for p in trace.packet if p.HasField("track_descriptor")]
        self.tracks = {track.uuid: track for track in tracks}
        self.events = [p for p in trace.packet if p.HasField("track_event")]

    def process_of(self, uuid):
        track = self.tracks[uuid]
        while not track.HasField("process"):
            track = self.tracks[track.parent_uuid]
        return track.process.process_name

    def slices(self):
        """All slices as (begin, end, name, flow, process), begins and ends matched per track."""
        stacks, found = defaultdict(list), []
        for packet in self.events:
            event = packet.track_event
            stack = stacks[event.track_uuid]
            if event.type == BEGIN:
                assert not stack or packet.timestamp >= stack[-1].timestamp
                stack.append(packet)
            elif event.type == END:
                begun = stack.pop()
                flows = list(begun.track_event.flow_ids)
                assert packet.timestamp >= begun.timestamp
                found.append(
                    (begun.timestamp, packet.timestamp, begun.track_event.name,
                     flows[0] if flows else None, self.process_of(event.track_uuid))
                )  # fmt: skip
        assert not any(stacks.values())
        return found


@pytest.fixture(params=RUNS)
def run(request):
    return request.getfixturevalue(request.param)


def test_every_run_opens_as_a_perfetto_trace(run, tmp_path):
    opened = Opened(run.export.perfetto(tmp_path / "run.pftrace"))
    names = {t.process.process_name: t.process.pid for t in opened.tracks.values()
             if t.HasField("process")}  # fmt: skip
    assert names["source"] == run.meta["engines"]["source"]
    assert names["destination"] == run.meta["engines"]["destination"]
    slices = opened.slices()
    phases = run.phases
    for side in ("source", "destination"):
        mine = phases[phases["side"] == side]
        expected = set(zip(mine["start_ns"], mine["end_ns"], mine["name"], strict=True))
        assert expected <= {(b, e, n) for b, e, n, _, process in slices if process == side}
    first = opened.packets[0]
    assert first.sequence_flags == 1
    assert len({packet.trusted_packet_sequence_id for packet in opened.packets}) == 1


def test_every_track_is_of_a_process_and_declared_before_it_is_used(plain_run, tmp_path):
    opened = Opened(plain_run.export.perfetto(tmp_path / "run.pftrace"))
    known = set()
    for packet in opened.packets:
        if packet.HasField("track_descriptor"):
            track = packet.track_descriptor
            assert not track.parent_uuid or track.parent_uuid in known
            known.add(track.uuid)
        else:
            assert packet.track_event.track_uuid in known


def test_arrows_lead_from_a_fault_through_the_source_and_back(plain_run, tmp_path):
    opened = Opened(plain_run.export.perfetto(tmp_path / "run.pftrace"))
    ways = defaultdict(list)
    for begin, _, name, flow, process in opened.slices():
        if flow is not None:
            ways[flow].append((begin, name, process))
    faults = plain_run.faults[plain_run.faults["latency_us"].notna()].reset_index(drop=True)
    assert len(ways) == len(faults)
    requested = faults.index[faults["resolution"] == "requested"]
    assert len(requested) > 50
    for row in requested:
        page = faults["page"][row]
        steps = ways[row + 1]
        guests = [name for _, name, process in steps if process.startswith("guest")]
        assert f"requested: page {page}" in guests
        assert {(name, process) for _, name, process in steps} >= {
            (f"ask page {page}", "destination"),
            (f"send page {page}", "source"),
            (f"place page {page}", "destination"),
        }
        begins = {name.split()[0]: begin for begin, name, _ in steps}
        assert begins["ask"] <= begins["send"] <= begins["place"]
        assert begins["send"] == faults["received_by_source_ns"][row]


def test_other_events_are_instants_on_their_threads_track(plain_run, tmp_path):
    opened = Opened(plain_run.export.perfetto(tmp_path / "run.pftrace"))
    instants = [p for p in opened.events if p.track_event.type == INSTANT]
    [low] = [p for p in instants if p.track_event.name == "migration_thread_low_pending"]
    row = plain_run.event("migration_thread_low_pending").iloc[0]
    assert low.timestamp == row["ts_ns"]
    assert opened.tracks[low.track_event.track_uuid].thread.tid == row["tid"]
    assert low.track_event.debug_annotations[0].string_value == str(row["pending"])
    counters = [p for p in opened.events if p.track_event.type == COUNTER]
    assert len(counters) == 2 * len(plain_run.samples)


def test_without_the_package_the_remedy_is_named(plain_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "perfetto.protos.perfetto.trace", None)
    with pytest.raises(CapabilityError, match=r"pip install 'migkit\[perfetto\]'"):
        plain_run.export.perfetto(tmp_path / "run.pftrace")


def test_a_file_that_cannot_be_written_is_named(plain_run, tmp_path):
    for write in (plain_run.export.perfetto, plain_run.export.html):
        with pytest.raises(OptionError, match="no/folder/x: No such file or directory"):
            write(tmp_path / "no" / "folder" / "x")


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 10)), max_size=20))
def test_slices_of_a_lane_never_overlap_and_none_is_lost(slices):
    begin = np.array([b for b, _ in slices], np.int64)
    end = begin + np.array([n for _, n in slices], np.int64)
    lanes = list(_lanes(begin, end))
    for lane in lanes:
        assert (begin[lane][1:] >= end[lane][:-1]).all()
    placed = sorted(row for lane in lanes for row in lane.tolist())
    assert placed == list(range(len(slices)))


@given(st.integers(0, 1 << 40))
def test_a_length_is_written_as_protobuf_does(value):
    parts = _varint(value)
    assert sum((byte & 0x7F) << 7 * place for place, byte in enumerate(parts)) == value
    assert all(byte & 0x80 for byte in parts[:-1])
    assert not parts[-1] & 0x80


# Tables.


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_hold_what_the_frames_hold(plain_run, tmp_path, kind):
    written = getattr(plain_run.export, kind)(tmp_path / "new" / kind)
    assert set(written) == set(FRAMES)
    for name, path in written.items():
        frame = getattr(plain_run, name)
        again = pd.read_csv(path) if kind == "csv" else pd.read_parquet(path)
        assert list(again.columns) == list(frame.columns)
        assert len(again) == len(frame)
    faults = pd.read_csv(written["faults"]) if kind == "csv" else pd.read_parquet(written["faults"])
    assert np.allclose(faults["latency_us"], plain_run.faults["latency_us"], equal_nan=True)
    assert faults["page"].tolist() == plain_run.faults["page"].tolist()


def test_only_what_is_asked_for_is_written(plain_run, tmp_path):
    written = plain_run.export.csv(tmp_path, ["phases"])
    assert [path.name for path in tmp_path.iterdir()] == ["phases.csv"]
    assert list(written) == ["phases"]
    with pytest.raises(OptionError, match="did you mean 'phases'"):
        plain_run.export.csv(tmp_path, ["phase"])
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="file"):
        plain_run.export.csv(tmp_path / "file", ["phases"])


def test_frames_whose_events_are_missing_are_left_out_unless_asked_for(plain_run, tmp_path):
    from dataclasses import replace

    from migkit.analysis import Run

    run = Run.load(plain_run.path)
    source = run.traces["source"]
    events = {name: rows for name, rows in source.events.items() if name != "ram_save_range"}
    run.__dict__["traces"] = {**run.traces, "source": replace(source, events=events)}
    run.meta["events"] = [name for name in run.meta["events"] if name != "ram_save_range"]
    assert set(run.export.parquet(tmp_path)) == set(FRAMES) - {"transfer"}
    with pytest.raises(MissingEventError, match="ram_save_range"):
        run.export.parquet(tmp_path, ["transfer"])

"""Traces in pieces, their text by columns, and events as one Parquet file."""

import os
import struct

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migkit.analysis.events import events_frame, frame_of_pieces
from migkit.analysis.parquet import write_events
from migkit.analysis.samples import TRACES
from migkit.errors import TraceFormatError
from migkit.trace.decode import payload_bounds
from migkit.trace.dialect import Dialect
from migkit.trace.layout import RECORD, RECORD_HEADER, header, mapping_record
from migkit.trace.printcolumns import print_columns
from migkit.trace.registry import Registry
from migkit.trace.simpletrace import Trace, read, read_pieces

FILE = TRACES / "first-postcopy" / "destination.trace"
SMALL = 8192


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_text_by_columns_is_what_one_by_one_is(data):
    """Our formats, and others with all that C's printf has."""
    event = data.draw(st.sampled_from([event for event in Registry.load() if event.args]))
    word = st.text(max_size=6)
    rows = data.draw(st.integers(0, 5))
    columns = []
    for arg in event.args:
        kind = np.int64 if arg.is_signed else np.uint64
        low, high = (-(1 << 63), 1 << 63) if arg.is_signed else (0, 1 << 64)
        value = word if arg.is_string else st.one_of(
            st.integers(0, 3), st.integers(low, high - 1)
        )  # fmt: skip
        values = [data.draw(value) for _ in range(rows)]
        columns.append(np.array(values, object if arg.is_string else kind))
    texts = print_columns(event, columns).to_pylist()
    listed = zip(*(column.tolist() for column in columns), strict=True)
    assert texts == [event.format_args(values) for values in listed]


@pytest.mark.parametrize("template", ["%-5d|%05u|%#x|%+d", "%5.3d%% %X %c %hhx", "%hd %ld %o %i"])
def test_flags_widths_and_small_types_are_printed_too(tmp_path, template):
    count = template.replace("%%", "").count("%")
    args = ", ".join(f"int64_t a{i}" for i in range(count))
    file = tmp_path / "trace-events"
    file.write_text(f'odd({args}) "{template}"\n')
    event = Registry.load(file)["odd"]
    column = np.array([0, 65, -1, 1 << 40, 300], np.int64)
    texts = print_columns(event, [column] * count).to_pylist()
    assert texts == [event.format_args([value] * count) for value in column.tolist()]


def test_pieces_hold_what_the_whole_holds():
    whole = read(FILE)
    pieces = list(read_pieces(FILE, n_bytes=SMALL))
    assert len(pieces) > 5
    assert sum(piece.n_records for piece in pieces) == whole.n_records
    for name, rows in whole.events.items():
        parts = [piece.events[name] for piece in pieces if name in piece.events]
        assert np.concatenate(parts).tolist() == rows.tolist()
    frame = frame_of_pieces(("destination", piece) for piece in pieces)
    pd.testing.assert_frame_equal(frame, events_frame({"destination": whole}))


def test_some_fields_of_an_event_are_those_of_all():
    trace, whole = read(FILE), read(FILE)
    for name, rows in whole.events.items():
        fields = rows.dtype.names[::-1]
        for _ in range(2):
            for field, column in zip(fields, trace.columns(name, *fields), strict=True):
                assert column.dtype == rows.dtype[field]
                assert column.tolist() == rows[field].tolist()
            assert trace.events[name].tolist() == rows.tolist()


@pytest.mark.parametrize("longest", [5, 300, 70_000])
def test_texts_of_any_length_are_read_right(longest):
    # GIVEN texts, most of one length, so long that one or two bytes do not tell a record's length
    lengths = np.random.default_rng(1).choice([0, 5, longest], 300, p=[0.1, 0.8, 0.1]).tolist()
    texts = [chr(ord("a") + i % 3) * length for i, length in enumerate(lengths)]
    data = header() + mapping_record(7, "migrate_set_state")
    for i, text in enumerate(texts):
        head = RECORD_HEADER.pack(RECORD, 7, i, 24 + 4 + len(text), 1)
        data += head + struct.pack("=L", len(text)) + text.encode()
    # THEN they are read, and printed from the file's bytes
    trace = read(data)
    assert trace.columns("migrate_set_state", "new_state")[0].tolist() == texts
    frame = events_frame({"source": trace})
    assert frame["args"].tolist() == [f"new state {text}" for text in texts]


@pytest.mark.parametrize("text", ["", "x" * 600])
def test_a_record_across_the_end_of_a_piece_may_have_any_form_of_its_event(tmp_path, text):
    # GIVEN a trace in an older form than the registry's, and with longer texts than QEMU writes
    name = "migration_set_outgoing_channel"
    dialect = Dialect()
    older = dialect.forms(name)[-1]
    strings = struct.pack("=L", len(text)) + text.encode()
    payload = b"".join(strings if arg.is_string else bytes(8) for arg in older.args)
    record = RECORD_HEADER.pack(RECORD, 7, 1, 24 + len(payload), 1) + payload
    file = tmp_path / "trace"
    file.write_bytes(header() + mapping_record(7, name) + 1000 * record)
    # THEN it is read in pieces too, wherever they end
    registry = dialect.registry([])
    assert payload_bounds(registry[name])[1] < payload_bounds(older)[1]
    for n_bytes in (997, 2000):
        pieces = read_pieces(file, registry, dialect.forms, n_bytes=n_bytes)
        assert sum(piece.n_records for piece in pieces) == 1000


@pytest.mark.parametrize("cut", [0, 1, 13, 4000])
@pytest.mark.parametrize("tail", [0, 5 * SMALL])
def test_pieces_of_a_trace_that_was_cut_off_end_as_the_whole_does(tmp_path, cut, tail):
    file = tmp_path / "trace"
    raw = FILE.read_bytes()
    file.write_bytes(raw[: len(raw) - cut] + bytes(tail))
    whole = outcome(lambda: read(file))
    *_, last = outcome(lambda: list(read_pieces(file, n_bytes=SMALL)))
    if isinstance(whole, Trace):
        assert (last.missing_bytes, last.warnings) == (whole.missing_bytes, whole.warnings)
    else:
        assert last == whole[0]


def outcome(call):
    """Return what a call returns, or its error as a list of one text."""
    try:
        return call()
    except TraceFormatError as error:
        return [str(error)]


def test_an_error_in_a_later_piece_has_its_place_in_the_file(tmp_path):
    raw = bytearray(FILE.read_bytes())
    whole = read(bytes(raw))
    raw[60000:60064] = os.urandom(64)
    file = tmp_path / "trace"
    file.write_bytes(raw)
    with pytest.raises(TraceFormatError, match=r"offset \d{5}"):
        list(read_pieces(file, n_bytes=SMALL))
    assert whole.n_records


def test_events_become_one_parquet_file_or_none(tmp_path):
    folder = FILE.parent
    traces = {role: folder / f"{role}.trace" for role in ("source", "destination")}
    target = tmp_path / "events.parquet"
    told = []
    count = write_events(traces, target, progress=told.append)
    assert sum(told) == count
    found = pd.read_parquet(target)
    for role, file in traces.items():
        mine = found[found["process"] == role].sort_values("ts_ns", kind="stable")
        frame = events_frame({role: read(file)})
        for column in ("ts_ns", "tid", "args"):
            assert mine[column].tolist() == frame[column].tolist()
        assert mine["event"].astype(str).tolist() == frame["event"].astype(str).tolist()
    broken = tmp_path / "broken.trace"
    broken.write_bytes(FILE.read_bytes()[:1000] + b"\xff" * 1000)
    before = target.read_bytes()
    with pytest.raises(TraceFormatError):
        write_events({"source": broken}, target)
    assert target.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir() if entry.suffix == ".part"] == []

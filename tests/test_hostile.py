"""Hostile bytes: what a decoder gets from elsewhere is read or refused, and nothing else.

The targets are those of ``make fuzz``, which gives them 2,000,000 inputs guided by coverage; here
they get a few thousand that hypothesis makes of valid ones. `fuzz.targets` says what is allowed.
"""

import json
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.seeds import RAM, npy
from fuzz.targets import BLOCKS, TARGETS
from migkit.errors import ProtocolError, TraceFormatError
from migkit.migration import bitmap, wire
from migkit.migration.wire import MAX_PACKAGED, Command
from migkit.probe.records import FAULT_DTYPE
from migkit.trace.chase import find_candidates
from migkit.trace.drain import DATA_OFFSET, Drain
from migkit.trace.folder import SAMPLES_DTYPE, RunFolder
from migkit.trace.layout import FILE_HEADER, dropped_record, header, mapping_record
from migkit.trace.registry import Registry
from migkit.trace.simpletrace import read

SEEDS = {name: target.seeds() for name, target in TARGETS.items()}
GREAT = [bytes([0x7F, *[0xFF] * n]) for n in (1, 3, 7)] + [b"\xff" * n for n in (1, 2, 4, 8)]

every_target = pytest.mark.parametrize("name", TARGETS)
# 500 ms for what takes one: an input that a decoder does not get over is a failure.
hostile = settings(deadline=500, suppress_health_check=[HealthCheck.too_slow], database=None)


@st.composite
def mutated(draw, name):
    """Return a valid input of a target after a few changes of the kinds that hurt parsers."""
    data = bytearray(draw(st.sampled_from(SEEDS[name])))
    for _ in range(draw(st.integers(1, 5))):
        at = draw(st.integers(0, min(len(data), 600)))  # what follows is mostly pages' bytes
        match draw(st.integers(0, 6)):
            case 0 if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case 1:
                data[at:at] = draw(st.binary(max_size=12))
            case 2:
                del data[at : at + draw(st.integers(1, 40))]
            case 3:
                other = draw(st.sampled_from(SEEDS[name]))
                begin = draw(st.integers(0, len(other)))
                data[at:] = other[begin:]
            case 4:
                del data[at:]
            case 5:
                great = draw(st.sampled_from(GREAT))
                data[at : at + len(great)] = great
            case _:
                data[at:at] = data[at : at + draw(st.integers(1, 300))]
    return bytes(data)


@every_target
def test_valid_inputs_are_read_to_their_end(name):
    # GIVEN what migkit's own encoders make; a description of another version and arrays of
    # another type are refused, but not all are.
    assert any(TARGETS[name](seed) for seed in SEEDS[name])


@every_target
@settings(hostile, max_examples=300)
@given(data=st.data())
def test_a_changed_input_is_read_or_refused_but_nothing_else(name, data):
    TARGETS[name](data.draw(mutated(name)))


@every_target
@settings(hostile, max_examples=100)
@given(noise=st.binary(max_size=300), kept=st.integers(0, 100))
def test_noise_after_a_good_beginning_is_read_or_refused_but_nothing_else(name, noise, kept):
    TARGETS[name](SEEDS[name][0][:kept] + noise)


@every_target
@settings(hostile, max_examples=40, deadline=None)
@given(data=st.data())
def test_memory_is_bounded_by_what_came(name, data):
    changed = data.draw(mutated(name))
    assert TARGETS[name].peak(changed) <= TARGETS[name].most(changed)


# Lengths that promise more than comes.


def claimed(dtype):
    """Return a numpy file whose head claims more rows than any disk has."""
    empty, rows = npy(np.zeros(0, dtype)), b"(99999999999,), }"
    assert b"(0,), }          " in empty
    return empty.replace(b"(0,), }          ", rows)


@pytest.mark.parametrize(
    ("name", "claim"),
    [
        (
            "stream",
            wire.header() + wire.command(Command.PACKAGED, struct.pack(">I", MAX_PACKAGED)),
        ),
        ("stream", wire.header() + b"\x07\xff\xff\xff\xff"),
        ("return_path", struct.pack(">HH", 5, 0xFFFF)),
        ("return_path", struct.pack(">HH", 5, 1 + len(RAM)) + wire.short_string(RAM)),
        ("bitmap", b"\xff" * 8),
        ("trace", header() + struct.pack("=QQL", 0, 1, 0xFFFF_FFFF)),
        ("trace", header() + mapping_record(1, "e") + struct.pack("=QQQLL", 1, 1, 1, 1 << 31, 1)),
        ("drain", struct.pack("=QQ", 1 << 62, 0)),
        ("trace_events", b'e(int x) "%2000000000d"'),
        ("arrays", claimed(FAULT_DTYPE)),
        ("arrays", claimed(SAMPLES_DTYPE)),
    ],
)
def test_a_length_takes_no_memory_before_its_bytes_come(name, claim):
    data = b"\0" * (name in {"stream", "return_path"}) + claim
    assert TARGETS[name].peak(data) <= TARGETS[name].memory[1]


# What was found: each of these crashed, hung or took memory without bound before.


def test_a_received_bitmap_of_the_wrong_length_is_refused_with_both():
    good = bitmap.encode(np.ones(64, bool), BLOCKS[RAM])
    for wrong in (b"", good[:7], good[:-1], good + b"\0"):
        with pytest.raises(ProtocolError, match=f"^{len(wrong)} bytes .*'pc.ram', expected 24"):
            bitmap.decode(wrong, BLOCKS[RAM])


@pytest.mark.parametrize("count", [4097, 1 << 62])
def test_a_drain_of_an_overwritten_count_is_refused_and_lets_go_of_its_buffer(count):
    buffer = bytearray(struct.pack("=QQ", count, 0).ljust(DATA_OFFSET, b"\0") + bytes(4096))
    drain = Drain(buffer, None)
    with pytest.raises(TraceFormatError, match=f"valid bytes is {count}, expected 0 to 4096"):
        drain.close()
    buffer.clear()  # BufferError if the drain still held it


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_json_that_is_nested_without_end_is_refused(tmp_path, opening):
    deep = opening.encode() * 50_000
    assert not TARGETS["control"](b"\0" + deep + b"\n")
    assert not TARGETS["meta"](deep)


def test_lanes_of_different_length_cost_no_more_than_their_records():
    # GIVEN a trace whose first half gives the chase no place to begin from, but its second does
    first = dropped_record(1, 5, 7) * 20_000
    second = struct.pack("=QQQLLQQ", 1, 1, 9, 40, 1, 2, 3) * 20_000
    data = header() + mapping_record(1, "guest_stopped") + first + second
    # WHEN it is read THEN memory is of the order of the records found
    tracemalloc.start()
    try:
        trace = read(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (trace.dropped, trace["guest_stopped"].size) == (20_000, 20_000)
    assert peak < 4 * len(data)
    start = FILE_HEADER.size + len(mapping_record(1, "guest_stopped"))
    found = find_candidates(np.frombuffer(data, np.uint8), start).records.offsets
    assert found.size == 40_000
    assert (np.diff(found) > 0).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'e(int \xff) "%d"', "is no text in UTF-8"),
        (b'e(const char *s) "%d"', "line 1: format '%d' cannot print these arguments"),
        (b'e(int x) "%2000000000d"', "line 1: a % .* starts no conversion"),
        ('e(int x) "%\u0663d"'.encode(), "line 1: a % .* starts no conversion"),
    ],
)
def test_a_trace_events_file_that_could_not_be_printed_is_refused(tmp_path, text, message):
    file = tmp_path / "trace-events"
    file.write_bytes(text)
    with pytest.raises(TraceFormatError, match=message):
        Registry.load(file)


def test_a_width_that_a_trace_gives_is_bounded(tmp_path):
    file = tmp_path / "trace-events"
    file.write_text('e(int w, int n) "%*d"')
    event = Registry.load(file)["e"]
    assert event.format_args([5, 7]) == "    7"
    assert event.format_args([2**31 - 1, 7]) == " " * 998 + "7"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy(np.zeros((2, 2), FAULT_DTYPE)), r"holds .* \(2, 2\), expected .* \(n,\)"),
        (npy(np.zeros((), FAULT_DTYPE)), r"holds .* \(\), expected"),
        (npy(np.zeros(4, FAULT_DTYPE))[:-1], "cut off: 255 bytes of data of 256"),
        (b"PK\3\4" + bytes(60), "no numpy file"),
        (b"", "no numpy file"),
        (json.dumps({}).encode(), "no numpy file"),
    ],
)
def test_an_array_that_is_no_list_of_records_is_refused(tmp_path, content, message):
    (tmp_path / "probe.npy").write_bytes(content)
    with pytest.raises(TraceFormatError, match=message):
        RunFolder(tmp_path).load_probe(FAULT_DTYPE)

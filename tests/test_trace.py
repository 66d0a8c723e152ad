"""Trace events: the registry, emitting them into shared memory, and the formats."""

import io
import os
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migkit.errors import MissingEventError, OptionError, TraceFormatError
from migkit.trace import (
    DEFAULT_PATTERNS,
    Drain,
    Registry,
    Tracer,
    create_buffer,
    map_buffer,
    read,
)
from migkit.trace.drain import DATA_OFFSET, published
from migkit.trace.logformat import format_log
from migkit.trace.simpletrace import dropped_record, header, mapping_record

REGISTRY = Registry.load()
HEAD = len(header()) + sum(len(mapping_record(event.id, event.name)) for event in REGISTRY)
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)


def new_buffer(room=1 << 20):
    return bytearray(DATA_OFFSET + room)


def record(event_id, payload=b"", ts=1, tid=2, length=None):
    length = 24 + len(payload) if length is None else length
    return struct.pack("=QQQLL", 1, event_id, ts, length, tid) + payload


def small_trace():
    """A trace of a few records, with and without strings, as bytes."""
    buffer = new_buffer()
    tracer = Tracer(buffer, REGISTRY.select(["all"]), tid=7)
    tracer.postcopy_start(ts=10)
    tracer.ram_save_range("pc.ram", 4096, 8192, 1, ts=20)
    tracer.migration_return_path_end_after(-5, ts=30)
    tracer.runstate_set(9, "running", 7, "finish-migrate", ts=40)
    return published(buffer)


def values_of(event):
    """A hypothesis strategy for the arguments of an event."""
    return st.tuples(
        *(
            TEXTS
            if arg.is_string
            else st.integers(-(2**63), 2**63 - 1)
            if arg.is_signed
            else st.integers(0, 2**64 - 1)
            for arg in event.args
        )
    )


# --- emitting and reading back ---


@pytest.mark.parametrize("event", list(REGISTRY), ids=lambda event: event.name)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_what_any_event_is_given_is_read_back(event, data):
    calls = data.draw(st.lists(values_of(event), min_size=1, max_size=4))
    buffer = new_buffer()
    tracer = Tracer(buffer, {event.name}, tid=4321)
    for ts, values in enumerate(calls):
        getattr(tracer, event.name)(*values, ts=ts)
    trace = read(published(buffer))
    rows = trace.events[event.name]
    assert trace.n_records == len(calls)
    assert trace.warnings == ()
    assert [row[3:] for row in rows.tolist()] == calls
    assert rows["ts_ns"].tolist() == list(range(len(calls)))
    assert rows["tid"].tolist() == [4321] * len(calls)
    assert rows["seq"].tolist() == list(range(len(calls)))


def test_fields_are_typed_by_their_arguments():
    rows = read(small_trace())["runstate_set"]
    assert [rows.dtype[name] for name in rows.dtype.names] == [
        np.uint64, np.uint32, np.uint64, np.int64, object, np.int64, object,
    ]  # fmt: skip


def test_an_event_that_is_off_leaves_no_trace():
    buffer = new_buffer()
    tracer = Tracer(buffer, {"postcopy_start"}, tid=1)
    tracer.migrate_set_state("active")
    tracer.many("ram_save_range", "pc.ram", np.arange(3), 1, 0, ts=1)
    assert tracer.on("postcopy_start")
    assert not tracer.on("migrate_set_state")
    assert read(published(buffer)).n_records == 0


def test_an_event_takes_the_time_it_is_emitted_at_unless_told():
    buffer = new_buffer()
    import time

    before = time.monotonic_ns()
    Tracer(buffer, {"postcopy_start"}, tid=1).postcopy_start()
    ts = int(read(published(buffer))["postcopy_start"]["ts_ns"][0])
    assert before <= ts <= time.monotonic_ns()


def test_values_out_of_an_arguments_range_wrap_at_64_bits():
    buffer = new_buffer()
    tracer = Tracer(buffer, REGISTRY.select(["all"]), tid=1)
    tracer.ram_save_range("pc.ram", -4096, 1 << 64, (1 << 64) - 3, ts=1)
    row = read(published(buffer))["ram_save_range"].tolist()[0]
    assert row[4:] == (2**64 - 4096, 0, -3)


def test_a_string_may_be_empty_or_none_and_is_cut_where_qemu_cuts_it():
    buffer = new_buffer()
    tracer = Tracer(buffer, {"migrate_set_state"}, tid=1)
    for text in ("", None, "x" * 600, "\udc80"):
        tracer.migrate_set_state(text)
    texts = read(published(buffer))["migrate_set_state"]["new_state"].tolist()
    assert texts == ["", "", "x" * 512, "\\udc80"]


def test_a_misspelt_event_is_named_with_the_closest_ones():
    buffer = new_buffer()
    tracer = Tracer(buffer, (), tid=1)
    with pytest.raises(AttributeError, match="did you mean 'postcopy_start'"):
        tracer.postcopy_strat()
    with pytest.raises(MissingEventError, match="did you mean 'postcopy_start'"):
        Tracer(buffer, {"postcopy_strat"}, tid=1)


def test_a_wrong_type_or_number_of_arguments_is_an_error():
    tracer = Tracer(new_buffer(), REGISTRY.select(["all"]), tid=1)
    with pytest.raises(TypeError, match=r"migrate_set_state.*missing 1"):
        tracer.migrate_set_state()
    with pytest.raises(TypeError):
        tracer.migration_rate_limit_pre("soon")
    with pytest.raises(TypeError, match="takes 4 arguments, got 1"):
        tracer.many("ram_save_range", "pc.ram", ts=1)
    with pytest.raises(TypeError, match="offset must be an int"):
        tracer.many("ram_save_range", "pc.ram", [0.5], 1, 0, ts=1)


def test_a_buffer_too_small_for_the_names_of_the_events_is_refused():
    with pytest.raises(OptionError, match="too small"):
        Tracer(new_buffer(100), (), tid=1)


def test_a_second_tracer_continues_the_trace_of_its_buffer():
    buffer = new_buffer()
    Tracer(buffer, {"postcopy_start"}, tid=1).postcopy_start()
    Tracer(buffer, {"postcopy_start"}, tid=2).postcopy_start()
    assert read(published(buffer))["postcopy_start"]["tid"].tolist() == [1, 2]


def test_a_closed_tracer_lets_go_of_its_buffer():
    fd = create_buffer(1 << 20)
    buffer = map_buffer(fd)
    os.close(fd)
    tracer = Tracer(buffer, {"postcopy_start"}, tid=1)
    tracer.close()
    tracer.postcopy_start()
    buffer.close()


# --- many at once ---


@settings(max_examples=40, deadline=None)
@given(
    text=TEXTS,
    rows=st.lists(
        st.tuples(st.integers(0, 2**63 - 1), st.integers(-(2**31), 2**31)), min_size=1, max_size=50
    ),
)
def test_many_writes_what_emitting_one_by_one_writes(text, rows):
    offsets, kinds = (np.array(column) for column in zip(*rows, strict=True))
    together, apart = new_buffer(), new_buffer()
    tracer = Tracer(together, {"ram_save_range"}, tid=1)
    tracer.many("ram_save_range", text, offsets, 4096, kinds, ts=np.arange(len(rows)))
    tracer = Tracer(apart, {"ram_save_range"}, tid=1)
    for ts, (offset, kind) in enumerate(rows):
        tracer.ram_save_range(text, offset, 4096, kind, ts=ts)
    assert published(together) == published(apart)


def test_many_of_nothing_is_nothing_and_of_scalars_is_one_record():
    buffer = new_buffer()
    tracer = Tracer(buffer, {"postcopy_place_page", "postcopy_start"}, tid=1)
    tracer.many("postcopy_place_page", np.array([], np.uint64), ts=1)
    tracer.many("postcopy_place_page", -1, ts=2)
    tracer.many("postcopy_start", ts=np.arange(3))
    trace = read(published(buffer))
    assert trace["postcopy_place_page"]["host_addr"].tolist() == [2**64 - 1]
    assert trace["postcopy_start"]["ts_ns"].tolist() == [0, 1, 2]


# --- a buffer that is full, a drain, other processes ---


def test_records_that_find_no_room_are_counted_and_the_trace_says_so():
    buffer = new_buffer(HEAD + 3 * 32)
    tracer = Tracer(buffer, {"postcopy_start", "postcopy_place_page"}, tid=1)
    for _ in range(5):
        tracer.postcopy_start()
    tracer.many("postcopy_place_page", np.arange(10), ts=1)
    file = io.BytesIO()
    Drain(buffer, file).close()
    trace = read(file.getvalue())
    assert trace.n_records == 3
    assert trace.dropped == 12
    assert "12 records are missing" in trace.warnings[0]


def test_many_fills_the_last_room_before_it_drops():
    buffer = new_buffer(HEAD + 3 * 40)
    Tracer(buffer, {"postcopy_place_page"}, tid=1).many(
        "postcopy_place_page", np.arange(10), ts=np.arange(10)
    )
    file = io.BytesIO()
    Drain(buffer, file).close()
    trace = read(file.getvalue())
    assert trace["postcopy_place_page"]["host_addr"].tolist() == [0, 1, 2]
    assert trace.dropped == 7


def test_a_drain_copies_everything_and_gives_the_memory_back():
    fd = create_buffer()
    buffer = map_buffer(fd)
    file = io.BytesIO()
    drain = Drain(buffer, file)
    tracer = Tracer(buffer, {"postcopy_place_page"}, tid=1)
    total = 0
    for begin in range(0, 300_000, 50_000):
        numbers = np.arange(begin, begin + 50_000)
        tracer.many("postcopy_place_page", numbers, ts=numbers)
        total += drain.pump()
        assert os.fstat(fd).st_blocks * 512 <= 3 * 4096
    drain.close()
    drain.close()
    tracer.close()
    buffer.close()
    os.close(fd)
    assert total == len(file.getvalue())
    rows = read(file.getvalue())["postcopy_place_page"]
    assert np.array_equal(rows["host_addr"], np.arange(300_000))


_CHILD = """
import os, sys, time
from migkit.trace import Tracer, map_buffer
tracer = Tracer(map_buffer(int(sys.argv[1])), {"postcopy_place_page"}, tid=os.getpid())
for address in range(1, 1001):
    tracer.postcopy_place_page(address, ts=address)
print("emitted", flush=True)
while True:
    for _ in range(200):
        tracer.postcopy_place_page(0)
    time.sleep(0.001)
"""


def test_another_process_reads_whole_records_live_and_after_a_sigkill():
    fd = create_buffer()
    buffer = map_buffer(fd)
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(fd)], pass_fds=[fd], stdout=subprocess.PIPE
    )
    try:
        assert child.stdout.readline() == b"emitted\n"
        for _ in range(20):
            live = read(published(buffer))
            assert live.warnings == ()
            assert live["postcopy_place_page"]["host_addr"][:1000].tolist() == list(range(1, 1001))
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait(10)
        child.stdout.close()
    file = io.BytesIO()
    Drain(buffer, file).close()
    trace = read(file.getvalue())
    assert trace.warnings == ()
    assert trace.n_records >= live.n_records
    assert set(trace["postcopy_place_page"]["tid"].tolist()) == {child.pid}
    buffer.close()
    os.close(fd)


# --- traces that are cut, killed, foreign or damaged ---


def test_a_trace_cut_off_at_any_byte_yields_what_it_holds():
    whole = small_trace()
    ends = [HEAD, HEAD + 32, HEAD + 32 + 66, HEAD + 32 + 66 + 40, len(whole)]
    for cut in range(len(whole) + 1):
        trace = read(whole[:cut])
        assert trace.n_records == sum(end <= cut for end in ends[1:])
        if cut in ends:
            assert trace.warnings == ()
            assert trace.missing_bytes == 0
        elif cut > HEAD:
            assert trace.missing_bytes == cut - max(end for end in ends if end <= cut)
            assert "not closed properly" in trace.warnings[0]


def test_a_file_is_read_as_its_bytes_are(tmp_path):
    path = tmp_path / "source.trace"
    path.write_bytes(small_trace())
    assert read(path)["postcopy_start"].tolist() == read(small_trace())["postcopy_start"].tolist()
    path.write_bytes(b"")
    assert "holds no records" in read(str(path)).warnings[0]


@pytest.mark.parametrize("zeros", [1, 7, 8, 19, 20, 33, 5000])
def test_zeros_after_the_last_record_are_a_killed_writer_not_corruption(zeros):
    trace = read(small_trace() + bytes(zeros))
    assert trace.n_records == 4
    assert trace.missing_bytes == zeros
    assert "not closed properly" in trace.warnings[0]


def test_events_that_the_registry_lacks_are_counted_not_fatal():
    raw = small_trace() + mapping_record(600, "vmstate_save") + record(600, b"anything") * 3
    trace = read(raw + record(0, struct.pack("=L3s", 3, b"abc")))
    assert trace.unknown == {"vmstate_save": 3}
    assert trace.n_records == 8
    assert "vmstate_save (3)" in trace.warnings[0]
    assert trace["migrate_set_state"]["new_state"].tolist() == ["abc"]
    with pytest.raises(MissingEventError, match="no event 'vmstate_save'"):
        trace["vmstate_save"]


def test_an_event_that_did_not_occur_is_an_empty_array():
    assert read(small_trace())["postcopy_place_page"]["host_addr"].size == 0


def test_dropped_records_of_a_trace_are_added_up():
    trace = read(small_trace() + dropped_record(3, 1, 1) + dropped_record(4, 1, 1))
    assert trace.dropped == 7
    assert trace.n_records == 4


PLACE = REGISTRY["postcopy_place_page"].id
STATE = REGISTRY["migrate_set_state"].id


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        (struct.pack("=Q", 7), f"offset {HEAD}: expected a record's type, 0 or 1, got 0x7"),
        (record(999), f"offset {HEAD + 8}: expected an event id that a mapping record names"),
        (record(1 << 40, b"12345678"), r"got 0x10000000000"),
        (record(PLACE, length=23), f"offset {HEAD + 24}: expected a record's length, 24 or more"),
        (record(PLACE, bytes(16)), rf"offset {HEAD}: expected .*place_page\(void \* host_addr\)"),
        (record(PLACE, bytes(4)), "got 4 bytes that do not hold exactly these"),
        (record(PLACE, length=1 << 31), "expected 8 to 8 bytes of arguments"),
        (record(STATE, length=1 << 31), "expected 4 to 516 bytes of arguments"),
        (record(STATE, struct.pack("=L", 9) + b"short"), r"migrate_set_state\(const char \*"),
        (record(2**64 - 2, b""), "expected the length of a record of dropped events"),
        (mapping_record(0, "other"), "mapped to other, but was mapped to migrate_set_state before"),
        (mapping_record(500, "a b"), "expected an event's name, got 'a b'"),
        (struct.pack("=QQL", 0, 5, 1 << 30), "expected the length of an event's name"),
        (mapping_record(1 << 20, "name"), "expected an event id up to"),
    ],
)
def test_a_malformed_record_is_named_with_its_offset(tail, message):
    buffer = new_buffer()
    Tracer(buffer, (), tid=1)
    with pytest.raises(TraceFormatError, match=message):
        read(published(buffer) + tail)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\x7fELF" + bytes(60), "expected a simpletrace header"),
        (b"short", "expected a simpletrace header"),
        (struct.pack("=QQQ", 2**64 - 1, 0xF2B177CB0AA429B4, 3), "got version 3"),
        (struct.pack(">QQQ", 2**64 - 1, 0xF2B177CB0AA429B4, 4), "the other byte order"),
    ],
)
def test_what_is_no_trace_of_version_4_is_refused(raw, message):
    with pytest.raises(TraceFormatError, match=message):
        read(raw)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_a_damaged_trace_is_read_or_refused_but_never_crashes(data):
    raw = bytearray(small_trace())
    begin = data.draw(st.sampled_from([0, HEAD]))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(begin, len(raw) - 1))
        raw[at] = data.draw(st.integers(0, 255))
    try:
        trace = read(bytes(raw))
    except TraceFormatError as error:
        assert "offset" in str(error)  # noqa: PT017 -- or it may be read without an error
        return
    list(format_log(trace))


def test_a_long_trace_whose_payloads_look_like_records_is_read_right():
    payload = record(PLACE, struct.pack("=Q", 1)) + record(PLACE, struct.pack("=Q", 1))
    registry = Registry.load()
    decoy = registry["migrate_set_state"]
    names = mapping_record(decoy.id, decoy.name) + mapping_record(PLACE, "postcopy_place_page")
    rng = np.random.default_rng(1)
    parts, numbers = [], []
    for number in range(20_000):
        if rng.integers(3):
            parts.append(record(PLACE, struct.pack("=Q", number)))
            numbers.append(number)
        else:
            text = payload[: rng.integers(len(payload))]
            parts.append(record(decoy.id, struct.pack("=L", len(text)) + text))
        if number % 5000 == 4999:
            parts.append(names)
    trace = read(header() + names + b"".join(parts))
    assert trace.n_records == 20_000
    assert trace["postcopy_place_page"]["host_addr"].tolist() == numbers


# --- the registry ---


def test_the_built_in_registry_describes_and_groups_every_event():
    assert REGISTRY.groups == {"migration", "savevm", "faults", "transfer", "ram"}
    assert all(event.doc and event.group for event in REGISTRY)
    assert [event.id for event in REGISTRY] == list(range(len(REGISTRY)))


def test_patterns_choose_events_by_name_glob_and_group():
    every = {event.name for event in REGISTRY}
    assert REGISTRY.select(["all"]) == REGISTRY.select(["*"]) == every
    assert REGISTRY.select(["none"]) == REGISTRY.select([]) == frozenset()
    assert REGISTRY.select(["ram_save_r*"]) == {"ram_save_range", "ram_save_round"}
    assert REGISTRY.select(["transfer", "-ram_save_*"]) == {"ram_load_range"}
    assert REGISTRY.select(["-transfer", "postcopy_start"]) == {"postcopy_start"}
    default = REGISTRY.select(DEFAULT_PATTERNS)
    assert {"migrate_set_state", "savevm_send_ping", "ram_load_range"} <= default
    assert "ram_load_postcopy_loop" not in default


@pytest.mark.parametrize("pattern", ["fault", "-fault"])
def test_a_pattern_that_matches_nothing_is_an_error_that_helps(pattern):
    with pytest.raises(OptionError, match=r"'fault' matches no trace event.*did you mean 'faults'"):
        REGISTRY.select([pattern])


QEMU_EVENTS = r"""
# See docs/devel/tracing.rst for syntax documentation.

# block.c
disable nbd_error(const char *msg) "sending error message \"%s\""
vcpu guest_cpu_enter(void)
multifd_recv(uint8_t id, uint64_t packet_num, bool used) "channel %u packet %" PRIu64 " used %d"
vfio_region(const char *name, ssize_t ret, void *p, const void * q) "%s %zd %p %p"
odd_types(unsigned u, long l, unsigned long long ull, int8_t i, char c) "%u %ld %llu %"PRIi8" %c"
"""


def test_a_trace_events_file_of_qemu_is_understood(tmp_path):
    path = tmp_path / "trace-events"
    path.write_text(QEMU_EVENTS)
    registry = Registry.load(path)
    assert [event.name for event in registry if event.disabled] == ["nbd_error"]
    assert registry["nbd_error"].format_args(["no"]) == 'sending error message "no"'
    assert registry["guest_cpu_enter"].format_args([]) == ""
    assert registry["multifd_recv"].format_args([3, 1 << 40, 1]) == (
        "channel 3 packet 1099511627776 used 1"
    )
    assert registry["vfio_region"].format_args(["bar", -22, 0, 4096]) == "bar -22 (nil) 0x1000"
    odd = registry["odd_types"]
    assert [(arg.bits, arg.is_signed) for arg in odd.args] == [
        (32, False), (64, True), (64, False), (8, True), (8, True),
    ]  # fmt: skip
    assert odd.format_args([-1, -1, -1, 200, 65]) == "4294967295 -1 18446744073709551615 -56 A"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not an event", "expected name"),
        ("quick event(void)", "unknown property quick"),
        ("event(struct x *p) %p", "the format is malformed|unknown macro|prints"),
        ('event(float f) "%d"', "argument type 'float' is not allowed"),
        ('event(int) "%d"', "expected 'type name' for an argument"),
        ('event(int a) "%d %d"', "prints 2 values of 1 arguments"),
        ('event(int a) "%y"', "starts no conversion"),
        ('event(int a) "%" PRIz', "unknown macro PRIz"),
        ('event(int a) "%d', "the format is malformed"),
        ("twice(void)\ntwice(void)", "twice is declared twice"),
    ],
)
def test_a_malformed_line_is_named_with_file_and_line(tmp_path, line, message):
    path = tmp_path / "trace-events"
    path.write_text(f"# a comment\n{line}\n")
    with pytest.raises(TraceFormatError, match=rf"trace-events, line [23]: .*({message})"):
        Registry.load(path)


def test_an_unknown_event_of_the_registry_is_named_with_the_closest_ones():
    with pytest.raises(MissingEventError, match="did you mean 'postcopy_start'"):
        REGISTRY["postcopy_strt"]


# --- printing as QEMU does; the lines are from logs of QEMU 7.2 ---


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("migrate_set_state new state active", ["active"]),
        ("get_queued_page pc.ram/0x1ed7000 page_abs=0x1ed7", ["pc.ram", 0x1ED7000, 0x1ED7]),
        ("ram_save_queue_pages pc.ram: start: 0x1ed7000 len: 0x1000", ["pc.ram", 0x1ED7000, 4096]),
        ("savevm_section_end ram, section_id 2 -> 0", ["ram", 2, 0]),
        (
            "migrate_handle_rp_req_pages in pc.ram at 0x1ed7000 len 0x1000",
            ["pc.ram", 32337920, 4096],
        ),
        ("savevm_command_send com=0x2 len=4", [2, 4]),
        ("postcopy_discard_send_range pc.ram:102/4", ["pc.ram", 0x102, 4]),
        (
            "runstate_set current_run_state 9 (running) new_state 7 (finish-migrate)",
            [9, "running", 7, "finish-migrate"],
        ),
        ("migration_return_path_end_after 0", [0]),
        ("migration_return_path_end_after -5", [-5]),
        (
            (
                "postcopy_ram_fault_thread_request Request for HVA=0x7f0421cd7000 rb=pc.ram "
                "offset=0x1ed7000 pid=15334"
            ),
            [0x7F0421CD7000, "pc.ram", 0x1ED7000, 15334],
        ),
        ("postcopy_page_req_add new page req 0x7f0421cd7000 total 1", [0x7F0421CD7000, 1]),
        ("ram_discard_range pc.ram: start: 0 20000000", ["pc.ram", 0, 0x20000000]),
        ("postcopy_ram_enable_notify ", []),
    ],
)
def test_arguments_print_as_in_the_log_of_qemu(line, values):
    name, args = line.split(" ", 1)
    assert REGISTRY[name].format_args(values) == args


@pytest.mark.parametrize(
    ("declaration", "value", "printed"),
    [
        ('e(int a) "%x"', -1, "ffffffff"),
        ('e(int64_t a) "%" PRIx64', -1, "ffffffffffffffff"),
        ('e(uint32_t a) "%d"', 0xFFFFFFFF, "-1"),
        ('e(uint16_t a) "%ud"', 70000, "4464d"),
        ('e(uint32_t a) "%#x %%"', 255, "0xff %"),
        ('e(uint32_t a) "%#x"', 0, "0"),
        ('e(uint32_t a) "%08x"', 255, "000000ff"),
        ('e(uint32_t a) "%#8x|"', 255, "    0xff|"),
        ('e(uint64_t a) "%-8.4" PRIx64 "|"', 255, "00ff    |"),
        ('e(const char *a) "%5.2s|"', "abc", "   ab|"),
    ],
)
def test_conversions_follow_c(tmp_path, declaration, value, printed):
    path = tmp_path / "trace-events"
    path.write_text(declaration + "\n")
    assert Registry.load(path)["e"].format_args([value]) == printed


def test_the_wrong_number_of_values_to_print_is_an_error():
    with pytest.raises(OptionError, match="takes 1 arguments, got 0"):
        REGISTRY["migrate_set_state"].format_args([])


def test_a_log_is_ordered_by_time_whatever_the_order_in_the_file():
    buffer = new_buffer()
    tracer = Tracer(buffer, REGISTRY.select(["all"]), tid=15339)
    tracer.postcopy_page_req_add(0x7F0421CD7000, 1, ts=12_000_120_999)
    tracer.postcopy_ram_enable_notify(ts=11_000_000_000)
    tracer.migration_return_path_end_after(-5, ts=12_000_120_999)
    assert list(format_log(read(published(buffer)))) == [
        "15339@11.000000:postcopy_ram_enable_notify ",
        "15339@12.000120:postcopy_page_req_add new page req 0x7f0421cd7000 total 1",
        "15339@12.000120:migration_return_path_end_after -5",
    ]
    assert list(format_log(read(header()))) == []


def test_an_argument_named_as_a_common_field_is_told_apart(tmp_path):
    path = tmp_path / "trace-events"
    path.write_text('e(int seq, int from, int ts) "%d %d %d"\n')
    registry = Registry.load(path)
    buffer = new_buffer()
    Tracer(buffer, {"e"}, registry=registry, tid=1).e(5, 6, 7, ts=8)
    rows = read(published(buffer), registry)["e"]
    assert rows[["ts_ns", "seq_", "from", "ts"]].tolist() == [(8, 5, 6, 7)]

"""Traces of QEMUs that the samples know nothing of: each says the truth, or why it does not.

The excerpts are lines that QEMU 7.2.22 wrote (Debian 12; a guest of 32 MiB under TCG with one
vCPU, whose boot sector increments one byte a page in pseudo-random order, as in
traces/record_qemu.py); what was set up is said at each.
"""

import lzma
import re

import numpy as np
import pytest

import migkit
from migkit.analysis.samples import TRACES
from migkit.errors import MissingEventError, ProtocolError, TraceFormatError
from migkit.migration.states import is_known
from migkit.testing import assert_fault_latency, assert_no_violations, assert_states

RECOVERED = TRACES / "qemu-7.2-recovered"
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*no trace of the", "ignore:.*registry lacks", "ignore:.*cut off"
)

# xbzrle, 4 MiB/s at first: the guest writes to 2,048 pages, a scan can find no more.
ROUNDS = """\
24199@1795606900.978743:runstate_set current_run_state 6 (prelaunch) new_state 9 (running)
24199@1795606903.985343:migrate_set_state new state setup
24222@1795606903.987584:migration_bitmap_sync_start\x20
24222@1795606903.988059:migration_bitmap_sync_end dirty_pages 0
24222@1795606903.988088:migrate_set_state new state active
24222@1795606906.098775:migration_bitmap_sync_start\x20
24222@1795606906.098813:migration_bitmap_sync_end dirty_pages 2048
24222@1795606907.926784:migration_bitmap_sync_start\x20
24222@1795606907.926834:migration_bitmap_sync_end dirty_pages 1806
24222@1795606908.133055:migration_bitmap_sync_start\x20
24222@1795606908.134109:migration_bitmap_sync_end dirty_pages 2048
24222@1795606908.139281:migration_bitmap_sync_start\x20
24222@1795606908.139307:migration_bitmap_sync_end dirty_pages 3590
24222@1795606908.146541:migration_bitmap_sync_start\x20
24222@1795606908.146987:migration_bitmap_sync_end dirty_pages 4670
24222@1795606908.150498:migration_bitmap_sync_start\x20
24222@1795606908.150515:migration_bitmap_sync_end dirty_pages 6083
24222@1795606908.154520:migration_bitmap_sync_start\x20
24222@1795606908.154538:migration_bitmap_sync_end dirty_pages 7368
24222@1795606908.156125:migration_bitmap_sync_start\x20
24222@1795606908.156146:migration_bitmap_sync_end dirty_pages 7368
24222@1795606908.156156:runstate_set current_run_state 9 (running) new_state 7 (finish-migrate)
24222@1795606908.156324:migration_bitmap_sync_start\x20
24222@1795606908.156347:migration_bitmap_sync_end dirty_pages 7368
24222@1795606908.157289:migrate_set_state new state completed
24222@1795606908.157293:runstate_set current_run_state 7 (finish-migrate) new_state 5 (postmigrate)
"""

# postcopy-preempt: page 0x157b is requested and taken off the queue, 0x17a0 goes unasked before
# the source hears of the request.
PREEMPT_SOURCE = """\
24483@1795606931.855289:migrate_handle_rp_req_pages in pc.ram at 0x157b000 len 0x1000
24487@1795606931.855513:get_queued_page pc.ram/0x157b000 page_abs=0x157b
24487@1795606931.855516:postcopy_preempt_send_host_page ramblock pc.ram offset 0x157b
24487@1795606931.868969:postcopy_preempt_send_host_page ramblock pc.ram offset 0x17a0
24487@1795606931.868970:postcopy_preempt_send_host_page ramblock pc.ram offset 0x17a1
24483@1795606931.870529:migrate_handle_rp_req_pages in (null) at 0x17a0000 len 0x1000
24487@1795606931.870549:get_queued_page_not_dirty pc.ram/0x17a0000 page_abs=0x17a0
"""
PREEMPT_DESTINATION = """\
24471@1795606931.249602:postcopy_init_range pc.ram: 0x7f65c9e00000 offset=0x0 length=0x2000000
24490@1795606931.855223:postcopy_ram_fault_thread_request Request for HVA=0x7f65cb37b000 \
rb=pc.ram offset=0x157b000 pid=24474
24490@1795606931.855256:postcopy_page_req_add new page req 0x7f65cb37b000 total 1
24491@1795606931.855633:ram_load_postcopy_loop chan=1 addr=0x157b000 flags=0x8
24491@1795606931.855762:postcopy_place_page host=0x7f65cb37b000
24490@1795606931.868848:postcopy_ram_fault_thread_request Request for HVA=0x7f65cb5a0000 \
rb=pc.ram offset=0x17a0000 pid=24474
24490@1795606931.868850:postcopy_page_req_add new page req 0x7f65cb5a0000 total 1
24492@1795606931.871074:ram_load_postcopy_loop chan=0 addr=0x17a0000 flags=0x28
24492@1795606931.871090:postcopy_place_page host=0x7f65cb5a0000
"""

# One QEMU, cancelled at first, then let through.
TWICE = """\
26072@1795607100.695995:migrate_set_state new state setup
26082@1795607100.715150:migrate_set_state new state active
26082@1795607100.715152:migration_thread_setup_complete\x20
26072@1795607101.222630:migrate_set_state new state cancelling
26072@1795607101.311640:migrate_set_state new state cancelled
26072@1795607101.312293:migrate_set_state new state setup
26088@1795607101.326823:migrate_set_state new state active
26088@1795607101.326826:migration_thread_setup_complete\x20
26088@1795607101.371152:migrate_set_state new state completed
"""

# x-ignore-shared: its name is in the configuration, and each block's address behind its size.
IGNORE_SHARED = bytes.fromhex("""\
5145564d00000003070000000d70632d6934343066782d372e32051a636f6e66696775726174696f6e2f636170616269
6c697469657300000001000000010f782d69676e6f72652d73686172656401000000020372616d000000000000000400
00000003092004026d300000000002000000000000000000000015303030303a30303a30322e302f7667612e7672616d
000000000100000000000000fd000000142f726f6d406574632f616370692f7461626c65730000000000020000000000
00000000000770632e62696f73000000000004000000000000fffc00000670632e726f6d000000000002000000000000
000c000014303030303a30303a30322e302f7667612e726f6d000000000001000000000000febe0000152f726f6d4065
74632f7461626c652d6c6f6164657200000000000010000000000000000000122f726f6d406574632f616370692f7273
64700000000000001000000000000000000000000000000000107e000000020200000002000000000000000815303030
""")


def load(tmp_path, **texts):
    """Open what two logs say."""
    paths = {}
    for side, text in texts.items():
        paths[side] = tmp_path / f"{side}.log"
        paths[side].write_bytes(text if isinstance(text, bytes) else text.encode())
    return migkit.load_qemu(**paths)


def log_of(side):
    return lzma.decompress((RECOVERED / f"{side}.log.xz").read_bytes())


def read_before_placing(run):
    """Return when the page of each fault was read: a record has no RAM block, its placing has."""
    records, read, placed = {}, {}, {}
    for line in log_of("destination").decode().splitlines():
        stamp, name, text = re.fullmatch(r"\d+@([\d.]+):(\w+) (.*)", line).groups()
        ts = int(stamp.replace(".", "")) * 1000
        if name == "ram_load_postcopy_loop":
            records[text.split("addr=")[1].split()[0]] = ts
        elif name == "postcopy_ram_fault_thread_request":
            placed[re.search(r"HVA=(\w+)", text)[1]] = re.search(r"offset=(\w+)", text)[1]
        elif name.startswith("postcopy_place_page"):
            host = text.removeprefix("host=")
            if host in placed:
                read[host] = records[placed[host]]
    bases = {block["name"]: block["address"] for block in run.meta["blocks"]}
    faults = zip(run.faults["block"], run.faults["offset"], strict=True)
    return [read[f"{bases[block] + offset:#x}"] for block, offset in faults]


@pytest.fixture(scope="module")
def recovered():
    return migkit.sample("qemu-7.2-recovered")


# Two RAM blocks; a post-copy that was paused and went on.


def test_nothing_is_held_against_a_qemu_that_recovers(recovered):
    assert_no_violations(recovered)
    assert_states(
        recovered,
        ["setup", "active", "postcopy-active", "postcopy-paused", "postcopy-recover",
         "postcopy-active", "completed"],
    )  # fmt: skip


def test_requests_are_those_that_query_migrate_counts(recovered):
    # The one that was outstanding at the break was sent again: it is one request, but two messages.
    heard = len(recovered.event("migrate_handle_rp_req_pages"))
    assert heard == recovered.meta["query_migrate"]["src"]["ram"]["postcopy-requests"] == 41
    assert len(recovered.requests) == 40
    assert recovered.requests["answered"].all()


def test_each_page_is_one_of_its_own_ram_block(recovered):
    sizes = {block["name"]: block["size"] // 4096 for block in recovered.meta["blocks"]}
    for frame in (recovered.faults, recovered.transfer, recovered.requests):
        assert set(frame["block"]) >= {"low", "high"}
        assert frame["page"].min() >= 0
        assert (frame["page"] < frame["block"].map(sizes)).all()
    placed = log_of("destination").count(b":postcopy_place_page")
    assert len(recovered.transfer) == placed
    faults = recovered.faults
    wanted = np.array(read_before_placing(recovered))
    known = faults["received_ns"].notna().to_numpy()
    assert faults["received_ns"][known].tolist() == wanted[known].tolist()
    assert (wanted[~known] < faults["read_ns"][~known]).all()  # it was on its way in already
    assert known.sum() >= 35
    ram = recovered.meta["query_migrate"]["src"]["ram"]["total"]
    assert recovered.summary().memory_bytes == ram == sum(sizes.values()) * 4096


def test_with_the_destination_alone_its_faults_are_there(tmp_path, recovered):
    run = load(tmp_path, destination=log_of("destination"))
    summary = run.summary()
    assert summary.faults == {"unknown": 40}
    assert "unknown 40" in str(summary)
    assert run.query_blocktime() == recovered.query_blocktime()
    assert run.requests["wasted"].isna().all()
    assert_fault_latency(run, max_us=1e6, at_least=40)


def test_a_cut_off_destination_does_not_accuse_the_source(tmp_path):
    text = log_of("destination")
    end = text.index(b"\n", text.rindex(b"postcopy_ram_fault_thread_request"))
    run = load(tmp_path, source=log_of("source"), destination=text[: end + 1])
    found = run.check()
    assert found.empty
    assert "does not reach its end" in found.attrs["not_checked"]["requests-answered"]


def test_lines_in_any_order_say_how_it_ended(tmp_path):
    lines = log_of("source").splitlines(keepends=True)
    run = load(tmp_path, source=b"".join(reversed(lines)))
    assert run.status == "completed"


# Pre-copy.


def test_a_scan_finds_what_was_written_since_the_one_before(tmp_path):
    run = load(tmp_path, source=ROUNDS)
    found = run.rounds["dirty_pages"].iloc[1:].tolist()
    assert found == [2048, 1806, 2048, 1542, 1080, 1413, 1285, 0]
    assert run.working_set["pages"].max() == 2048
    assert run.phases["name"].tolist()[-1] == "switchover"
    assert run.phases["duration_ms"].iloc[-1] == pytest.approx(1.133)
    assert any("did not come to post-copy" in text for text in run.warnings)
    assert run.summary().memory_bytes == 0
    assert "RAM unknown" in str(run.summary())


def test_without_scans_precopy_is_a_phase_still(tmp_path):
    lines = [line for line in ROUNDS.splitlines(keepends=True) if "migrate_set_state" in line]
    run = load(tmp_path, source="".join(lines))
    assert run.phases["name"].tolist() == ["setup", "precopy"]
    for name in ("timeline", "downtime"):
        getattr(run.plot, name)()


def test_precopy_is_compared_with_postcopy(tmp_path, recovered):
    frame = migkit.compare(recovered, load(tmp_path, source=ROUNDS)).frame
    values = frame.pivot(index="figure", columns="run", values="value").iloc[:, ::-1]
    assert values.loc["total time"].notna().all()
    assert values.loc["blocktime"].isna().sum() == 1  # none was recorded: not 0


# The channel of requested pages.


def test_a_page_that_7_2_sends_unasked_is_no_answer(tmp_path):
    run = load(tmp_path, source=PREEMPT_SOURCE, destination=PREEMPT_DESTINATION)
    assert run.faults["resolution"].tolist() == ["requested", "in_flight"]
    assert run.requests["wasted"].tolist() == [False, True]
    assert "stages-in-order" in run.check().attrs["kept"]
    assert len(run.event("postcopy_preempt_send_host_page")) == 3


def test_what_7_2_sends_of_one_block_is_not_judged_by_the_requests_of_another(tmp_path):
    # GIVEN more requests for another RAM block than pages that were sent of this one
    source, destination = PREEMPT_SOURCE, PREEMPT_DESTINATION
    destination += (
        "24471@1795606931.249603:postcopy_init_range rom: 0x7f65d9e00000 offset=0x0 length=0x8000\n"
        "24490@1795606931.900000:postcopy_ram_fault_thread_request Request for HVA=0x7f65d9e01000 "
        "rb=rom offset=0x1000 pid=24474\n"
    )
    for page in range(4):
        begin = f"24487@1795606931.90010{page}:"
        source += f"{begin}get_queued_page rom/{page << 12:#x} page_abs={page:#x}\n"
        source += f"{begin}postcopy_preempt_send_host_page ramblock rom offset {page:#x}\n"
    # THEN the page that went unasked is no answer still
    faults = load(tmp_path, source=source, destination=destination).faults
    mine = faults[faults["block"] == "pc.ram"]
    assert mine["resolution"].tolist() == ["requested", "in_flight"]


# What is no trace of one side of one migration.


def test_a_log_of_two_migrations_is_refused(tmp_path):
    with pytest.raises(TraceFormatError, match=r"2 migrations, the last one begins at 1795607101"):
        load(tmp_path, source=TWICE)
    second = TWICE[TWICE.rindex("26072@1795607101.312293") :]
    assert load(tmp_path, source=second).status == "completed"


def test_logs_of_the_wrong_side_are_refused(tmp_path):
    source, destination = log_of("source"), log_of("destination")
    with pytest.raises(TraceFormatError, match=r"as the source's trace.*only at a destination"):
        load(tmp_path, source=destination, destination=source)
    with pytest.raises(TraceFormatError, match="two QEMUs wrote into one file"):
        load(tmp_path, source=source + destination)


def test_multifd_packets_are_frames(tmp_path):
    line = (
        "24141@1795606896.346647:multifd_send channel 0 packet_num 3 normal pages 128 "
        "flags 0x1 next packet size 524288\n"
    )
    run = load(tmp_path, source=line + ROUNDS)
    assert run.event("multifd_send")["normal"].tolist() == [128]


def test_an_unknown_event_of_one_side_is_a_frame(tmp_path):
    line = "24061@1795606885.002722:vmstate_load_state configuration v0\n"
    run = load(tmp_path, source=ROUNDS, destination=line + PREEMPT_DESTINATION)
    assert run.event("vmstate_load_state")["args"].tolist() == ["configuration v0"]


def test_a_missing_event_is_named_as_qemu_does(tmp_path):
    run = load(tmp_path, source="".join(ROUNDS.splitlines(keepends=True)[1:2]))
    with pytest.raises(MissingEventError, match=r"runstate_set \(of which guest_stopped is made\)"):
        run.need("guest_stopped")
    with pytest.raises(MissingEventError, match=r"did not occur, or .* -trace postcopy_place_page"):
        _ = run.transfer


@pytest.mark.parametrize(("old", "new"), [
    ("postcopy-paused", "postcopy-recover"), ("setup", "wait-unplug"), ("wait-unplug", "active"),
    ("active", "colo"), ("colo", "completed"),
])  # fmt: skip
def test_states_that_only_some_qemus_have_are_legal(old, new):
    assert is_known("source", old, new)
    assert not is_known("source", new, "setup") or new == "completed"


# Streams.


def test_a_stream_without_shared_memory_is_understood(tmp_path):
    file = tmp_path / "stream"
    file.write_bytes(IGNORE_SHARED)
    stream = migkit.stream(file)
    assert stream.blocks["m0"] == 32 << 20
    assert stream.blocks["0000:00:02.0/vga.vram"] == 16 << 20
    assert [re.sub(r"\d+", "N", text) for text in stream.warnings] == [
        "the stream is cut off within what begins at N"
    ]


@pytest.mark.parametrize(("begin", "what"), [
    ("112233440000000000", "a multifd channel"),
    ("08000a00070670632e72616d", "resumes a paused migration"),
    ("000000000157b0080670632e72616d", "the channel of requested pages"),
    ("89504e470d0a1a0a", "no migration stream"),
])  # fmt: skip
def test_a_channel_that_is_no_stream_is_called_what_it_is(tmp_path, begin, what):
    file = tmp_path / "channel"
    file.write_bytes(bytes.fromhex(begin) + bytes(100))
    with pytest.raises(ProtocolError, match=what):
        migkit.stream(file)


def test_pages_that_went_another_way_are_counted():
    whole = migkit.stream(TRACES / "qemu-7.2-relayed" / "stream.xz").summary()
    assert whole.absent == {}
    assert np.sum(list(whole.pages["pc.ram"].values())) >= 8192

"""Migration streams in files: real QEMU's, which our wire must be, and ours; whole or broken."""

import json
import lzma
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import migkit
from migkit.analysis import schema
from migkit.cli import main
from migkit.errors import OptionError, ProtocolError, TraceWarning
from migkit.migration import wire
from migkit.migration.wire import TARGET_PAGE, BlockLayout, Command, RamFlag

TRACES = Path(__file__).parents[1] / "traces"
PRECOPY = TRACES / "qemu-7.2-precopy" / "stream.xz"
POSTCOPY = TRACES / "qemu-7.2-relayed" / "stream.xz"

PAGE = bytes(range(256)) * 16


def ours():
    """A whole post-copy stream of ours: one block, a page, two zero pages, the CPU's state."""
    block = BlockLayout("pc.ram", 16 * TARGET_PAGE, TARGET_PAGE)
    zero = wire.page_header(3 * TARGET_PAGE, RamFlag.ZERO, None) + b"\0"
    zero += wire.page_header(4 * TARGET_PAGE, RamFlag.ZERO, None) + b"\0"
    page = wire.page_header(TARGET_PAGE, RamFlag.PAGE, "pc.ram") + PAGE
    package = wire.command(Command.POSTCOPY_LISTEN) + wire.device_state(2, b"\x7e\0\0\0\x02" * 9)
    package += wire.ping(3) + wire.command(Command.POSTCOPY_RUN)
    footer = wire.section_footer(1)
    again = wire.page_header(2 * TARGET_PAGE, RamFlag.PAGE, None) + PAGE
    return b"".join([
        wire.header(), wire.configuration("random"), wire.command(Command.OPEN_RETURN_PATH),
        wire.ping(1), wire.advise(TARGET_PAGE), wire.section_start(1, "ram", wire.RAM_VERSION),
        wire.ram_setup([block], postcopy=True), footer,
        wire.section_part(1), page, zero, wire.EOS, footer,
        wire.discard("pc.ram", [(TARGET_PAGE, 2 * TARGET_PAGE)]), wire.packaged(package),
        wire.section_part(1, end=True), again, wire.EOS, footer, b"\0",
    ])  # fmt: skip


@pytest.fixture
def decode(tmp_path):
    def decoded(data):
        file = tmp_path / "stream"
        file.write_bytes(data)
        return migkit.stream(file)

    return decoded


def check_gapless(frame, size):
    schema.check(frame, "stream")
    assert frame["offset"].tolist() == [0, *frame["bytes"].cumsum().tolist()][:-1]
    assert frame["bytes"].sum() == size


@pytest.mark.parametrize("file", [PRECOPY, POSTCOPY], ids=["precopy", "postcopy"])
def test_a_real_qemus_stream_is_decoded_to_its_last_byte(file):
    stream = migkit.stream(file)
    check_gapless(stream.frame, len(lzma.decompress(file.read_bytes())))
    summary = stream.summary()
    assert summary.ended
    assert "undecoded" not in summary.bytes
    assert sum(summary.bytes.values()) == summary.total_bytes
    assert {"pc.ram", "0000:00:02.0/vga.vram", "pc.bios"} <= set(stream.blocks)
    assert summary.machine == "pc-i440fx-7.2"


def test_devices_found_by_their_footers_have_the_sizes_that_qemu_describes():
    stream = migkit.stream(PRECOPY)
    assert stream.is_described
    assert stream.described == {}
    assert stream.summary().devices_checked
    assert len(stream.summary().device_bytes) == 29  # i8259 and dma are there twice


def test_pages_of_the_stream_are_those_that_qemu_counted():
    said = json.loads((POSTCOPY.parent / "query-migrate.json").read_text())["src"]["ram"]
    pages = migkit.stream(POSTCOPY).summary().pages.values()
    assert sum(counts.get("page", 0) for counts in pages) == said["normal"]
    assert sum(counts.get("zero", 0) for counts in pages) == said["duplicate"]


def test_qemus_postcopy_has_our_order_of_commands():
    frame = migkit.stream(POSTCOPY).frame
    commands = frame.loc[frame["command"].notna(), "command"].tolist()
    assert list(dict.fromkeys(commands)) == [
        "OPEN_RETURN_PATH", "PING", "POSTCOPY_ADVISE", "POSTCOPY_RAM_DISCARD", "PACKAGED",
        "POSTCOPY_LISTEN", "POSTCOPY_RUN",
    ]  # fmt: skip
    pings = frame.loc[frame["command"] == "PING", "detail"].tolist()
    assert pings == ["0x1", "0x2", "0x3", "0x4"]
    inside = frame[frame["packaged"]]
    assert inside["command"].dropna().tolist() == ["POSTCOPY_LISTEN", "PING", "POSTCOPY_RUN"]
    assert set(inside["section"]) == {"command", "full", "footer"}


def test_pages_come_once_after_the_guest_has_moved():
    """WHEN post-copy runs, THEN no page of a block is sent twice."""
    frame = migkit.stream(POSTCOPY).frame
    run = frame.index[frame["command"] == "POSTCOPY_RUN"][0]
    for _, rows in frame[run:].dropna(subset=["start"]).groupby("block"):
        pages = np.concatenate(
            [np.arange(a, b, TARGET_PAGE) for a, b in zip(rows["start"], rows["end"], strict=True)]
        )
        assert len(set(pages.tolist())) == len(pages)


def test_ours_is_decoded_by_the_same_reader(decode):
    stream = decode(ours())
    check_gapless(stream.frame, len(ours()))
    summary = stream.summary()
    assert summary.postcopy
    assert summary.ended
    assert summary.pages == {"pc.ram": {"page": 2, "zero": 2}}
    assert summary.device_bytes == {"cpu": 4 + 45}
    zeros = stream.frame[stream.frame["flags"] == "zero"]
    assert zeros[["start", "end", "pages"]].to_numpy().tolist() == [[0x3000, 0x5000, 2]]
    discard = stream.frame[stream.frame["command"] == "POSTCOPY_RAM_DISCARD"].iloc[0]
    assert (discard["block"], discard["pages"], discard["detail"]) == ("pc.ram", 2, "0x1000+0x2000")


def test_what_is_no_stream_is_refused(decode, tmp_path):
    with pytest.raises(ProtocolError, match="magic 0x7f454c46"):
        decode(b"\x7fELF" + bytes(100))
    with pytest.raises(ProtocolError, match="ends within the header"):
        decode(ours()[:5])
    with pytest.raises(OptionError, match="No such file"):
        migkit.stream(tmp_path / "none")


def test_huge_pages_and_encoded_pages_are_stepped_over(decode):
    blocks = [BlockLayout("huge", 1 << 21, 1 << 21), BlockLayout("small", 1 << 20, TARGET_PAGE)]
    xbzrle = wire.page_header(0x2000, 0x40, "small") + b"\x01\0\x03abc"
    zero = wire.page_header(0x3000, RamFlag.ZERO, None) + b"\0"
    data = b"".join([
        wire.header(), wire.advise(TARGET_PAGE | 1 << 21), wire.section_start(1, "ram", 4),
        wire.ram_setup(blocks, postcopy=True), wire.section_footer(1), wire.section_part(1),
        xbzrle, zero, wire.EOS, wire.section_footer(1), b"\0",
    ])  # fmt: skip
    stream = decode(data)
    assert stream.blocks == {"huge": 1 << 21, "small": 1 << 20}
    assert stream.summary().pages == {"small": {"xbzrle": 1, "zero": 1}}


def test_a_stream_cut_anywhere_gives_what_there_is(decode):
    data = ours()
    for cut in range(8, len(data), 97):
        with pytest.warns(TraceWarning, match="cut off"):
            stream = decode(data[:cut])
        check_gapless(stream.frame, cut)
        assert not stream.summary().ended


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_broken_bytes_never_lose_any_or_crash(tmp_path_factory, data):
    whole = bytearray(ours())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(8, len(whole) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.mktemp("broken") / "stream"
    file.write_bytes(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TraceWarning)
        stream = migkit.stream(file)
    check_gapless(stream.frame, len(whole))


def test_what_claims_too_much_is_told_with_its_place(decode):
    begin = ours()[:8]
    endless = begin + wire.section_start(7, "endless", 1, full=True) + bytes(17 << 20)
    with pytest.warns(TraceWarning, match="stream at .*'endless': no footer within"):
        stream = decode(endless)
    check_gapless(stream.frame, len(endless))
    package = begin + wire.command(Command.PACKAGED, b"\xff\xff\xff\xff")
    with pytest.warns(TraceWarning, match="a package of 4294967295 bytes"):
        decode(package)


def test_the_command_prints_a_summary_and_fails_for_half_a_stream(tmp_path, capsys):
    file = tmp_path / "stream"
    file.write_bytes(ours())
    assert main(["stream", str(file)]) == 0
    assert "with post-copy" in capsys.readouterr().out
    assert main(["stream", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["commands"]["PING"] == 2
    assert main(["stream", str(file), "--rows"]) == 0
    assert capsys.readouterr().out.startswith("offset,bytes,section")
    file.write_bytes(ours()[:-20])
    with pytest.warns(TraceWarning, match="cut off"):
        assert main(["stream", str(file)]) == 1
    assert main(["stream", str(tmp_path / "none")]) == 2

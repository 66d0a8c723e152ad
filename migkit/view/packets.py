"""Writing Perfetto packets: tracks, slices, instants and counters, one after the other to a file.

A Perfetto trace is a protobuf ``Trace``, a sequence of ``TracePacket``; writing each packet as it
comes keeps memory small. See https://perfetto.dev/docs/reference/synthetic-track-event.
"""

from __future__ import annotations

from typing import IO, Any

from migkit.errors import CapabilityError

_SEQUENCE = 1  # one writer, so one sequence of packets
_FIRST_PACKET = 1  # SEQ_INCREMENTAL_STATE_CLEARED
_BEGIN, _END, _INSTANT, _COUNTER = 1, 2, 3, 4  # TrackEvent.Type
_PACKET_FIELD = b"\x0a"  # field 1 of Trace, with a length


class PacketWriter:
    """Appends packets to a binary file; tracks are named by the numbers that it gives them."""

    def __init__(self, file: IO[bytes]) -> None:
        """Take a file; CapabilityError if the package ``perfetto`` is missing."""
        try:
            from perfetto.protos.perfetto.trace import perfetto_trace_pb2  # noqa: PLC0415
        except ImportError as error:
            raise CapabilityError(
                "a Perfetto trace is written with the package perfetto, which is not there: "
                "pip install 'migkit[perfetto]'"
            ) from error
        self._file = file
        self._packet: Any = perfetto_trace_pb2.TracePacket
        self._tracks = 0
        self._first = True

    def process(self, name: str, pid: int) -> int:
        """Return a new track for a process."""
        packet, uuid = self._descriptor()
        packet.track_descriptor.process.pid = pid
        packet.track_descriptor.process.process_name = name
        self._put(packet)
        return uuid

    def thread(self, name: str, pid: int, tid: int, parent: int) -> int:
        """Return a new track for a thread of a process."""
        packet, uuid = self._descriptor(parent)
        packet.track_descriptor.thread.pid = pid
        packet.track_descriptor.thread.tid = tid
        packet.track_descriptor.thread.thread_name = name
        self._put(packet)
        return uuid

    def track(self, name: str, parent: int) -> int:
        """Return a new track below another; those of one name are shown as one with rows."""
        packet, uuid = self._descriptor(parent)
        packet.track_descriptor.name = name
        self._put(packet)
        return uuid

    def counter(self, name: str, parent: int) -> int:
        """Return a new track of values."""
        packet, uuid = self._descriptor(parent)
        packet.track_descriptor.name = name
        packet.track_descriptor.counter.SetInParent()
        self._put(packet)
        return uuid

    def slice(
        self, track: int, name: str, begin_ns: int, end_ns: int, flow: int | None = None
    ) -> None:
        """Write a slice; slices with the same ``flow`` are connected by arrows, in their order."""
        self.begin(track, name, begin_ns, flow)
        self.end(track, max(begin_ns, end_ns))

    def begin(self, track: int, name: str, ts_ns: int, flow: int | None = None) -> None:
        """Begin a slice, within those that have begun on the track and not ended."""
        packet = self._event(track, _BEGIN, ts_ns)
        packet.track_event.name = name
        if flow is not None:
            packet.track_event.flow_ids.append(flow)
        self._put(packet)

    def end(self, track: int, ts_ns: int) -> None:
        """End the slice that began last on the track."""
        self._put(self._event(track, _END, ts_ns))

    def instant(self, track: int, name: str, ts_ns: int, args: str) -> None:
        """Write an event that takes no time, with its arguments as text."""
        packet = self._event(track, _INSTANT, ts_ns)
        packet.track_event.name = name
        if args:
            note = packet.track_event.debug_annotations.add()
            note.name, note.string_value = "args", args
        self._put(packet)

    def value(self, track: int, ts_ns: int, value: int) -> None:
        """Write a counter's value."""
        packet = self._event(track, _COUNTER, ts_ns)
        packet.track_event.counter_value = value
        self._put(packet)

    def _descriptor(self, parent: int = 0) -> tuple[Any, int]:
        self._tracks += 1
        packet = self._packet()
        packet.track_descriptor.uuid = self._tracks
        if parent:
            packet.track_descriptor.parent_uuid = parent
        return packet, self._tracks

    def _event(self, track: int, kind: int, ts_ns: int) -> Any:
        packet = self._packet()
        packet.timestamp = ts_ns
        packet.track_event.type = kind
        packet.track_event.track_uuid = track
        return packet

    def _put(self, packet: Any) -> None:
        packet.trusted_packet_sequence_id = _SEQUENCE
        if self._first:
            packet.sequence_flags = _FIRST_PACKET
            self._first = False
        data = packet.SerializeToString()
        self._file.write(_PACKET_FIELD + _varint(len(data)) + data)


def _varint(value: int) -> bytes:
    """Return a number in protobuf's base 128, lowest part first."""
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)

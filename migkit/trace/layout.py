"""The bytes of QEMU's simpletrace format, version 4, in the byte order of the writing machine.

A file is the header ``QQQ`` = (HEADER_ID, MAGIC, 4), then records that begin with a type word
``Q``. Type 0 maps an event id to its name: ``QL`` id, length of the name, the name. Type 1 is an
event: ``QQLL`` id, timestamp (ns), length (24 + payload), thread id, then the payload: a string
is ``L`` length and its bytes without NUL, all else a ``Q``. The event id DROPPED_ID has one
``Q``, how many records were lost for lack of room. Nothing is padded. See QEMU's trace/simple.c
and scripts/simpletrace.py; QEMU writes its process id where we write the thread's.
"""

from __future__ import annotations

import struct

import numpy as np

HEADER_ID = 0xFFFF_FFFF_FFFF_FFFF
MAGIC = 0xF2B1_77CB_0AA4_29B4
VERSION = 4

MAPPING = 0
RECORD = 1
DROPPED_ID = 0xFFFF_FFFF_FFFF_FFFE
MAX_EVENT_ID = 0xFFF0
"""Ours to decide: QEMU numbers its events, some 5,000, from zero."""

MAX_STRING = 512
"""Longer strings are cut: MAX_TRACE_STRLEN of QEMU's trace/simple.h."""

FILE_HEADER = struct.Struct("=QQQ")
MAPPING_HEADER = struct.Struct("=QQL")
RECORD_HEADER = struct.Struct("=QQQLL")

HEADER = np.dtype(
    [
        ("type", np.uint64),
        ("id", np.uint64),
        ("ts_ns", np.uint64),
        ("length", np.uint32),
        ("tid", np.uint32),
    ]
)
"""RECORD_HEADER for numpy: an event record up to its payload."""

LENGTH = np.dtype(np.uint32)
"""The length of a record, or of a string."""

LENGTH_AT = 24
"""Where in a record its length lies."""

TYPE_BYTES = 8
MIN_LENGTH = HEADER.itemsize - TYPE_BYTES
"""A record's length does not count its type word."""


def header() -> bytes:
    """Return the header of a file."""
    return FILE_HEADER.pack(HEADER_ID, MAGIC, VERSION)


def mapping_record(event_id: int, name: str) -> bytes:
    """Return the record that gives an event id its name."""
    encoded = name.encode("ascii")
    return MAPPING_HEADER.pack(MAPPING, event_id, len(encoded)) + encoded


def dropped_record(count: int, ts_ns: int, tid: int) -> bytes:
    """Return the record that says how many records were lost."""
    return RECORD_HEADER.pack(RECORD, DROPPED_ID, ts_ns, MIN_LENGTH + 8, tid) + struct.pack(
        "=Q", count
    )

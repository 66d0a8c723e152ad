"""The errors that migkit raises: each says what failed, with which values, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MigkitError(Exception):
    """Base of every error that migkit raises on purpose."""


class CapabilityError(MigkitError):
    """This machine lacks something: a kernel feature, a privilege, a package.

    The message names the remedy; ``migkit doctor`` prints every probe.
    """


class OptionError(MigkitError, ValueError):
    """A parameter, capability, workload or size was given a value that cannot be used."""


class ProtocolError(MigkitError):
    """A migration stream or return path holds bytes that break the protocol."""


class MigrationError(MigkitError):
    """A migration failed; the message says on which side, in which state, and what is safe."""


class TraceFormatError(MigkitError):
    """A trace or a run folder is not what it claims to be; names the offset or the line."""


class MissingEventError(MigkitError, KeyError):
    """An analysis needs an event that the trace does not have; names the closest present."""

    def __str__(self) -> str:
        """Return the message itself: KeyError would print its repr."""
        return str(self.args[0]) if self.args else ""


class TraceWarning(UserWarning):
    """A part of a run was not recorded, or is cut off: its frames hold what there is."""


def close_matches(word: str, known: Iterable[str]) -> str:
    """Return ``did you mean 'a' or 'b'?`` for an unknown word, or list what is known."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(repr(name) for name in near) + "?"
    return "known are: " + ", ".join(names[:20])

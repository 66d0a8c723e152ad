"""The link between source and destination, as the session and its user hold it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from migkit.errors import OptionError, close_matches
from migkit.migration.relayed import CHANNELS, DIRECTIONS
from migkit.migration.remote import Remote


class RelayProcess(Remote):
    """The process of :mod:`migkit.migration.relay`: cut the link, stall it, look at it."""

    def __init__(self, link: str, log: Path) -> None:
        """Start it for a link that :meth:`migkit.migration.link.Link.parse` understands."""
        super().__init__(
            "link", "migkit.migration.relay", [link], log, lambda _name, _message: None
        )

    def ensure_ready(self) -> None:
        """Wait until it stands ready; if it has died, and all channels with it, start it anew."""
        if self.gone:
            self.child.kill()
            self._close_sockets()
            self._launch()
        self.await_ready()

    def listen(self, uri: str, to: str, peer: int) -> str:
        """Have it wait at ``uri`` for the process ``peer``, to connect it to ``to``.

        Returns where it listens. Channels that it still relays are closed.
        """
        return str(self.execute("listen", uri=uri, to=to, peer=peer)["uri"])

    def cut(
        self,
        after_bytes: int = 0,
        channel: str | None = None,
        direction: str = "to_destination",
    ) -> None:
        """Cut ``"main"``, ``"preempt"`` or (None) all channels: both their ends are closed.

        ``after_bytes`` is how much more is delivered first on those channels in ``direction``,
        ``"to_destination"`` or ``"to_source"``, to the byte. It may be more than these channels
        carry: the next ones, those of a recovery, are cut then. A later call takes its place.
        Raises :class:`OptionError`, and :class:`MigrationError` when there is nothing to be cut.
        """
        if channel is not None and channel not in CHANNELS:
            raise OptionError(f"channel {channel!r}: " + close_matches(channel, CHANNELS))
        if direction not in DIRECTIONS:
            raise OptionError(f"direction {direction!r}: " + close_matches(direction, DIRECTIONS))
        if after_bytes < 0:
            raise OptionError(f"after_bytes of {after_bytes} is not a number from 0 on")
        self.execute("cut", after_bytes=int(after_bytes), name=channel, direction=direction)

    def stall(self) -> None:
        """Deliver nothing any more, close nothing: the link's time stands still."""
        self.execute("stall")

    def resume(self) -> None:
        """Go on after :meth:`stall`, from where everything on the link was."""
        self.execute("resume")

    def query(self) -> dict[str, Any]:
        """Return what the link has delivered and what it holds, in bytes.

        ``delivered`` by channel and direction, over all connections; by direction ``queue`` (not
        departed), ``peak_queue`` since the channels were connected, and ``in_transit`` (the queue
        and what is in flight); ``open``, the channels; ``stalled``; ``cut_in_bytes``, None when
        no cut is to come.
        """
        return self.execute("query")

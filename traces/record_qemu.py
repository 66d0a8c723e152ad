"""Record the samples that a QEMU of this machine writes: ``python traces/record_qemu.py``.

Two QEMU processes, no operating system: a boot sector increments a byte of pages in
pseudo-random order. Pre-copy goes through ``exec:cat`` into a file; post-copy through a relay
between two sockets that keeps what the source sends. A guest with two RAM blocks goes through a
slow one that breaks the connection, and on through another: post-copy is paused and recovered.
Needs qemu-system-x86 and, for post-copy, userfaultfd for kernel faults (root).
"""

from __future__ import annotations

import contextlib
import json
import lzma
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent
MEMORY = "32M"
_DEADLINE_S = 60.0
_SLOW = 3 << 20  # bytes a second, of a slow relay
_TWO_BLOCKS = (
    "-object", "memory-backend-memfd,id=low,size=20M",
    "-object", "memory-backend-memfd,id=high,size=12M",
    "-numa", "node,memdev=low", "-numa", "node,memdev=high",
)  # fmt: skip
_BOOT_S = 4.0  # the BIOS boots, and the sector has written all its pages

# 16 bits: cli; a flat GDT; protected mode. 32 bits, for ever: eax = eax * 1103515245 + 12345;
# incb of the page (eax >> 8) & 0x7ff000, from 16 MiB on; a loop of 2000 turns.
_BOOT = bytes.fromhex(
    "fa31c08ed8660f0116687c0f20c00c010f22c066ea1b7c0000080066b810008ed8b80100000069c06d4ec64105393000"
    "0089c3c1eb0881e300f07f0081cb00000001fe03b9d0070000e2feebd98d7600"
    "0000000000000000ffff0000009acf00ffff00000092cf001700507c0000"
)
_TRACED = (
    "migrate*", "migration*", "postcopy*", "mark_postcopy*", "savevm*", "loadvm*", "runstate_set",
    "source_return_path*", "open_return_path*", "ram_save_queue_pages", "get_queued_page*",
    "ram_load_postcopy_loop", "qemu_savevm*", "qemu_loadvm*", "process_incoming*",
)  # fmt: skip


class Qemu:
    """A QEMU that is steered over QMP."""

    def __init__(self, folder: Path, role: str, *extra: str) -> None:
        boot = folder / f"{role}.boot"
        boot.write_bytes(_BOOT.ljust(510, b"\0") + b"\x55\xaa")
        monitor = folder / f"{role}.qmp"
        self.log = folder / f"{role}.log"
        command = [
            "qemu-system-x86_64", "-machine", "pc,accel=tcg", "-m", MEMORY, "-nodefaults",
            "-vga", "std", "-display", "none", "-drive", f"file={boot},format=raw,if=ide",
            "-qmp", f"unix:{monitor},server=on,wait=off", "-D", str(self.log),
            "-msg", "timestamp=on",
            *(part for event in _TRACED for part in ("-trace", event)), *extra,
        ]  # fmt: skip
        self._process = subprocess.Popen(command, start_new_session=True)
        self._socket = socket.socket(socket.AF_UNIX)
        _until(monitor.exists)
        _until(lambda: self._socket.connect_ex(str(monitor)) == 0)
        self._socket.settimeout(_DEADLINE_S)
        self._lines = self._socket.makefile("rw")
        self._lines.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: object) -> dict[str, object]:
        self._lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._lines.flush()
        while True:
            answer = json.loads(self._lines.readline())
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def capabilities(self, *names: str) -> None:
        self(
            "migrate-set-capabilities",
            capabilities=[{"capability": name, "state": True} for name in names],
        )

    def close(self) -> None:
        self._lines.close()
        self._socket.close()
        self._process.terminate()
        self._process.wait(10)


class Relay(threading.Thread):
    """Passes one connection on, and keeps what the source sends."""

    def __init__(self, listen: Path, onward: Path, rate: int | None = None) -> None:
        super().__init__(daemon=True)
        self.sent = bytearray()
        self._rate = rate
        self._ends: tuple[socket.socket, ...] = ()
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(listen))
        self._server.listen(1)
        self._onward = onward
        self.start()

    def run(self) -> None:
        near, _ = self._server.accept()
        self._server.close()
        far = socket.socket(socket.AF_UNIX)
        far.connect(str(self._onward))
        self._ends = near, far
        back = threading.Thread(target=_pump, args=(far, near, None), daemon=True)
        back.start()
        _pump(near, far, self.sent, self._rate)
        back.join(_DEADLINE_S)
        near.close()
        far.close()

    def cut(self) -> None:
        """Break the connection."""
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def _pump(
    source: socket.socket, target: socket.socket, kept: bytearray | None, rate: int | None = None
) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 14):
            if kept is not None:
                kept += data
            if rate:
                time.sleep(len(data) / rate)
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _until(condition: object) -> None:
    deadline = time.monotonic() + _DEADLINE_S
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            raise TimeoutError("QEMU did not get there in time")
        time.sleep(0.01)


def precopy(folder: Path) -> bytes:
    """Return the stream of a pre-copy migration into a file."""
    with contextlib.closing(Qemu(folder, "source")) as source:
        time.sleep(_BOOT_S)
        file = folder / "stream"
        source("migrate", uri=f"exec:cat > {file}")
        _until(lambda: source("query-migrate").get("status") in ("completed", "failed"))
    return file.read_bytes()


def postcopy(folder: Path) -> tuple[bytes, dict[str, object]]:
    """Return the source's stream of a post-copy migration, and what query-migrate said."""
    listen, onward = folder / "relay.sock", folder / "destination.sock"
    with (
        contextlib.closing(Qemu(folder, "destination", "-incoming", "defer")) as destination,
        contextlib.closing(Qemu(folder, "source")) as source,
    ):
        for qemu in (source, destination):
            qemu.capabilities("postcopy-ram", "postcopy-blocktime")
        destination("migrate-incoming", uri=f"unix:{onward}")
        relay = Relay(listen, onward)
        time.sleep(_BOOT_S)
        source("migrate-set-parameters", **{"max-bandwidth": 4 << 20})
        source("migrate", uri=f"unix:{listen}")
        _until(lambda: source("query-migrate").get("status") == "active")
        time.sleep(0.5)
        source("migrate-start-postcopy")
        ended = ("completed", "failed")
        _until(lambda: source("query-migrate").get("status") in ended)
        _until(lambda: destination("query-migrate").get("status") in ended)
        said = {"src": source("query-migrate"), "dst": destination("query-migrate")}
        relay.join(_DEADLINE_S)
    return bytes(relay.sent), said


def recovered(folder: Path) -> dict[str, object]:
    """Return what query-migrate said of a post-copy whose connection broke, and that went on."""
    sockets = [(folder / f"relay{i}.sock", folder / f"destination{i}.sock") for i in range(2)]
    incoming = (*_TWO_BLOCKS, "-incoming", "defer")
    with (
        contextlib.closing(Qemu(folder, "destination", *incoming)) as destination,
        contextlib.closing(Qemu(folder, "source", *_TWO_BLOCKS)) as source,
    ):
        for qemu in (source, destination):
            qemu.capabilities("postcopy-ram", "postcopy-blocktime")
        destination("migrate-incoming", uri=f"unix:{sockets[0][1]}")
        relays = [Relay(*sockets[0], _SLOW)]
        time.sleep(_BOOT_S)
        source("migrate", uri=f"unix:{sockets[0][0]}")
        _until(lambda: source("query-migrate").get("status") == "active")
        time.sleep(0.5)
        source("migrate-start-postcopy")
        _until(lambda: source("query-migrate").get("status") == "postcopy-active")
        time.sleep(0.5)
        relays[0].cut()
        for qemu in (source, destination):
            _until(lambda qemu=qemu: qemu("query-migrate").get("status") == "postcopy-paused")
        destination("migrate-recover", uri=f"unix:{sockets[1][1]}")
        relays.append(Relay(*sockets[1], _SLOW))
        source("migrate", uri=f"unix:{sockets[1][0]}", resume=True)
        for qemu in (source, destination):
            _until(lambda qemu=qemu: qemu("query-migrate").get("status") == "completed")
        said = {"src": source("query-migrate"), "dst": destination("query-migrate")}
        for relay in relays:
            relay.join(_DEADLINE_S)
    return said


def main() -> None:
    """Record all, each into its folder beside this file."""
    version = subprocess.run(
        ["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=True
    ).stdout.split()[3]
    prefix = f"qemu-{version.rpartition('.')[0]}"
    print(f"QEMU {version}, kernel {platform.release()}", file=sys.stderr)
    chosen = sys.argv[1:] or ("precopy", "relayed", "recovered")
    for name in chosen:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            stream, said = None, None
            if name == "precopy":
                stream = precopy(folder)
            elif name == "relayed":
                stream, said = postcopy(folder)
            else:
                said = recovered(folder)
            kept = HERE / f"{prefix}-{name}"
            shutil.rmtree(kept, ignore_errors=True)
            kept.mkdir()
            if said is not None:
                (kept / "query-migrate.json").write_text(json.dumps(said, indent=1) + "\n")
            if stream is not None:
                (kept / "stream.xz").write_bytes(lzma.compress(stream, preset=9))
            for log in folder.glob("*.log"):
                (kept / f"{log.name}.xz").write_bytes(lzma.compress(log.read_bytes(), preset=9))


if __name__ == "__main__":
    main()

"""One run, one folder: the file `lock` in a run folder names the process that writes there.

    {"host": "gpu03", "pid": 4711, "place": "boot and pid namespace", "start": 8815, "beats": 12}

Its owner adds a beat every few seconds. A lock whose process is dead is taken over: on the same machine the system's
process table tells, from another the beats do, without comparing clocks. The disk need not know locks of its own.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NAME = "lock"
BEAT_SECONDS = 5.0
SILENT_BEATS = 4
"""A lock from another machine that does not change for so long is of a dead process."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, the folder is this process's. ValueError, naming the owner, when a living one has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be a folder to write to: {error.strerror}; give another place") from None
    lock = _Lock(folder / NAME)
    lock.take()
    try:
        yield
    finally:
        lock.release()


def refuse_in_use(*folders: Path) -> None:
    """ValueError, naming the owner, where a living process has one of the folders."""
    # At once, or each lock that a dead process of another machine left would be watched after the one before.
    with ThreadPoolExecutor(max(1, len(folders))) as pool:
        for watched in [pool.submit(_Lock(folder / NAME).refuse_living) for folder in folders]:
            watched.result()


class _Lock:
    def __init__(self, path: Path) -> None:
        self.path = path
        # The start of the process too: numbers of processes are used again.
        self.owner = {"host": socket.gethostname(), "pid": os.getpid(), "place": _place(), "start": _start(os.getpid())}
        self.beats = 0
        self.released = threading.Event()
        self.beating = threading.Thread(target=self._beat, daemon=True)

    def take(self) -> None:
        draft = self._draft()
        try:
            # Until it is ours, or a living owner is found: a stale lock is removed by one of several, and all try
            # again.
            while True:
                try:
                    # Written first, then linked: whoever sees the lock can read who holds it.
                    _link(draft, self.path)
                    break
                except FileExistsError:
                    self._remove_stale()
        finally:
            # After a link it is a second name of the lock, which is not needed.
            draft.unlink()
        self.beating.start()

    def release(self) -> None:
        self.released.set()
        self.beating.join()
        # Another process may have taken this one for dead, and have it by now.
        if self._is_ours(_read(self.path)):
            self.path.unlink(missing_ok=True)

    def _draft(self) -> Path:
        draft = self.path.with_name(f".{NAME}.{self.owner['host']}.{os.getpid()}")
        draft.write_text(json.dumps({**self.owner, "beats": self.beats}) + "\n", encoding="utf-8")
        return draft

    def refuse_living(self) -> dict[str, Any] | None:
        """The owner, if there is one and it is dead; ValueError if it lives."""
        found = _read(self.path)
        if found is not None and self._lives(found):
            raise ValueError(
                f"{self.path.parent} is in use by a run on host {found.get('host')}, process {found.get('pid')}; wait "
                f"for it or end it, or choose another folder (if it is surely dead, remove {self.path})"
            )
        return found

    def _remove_stale(self) -> None:
        """Removes a lock whose owner is dead; ValueError if it lives."""
        found = self.refuse_living()
        aside = self.path.with_name(f".{NAME}.stale.{self.owner['host']}.{os.getpid()}")
        with suppress(FileNotFoundError):  # another process was faster: the next look decides
            # A rename succeeds for one process only; to remove it here could remove the lock of another that was
            # faster.
            os.rename(self.path, aside)
            if _read(aside) != found:  # it took the lock between our look and our hand
                with suppress(FileExistsError):
                    _link(aside, self.path)
                found = None
            aside.unlink()
            if found is not None:
                print(
                    f"taking over {self.path.parent} from process {found.get('pid')} on host {found.get('host')}, "
                    "which is dead",
                    file=sys.stderr,
                )

    def _lives(self, owner: dict[str, Any]) -> bool:
        # Only here can the process table tell; elsewhere the same number may be any process.
        if owner.get("place") == self.owner["place"] and self.owner["start"] is not None:
            return owner.get("start") is not None and _start(owner.get("pid")) == owner["start"]
        print(
            f"{self.path.parent} has the lock of process {owner.get('pid')} on host {owner.get('host')}; watching for "
            f"{BEAT_SECONDS * SILENT_BEATS:g} s whether it lives",
            file=sys.stderr,
            flush=True,
        )
        # Several beats: a busy network disk may show an old one for some seconds.
        for _ in range(SILENT_BEATS):
            time.sleep(BEAT_SECONDS)
            if _read(self.path) != owner:
                return True
        return False

    def _beat(self) -> None:
        while not self.released.wait(BEAT_SECONDS):
            found = _read(self.path)
            if found is not None and not self._is_ours(found):
                print(
                    f"{self.path.parent} now belongs to process {found.get('pid')} on host {found.get('host')}: this "
                    "run, which was taken for dead, ends at once and writes nothing more",
                    file=sys.stderr,
                    flush=True,
                )
                # Not an exception, which the main thread would see only after its next checkpoint.
                os._exit(1)
            self.beats += 1
            with suppress(OSError):  # a disk that is full or away: others may take the run for dead, as they should
                os.replace(self._draft(), self.path)

    def _is_ours(self, found: dict[str, Any] | None) -> bool:
        # But for the beats, which go on.
        return found is not None and {**found, "beats": 0} == {**self.owner, "beats": 0}


def _link(draft: Path, path: Path) -> None:
    """The draft's content under the name of the lock. FileExistsError where there is one already: unlike a rename."""
    try:
        os.link(draft, path)
    # It is an OSError too, and the one that must not be taken for a disk without links.
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links
        with path.open("x", encoding="utf-8") as file:
            file.write(draft.read_text("utf-8"))


def _read(path: Path) -> dict[str, Any] | None:
    """None where there is none, or no lock of ours can be made out in it."""
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def _place() -> str:
    """What tells apart machines, their boots, and the containers whose processes do not see each other."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _start(pid: Any) -> int | None:
    """When a process started, in ticks since the boot; None if there is none, or the system does not tell."""
    try:
        status = Path(f"/proc/{int(pid)}/stat").read_text("utf-8", errors="replace")
    except (OSError, ValueError, TypeError, OverflowError):
        return None
    # Behind the last bracket: a program's name may have brackets and spaces in it.
    state, *fields = status.rpartition(")")[2].split()
    # A zombie has ended, and only waits for its parent.
    return None if state in "ZX" else int(fields[18])

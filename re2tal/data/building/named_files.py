"""Which files of a folder belong to a video."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from re2tal.video_ids import composed, plain_id


class NamedFiles:
    """Files by their names without suffix, in any Unicode form."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._by_name: dict[str, list[Path]] = {}
        self._by_plain_name: dict[str, list[Path]] = {}
        for path in paths:
            name = composed(path.stem)
            self._by_name.setdefault(name, []).append(path)
            if (plain := plain_id(name)) != name:
                self._by_plain_name.setdefault(plain, []).append(path)

    def of(self, video_id: str, file_names: Sequence[str] = ("{id}",)) -> list[Path]:
        """The files of a video under any of `file_names`; of those called so with another suffix inside (a.mp4.npy),
        if there are no others."""
        names = [composed(name.format(id=video_id)) for name in file_names]
        for files in (self._by_name, self._by_plain_name):
            if found := [path for name in names for path in files.get(name, [])]:
                return found
        return []

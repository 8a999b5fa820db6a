"""Which files of a folder belong to a video."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Generic, TypeVar

from re2tal.video_ids import composed, plain_id

File = TypeVar("File")


class NamedFiles(Generic[File]):
    """Files by their names without suffix, in any Unicode form."""

    def __init__(self, files: Iterable[tuple[str, File]]) -> None:
        self._by_name: dict[str, list[File]] = {}
        self._by_plain_name: dict[str, list[File]] = {}
        for stem, file in files:
            name = composed(stem)
            self._by_name.setdefault(name, []).append(file)
            if (plain := plain_id(name)) != name:
                self._by_plain_name.setdefault(plain, []).append(file)

    def of(self, video_id: str, file_names: Sequence[str] = ("{id}",)) -> list[File]:
        """The files of a video under any of `file_names`; of those called so with another suffix inside (a.mp4.npy),
        if there are no others."""
        names = [composed(name.format(id=video_id)) for name in file_names]
        for files in (self._by_name, self._by_plain_name):
            if found := [file for name in names for file in files.get(name, [])]:
                return found
        return []


def refuse_shared(place: object, files: Mapping[str, str]) -> None:
    """ValueError where one file of `files`, video id -> its name, would be two videos: `a` and `v_a` by file v_a."""
    owners: dict[str, str] = {}
    for video_id, name in files.items():
        if (other := owners.setdefault(name, video_id)) != video_id:
            raise ValueError(
                f"{place}: {name} would be video {other!r} and video {video_id!r}; keep one of them in the "
                "annotations, or give both files"
            )

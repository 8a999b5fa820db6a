"""Which files of a folder belong to a video."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from re2tal.video_ids import VIDEO_SUFFIXES, composed, plain_id


class Named(Protocol):
    """A file, or an entry of one."""

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    @property
    def stem(self) -> str:
        """What names the video."""
        ...


File = TypeVar("File", bound=Named)


@dataclass(frozen=True, slots=True)
class Chosen(Generic[File]):
    """The file of each video."""

    found: dict[str, File] = field(default_factory=dict)
    """By video id."""
    faults: dict[str, str] = field(default_factory=dict)
    """Video id -> why none of its files is taken."""
    notes: dict[str, str] = field(default_factory=dict)
    """Video id -> which files are not taken beside its own."""

    def only(self, video_ids: Collection[str]) -> Chosen[File]:
        """What was chosen for some of the videos."""
        wanted = set(video_ids)
        parts = ({key: value for key, value in one.items() if key in wanted} for one in (self.faults, self.notes))
        return Chosen({key: value for key, value in self.found.items() if key in wanted}, *parts)


class NamedFiles(Generic[File]):
    """Files by their names without suffix, in any Unicode form."""

    def __init__(self, files: Iterable[File]) -> None:
        self._by_name: dict[str, list[File]] = {}
        self._by_plain_name: dict[str, list[File]] = {}
        for file in files:
            name = composed(file.stem)
            self._by_name.setdefault(name, []).append(file)
            if (plain := plain_id(name)) != name:
                self._by_plain_name.setdefault(plain, []).append(file)

    def of(self, video_id: str, file_names: Sequence[str] = ("{id}", "v_{id}")) -> list[File]:
        """The files of a video under any of `file_names`; of those called so with another suffix inside (a.mp4.npy),
        if there are no others."""
        names = [composed(name.format(id=video_id)) for name in file_names]
        for files in (self._by_name, self._by_plain_name):
            if found := [file for name in names for file in files.get(name, [])]:
                return found
        return []

    def choose(
        self,
        video_ids: Sequence[str],
        file_names: Sequence[str] = ("{id}", "v_{id}"),
        *,
        keys: Mapping[str, str] | None = None,
    ) -> Chosen[File]:
        """The file of each video that has one. `keys`: video id -> the name with suffix that an annotation file gives.

        Of two files the one that is called as the key is taken. Without it, none is; nor is a file that would be two
        videos (`a` and `v_a` by file v_a): give the videos of all subsets, or both would take it.
        """
        chosen: Chosen[File] = Chosen()
        owners: dict[str, list[str]] = {}
        for video_id in video_ids:
            files = self.of(video_id, file_names)
            # Two files of one video are two recordings until something says which is meant.
            named = _called(files, (keys or {}).get(video_id)) if len(files) > 1 else files
            if len(named) == 1:
                chosen.found[video_id] = named[0]
                owners.setdefault(named[0].name, []).append(video_id)
                if len(files) > 1:
                    others = ", ".join(file.name for file in files if file is not named[0])
                    chosen.notes[video_id] = f"{named[0].name} is taken as {video_id!r}, not {others}"
            elif files:
                names = " and ".join(_told_apart(files))
                chosen.faults[video_id] = f"{names} are files of one video; keep one of them"
        # Afterwards, as the second owner may come at the end of the list.
        for name, ids in owners.items():
            for video_id in ids if len(ids) > 1 else ():
                del chosen.found[video_id]
                chosen.faults[video_id] = (
                    f"{name} would be video {' and video '.join(map(repr, ids))}; keep one of them"
                )
        return chosen


def _called(files: Sequence[File], key: str | None) -> list[File]:
    """The files that are called as the key, else those that have its suffix."""
    if key is None:
        return []
    name = composed(key)
    suffix = name[len(plain_id(name)) :].lower()
    same = [file for file in files if composed(file.name) == name]
    return same or [file for file in files if file.name.lower().endswith(suffix)]


def _told_apart(files: Sequence[File]) -> list[str]:
    """Names of files, or their paths where they are called alike."""
    names = [file.name for file in files]
    return names if len(set(names)) == len(names) else [str(file) for file in files]


def walk(folder: Path, odd: list[str]) -> Iterator[tuple[Path, list[str], list[str]]]:
    """(folder, names of folders, of files) of a folder and those below it, in order; links to folders are followed, as
    packages of videos are often made. Hidden ones are not; `odd` gets a sentence for each other that is not looked at.
    """
    seen: dict[str, str] = {}
    found = os.walk(folder, followlinks=True, onerror=lambda error: odd.append(f"cannot be looked at: {error}"))
    for root, folders, names in found:
        # A link to a folder above would be followed for ever.
        if (known := seen.setdefault(os.path.realpath(root), root)) != root:
            odd.append(f"{root} is not looked at: by a link it is the folder {known}")
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(root), folders, sorted(names)


def videos_in(folder: Path) -> tuple[list[Path], list[str]]:
    """(the video files of a folder and its sub-folders, what is called so and is none: a sentence each)."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder that holds the videos")
    files: list[Path] = []
    odd: list[str] = []
    found: list[Path] = []
    for root, folders, names in walk(folder, odd):
        found += [root / name for name in [*folders, *names]]
    for path in sorted(path for path in found if path.suffix.lower() in VIDEO_SUFFIXES):
        name = path.name.encode(errors="backslashreplace").decode()  # it need not be UTF-8
        if name.startswith("._"):
            odd.append(f"{name} is a file of macOS beside another, not a video")
        elif not os.path.isfile(path):  # pathlib's own raises for some links
            odd.append(f"{name} is no file, or a link that leads nowhere")
        else:
            files.append(path)
    return files, odd

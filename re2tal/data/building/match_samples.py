"""Which sample of other programs' tars is which listed video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from re2tal.data.building.annotations import Annotations
from re2tal.data.building.clips import ClipList
from re2tal.data.building.tar_samples import Sample


@dataclass(frozen=True, slots=True)
class Matches:
    """Which sample each listed video is."""

    found: dict[str, Sample]
    """By video id."""
    faults: dict[str, str]
    """Video id -> why no sample is taken for it, though some are called so."""


def match_samples(listed: Annotations | ClipList, samples: Sequence[Sample]) -> Matches:
    """Match the videos of all subsets with samples: by key, else by the key without v_, else by what a .json says.

    No sample becomes two videos, and no video is chosen among two samples.
    """
    wanted = {record.video_id for records in listed.subsets.values() for record in records}
    by_key: dict[str, list[Sample]] = {}
    by_short_key: dict[str, list[Sample]] = {}
    by_json: dict[str, list[Sample]] = {}
    for sample in samples:
        key, short_key, *said = sample.names
        for calls, names in ((by_key, {key}), (by_short_key, {short_key}), (by_json, set(said))):
            for name in names & wanted:
                calls.setdefault(name, []).append(sample)
    found: dict[str, Sample] = {}
    faults: dict[str, str] = {}
    owners: dict[int, str] = {}  # id() of a sample -> the video that it is
    # Surer names first: a video that its key tells is not looked for by weaker ones, nor is its sample free for others.
    for calls in (by_key, by_short_key, by_json):
        claims: dict[int, list[str]] = {}
        for name in sorted(calls.keys() - found.keys() - faults.keys()):
            free = [sample for sample in calls[name] if id(sample) not in owners]
            if len(free) == 1:
                found[name] = free[0]
            elif free:
                faults[name] = f"{len(free)} samples are called so: {_places(free)}; keep one"
            else:
                (taken, *_) = calls[name]
                faults[name] = f"its sample, {_places([taken])}, is video {owners[id(taken)]!r} already"
            for sample in free:
                claims.setdefault(id(sample), []).append(name)
        for claimed in claims.values():
            for name in claimed if len(claimed) > 1 else ():
                if name in found:
                    others = ", ".join(one for one in claimed if one != name)
                    # Two videos by one sample: nothing tells which is meant, so it is neither.
                    faults[name] = f"its sample, {_places([found.pop(name)])}, is also called {others}"
        owners |= {sample: claimed[0] for sample, claimed in claims.items()}
    return Matches(found, faults)


def _places(samples: Sequence[Sample]) -> str:
    shown = ", ".join(f"{sample.tar.name} {sample.key}" for sample in samples[:4])
    return shown + (", ..." if len(samples) > 4 else "")

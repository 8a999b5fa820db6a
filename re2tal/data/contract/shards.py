"""Shard folders: opening one, with the checks that its parts belong together, and writing one tar.

    <out>/<subset>/shard-000000.tar ...    {id}.json, {id}.mp4, {id}.json, ...   one whole normalised video per pair
    <out>/<subset>/index.jsonl             one IndexedVideo per line, in shard order: all that planning needs
    <out>/<subset>/index.{sha256}.npy      its columns, for indexes of a million videos; a folder may lack them
    <out>/<subset>/manifest.json           written last; its presence says that the folder is complete

`re2tal.data.building.build` writes such folders, `re2tal.data.contract.verify` reads every byte of one.
A folder of features looks the same, with {id}.safetensors beside {id}.json; `re2tal.data.building.build_features`
writes those.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tarfile import TarInfo
from typing import Any

import numpy as np
from webdataset.writer import TarWriter

from re2tal.data.addresses.address import Address, folder_address
from re2tal.data.addresses.remote import RemoteError, check_ranges, describe
from re2tal.data.addresses.shared import mirror
from re2tal.data.contract.columns import MappedIndex, UnusableColumns, columns_of, columns_path, index_path
from re2tal.data.contract.feature_manifest import FeatureManifest, IndexedFeatures
from re2tal.data.contract.folder import AnyManifest, Entry, FeatureSet, ShardSet
from re2tal.data.contract.folder_checks import (
    EntryCheck,
    check_entries,
    check_files,
    check_index,
    check_index_sha256,
    check_is_shard_folder,
)
from re2tal.data.contract.manifest import (
    MANIFEST_NAME,
    IndexedVideo,
    Manifest,
    from_json,
    read_manifest,
)
from re2tal.files import atomic_file, sha256_of
from re2tal.strict_json import read_json
from re2tal.structures import SUBSETS, find_subset
from re2tal.video_ids import file_key

logger = logging.getLogger(__name__)


def open_shards(folder: Path | str) -> ShardSet:
    """Open a shard folder and check that its parts belong together; reads no video.

    Raises ValueError where a file is missing, has another size than the manifest says, or contradicts another file,
    and where the folder holds features.
    """
    opened = open_any(folder)
    if isinstance(opened, FeatureSet):
        raise ValueError(f"{folder} holds features, and videos are wanted here; give a folder of `re2tal shards build`")
    return opened


def open_any(folder: Path | str) -> ShardSet | FeatureSet:
    """Open a folder of videos or of features, as its manifest says; the same checks as `open_shards`."""
    if (address := folder_address(folder)) is None:
        return _open(Path(folder))
    root = mirror(address)
    try:
        opened = replace(_open(root, has_shards=False), root=Path(folder), address=address)
    except ValueError as error:
        # The user knows the address, not the folder that mirrors it here.
        raise ValueError(str(error).replace(str(root), str(address))) from None
    # Two stand for all: a question for each of thousands of shards would take minutes.
    for shard in {opened.manifest.shards[0], opened.manifest.shards[-1]}:
        check_ranges(address / shard.name, file_bytes=shard.num_bytes)
    return opened


def _open(root: Path, *, has_shards: bool = True) -> ShardSet | FeatureSet:
    check_is_shard_folder(root)
    content = read_json(root / MANIFEST_NAME)
    if isinstance(content, dict) and content.get("format") == FeatureManifest.FORMAT:
        features = read_manifest(root / MANIFEST_NAME, FeatureManifest)
        return FeatureSet(**_read(root, features, IndexedFeatures, has_shards=has_shards))
    manifest = read_manifest(root / MANIFEST_NAME, Manifest)
    return ShardSet(**_read(root, manifest, IndexedVideo, has_shards=has_shards))


def _read(root: Path, manifest: AnyManifest, kind: type[Entry], *, has_shards: bool) -> dict[str, Any]:
    """The fields of a Folder, checked."""
    index, columns = index_path(root, manifest.index_sha256), columns_path(root, manifest.index_sha256)
    check = EntryCheck(root, manifest)
    mapped = _mapped(root, manifest, kind, check)
    # Columns that are younger than the index were made from it; to read hundreds of megabytes again proves no more.
    if mapped is None or index.stat().st_mtime_ns >= columns.stat().st_mtime_ns:
        check_index_sha256(root, manifest)
    if has_shards:
        check_files(root, manifest)
    videos: Sequence[Entry]
    if mapped is not None:
        videos = mapped
        num_shards, numbers = len(manifest.shards), mapped.columns["shard"]
        # The columns may be damaged: a number that no shard has is counted apart, so that the comparison fails.
        known = (numbers >= 0) & (numbers < num_shards)
        counts = np.bincount(np.where(known, numbers, num_shards), minlength=num_shards).tolist()
    else:
        videos = tuple(
            from_json(kind, line, source=f"{index} line {number}")
            for number, line in enumerate(index.read_bytes().splitlines(), start=1)
        )
        by_name = Counter(video.shard for video in videos)
        # Shards that the manifest does not know come last, for the same reason.
        counts = [by_name.pop(shard.name, 0) for shard in manifest.shards] + list(by_name.values())
    check_index(root, manifest, counts, int(columns_of(videos)["num_samples"].sum()))
    if mapped is None:
        check_entries(videos, check)
    elif (twice := mapped.repeated()) is not None:
        raise check.error(twice, "is listed twice")
    return {"root": root, "manifest": manifest, "manifest_sha256": sha256_of(root / MANIFEST_NAME), "videos": videos}


def _mapped(
    root: Path, manifest: Manifest | FeatureManifest, kind: type[Entry], check: EntryCheck
) -> MappedIndex[Entry] | None:
    """The index by its columns; None where there are none that can be used."""
    columns = columns_path(root, manifest.index_sha256)
    if not columns.is_file():
        return None
    try:
        return MappedIndex(root, kind, manifest.index_sha256, tuple(shard.name for shard in manifest.shards), check)
    except UnusableColumns as problem:
        logger.warning("%s is not used, and the index is read whole: %s", columns, problem)
        return None


@dataclass(frozen=True, slots=True)
class Pair:
    """The two members of one video."""

    video_id: str
    json: bytes
    content: bytes | Path
    """Or the file that holds it: a video that is kept as it is may be larger than memory."""


def write_tar(path: Path, pairs: Iterable[Pair], *, suffix: str = "mp4") -> list[tuple[int, int]]:
    """Write pairs into a tar that appears whole or not at all; gives each pair's (offset, num_bytes).

    The same pairs give the same bytes: members carry no time, and no owner but webdataset's constant one.
    """
    places = []
    # The integer 0: any other time, a float among them, adds a header of 1 KiB to every member.
    with atomic_file(path) as file, TarWriter(file, encoder=False, mtime=0) as writer:
        for pair in pairs:
            start = writer.tarstream.offset
            key = file_key(pair.video_id)
            if isinstance(pair.content, bytes):
                writer.write({"__key__": key, "json": pair.json, suffix: pair.content})
            else:
                writer.write({"__key__": key, "json": pair.json})
                _add_file(writer, f"{key}.{suffix}", pair.content)
            places.append((start, writer.tarstream.offset - start))
    return places


def _add_file(writer: TarWriter, name: str, path: Path) -> None:
    """Writes the member that `writer` would write of the file's bytes, which it takes whole alone."""
    member = TarInfo(name)
    member.size, member.mtime, member.mode = path.stat().st_size, 0, writer.mode
    member.uname, member.gname = writer.user, writer.group
    with path.open("rb") as file:
        writer.tarstream.addfile(member, file)


def subset_folder(shards: Path, subset: str) -> Path:
    """The folder of a subset, which may have its other name ("val", "validation"). ValueError lists what is there."""
    if (address := folder_address(shards)) is not None:
        return shards / _remote_subset(address, subset)
    complete = [one.name for one in sorted(shards.glob("*/")) if (one / MANIFEST_NAME).is_file()]
    found = find_subset(subset, complete)
    if found is None and complete and not (shards / subset).is_dir():
        raise ValueError(f"{shards} has no subset {subset!r}; it has {complete}: name one of them, or build {subset!r}")
    return shards / (found or subset)


def _remote_subset(shards: Address, subset: str) -> str:
    """The name that answers: a server need not tell what is in a folder."""
    names = dict.fromkeys([subset, *(name for name in SUBSETS if find_subset(subset, [name]))])
    for name in names:
        try:
            describe(shards / name / MANIFEST_NAME)
        except RemoteError as error:
            # Anything else, such as missing credentials, says nothing about the name.
            if error.status != 404:
                raise
        else:
            return name
    raise ValueError(f"{shards} has no {MANIFEST_NAME} in {', '.join(names)}; check the address, and the subset's name")

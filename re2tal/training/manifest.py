"""The manifest of a checkpoint: what the run was, how far it had come, and the files with their sizes and checksums.

    {"format": 2, "run": {...}, "torch": "2.13.0", "progress": {...}, "files": {...}, "seal": SHA-256 of the rest}

The seal covers everything before it, and the file has one spelling only, so that no changed bit passes. Checkpoints of
format 1 carry no seal; their fields are checked all the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from re2tal.files import sha256_of, write_atomically
from re2tal.strict_json import brief, read_json

NAME = "manifest.json"
SEALED, UNSEALED = 2, 1
"""Formats."""
FOLDER = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """How far a run is. The data position is a count, because every epoch's order is a pure function of its number."""

    step: int = 0
    """Optimizer steps done."""
    micro_batches: int = 0
    """Batches each rank has drawn from its stream."""
    skipped: int = 0
    """Batches and steps that were not applied because something was not finite."""
    seconds: float = 0.0
    """Time spent training, over all restarts."""


@dataclass(frozen=True, slots=True)
class CheckpointManifest:
    """One that was read and found sound."""

    run: dict[str, Any]
    """What must be the same when the run is resumed, by name."""
    progress: TrainingProgress
    sealed: bool


def write_manifest(
    checkpoint: Path, *, run: Mapping[str, Any], progress: TrainingProgress, files: Mapping[str, Any]
) -> None:
    """Written whole, sealed and flushed."""
    content = {"format": SEALED, "run": run, "torch": torch.__version__, "progress": asdict(progress), "files": files}
    write_atomically(checkpoint / NAME, _line({**content, "seal": _seal(content)}))


def read_manifest(checkpoint: Path, *, files: bool = True) -> CheckpointManifest:
    """The manifest of a checkpoint whose files are all there and as they were written; `files`: look at them.

    ValueError with the first fault in words.
    """
    try:
        document = read_json(checkpoint / NAME)
    except (OSError, ValueError) as error:
        raise ValueError(f"{NAME} is unreadable ({type(error).__name__}: {error})") from None
    sealed = _check_seal(checkpoint, document)
    progress = _check_progress(document["progress"], checkpoint)
    for name, expected in _check_files(document["files"]).items() if files else ():
        try:
            fault = _fault_of(checkpoint / name, expected)
        except OSError as error:  # a disk's bad block is as good as another byte
            fault = f"cannot be read ({error})"
        if fault is not None:
            raise ValueError(f"{name} {fault}")
    return CheckpointManifest(document["run"], progress, sealed)


def complete_checkpoints(folder: Path) -> list[str]:
    """The names of those in a folder of checkpoints, newest first; nobody has looked into them."""
    if not folder.is_dir():
        return []
    # Copies that somebody made under other names are neither loaded nor removed.
    found = [name for path in folder.iterdir() if path.is_dir() and (name := FOLDER.fullmatch(path.name))]
    # By number: as text, nine digits would sort before eight.
    return [name.string for name in sorted(found, key=lambda name: int(name.group(1)), reverse=True)]


def newest_sound(
    folder: Path, *, unfit: Mapping[str, str] = MappingProxyType({})
) -> tuple[str | None, CheckpointManifest | None, dict[str, str]]:
    """Its name and manifest, if there is one, and what is wrong with each of the newer ones.

    `unfit`: checkpoints that were loaded and found wrong, with the reasons.
    """
    faults: dict[str, str] = {}
    for name in complete_checkpoints(folder):
        if name in unfit:
            faults[name] = unfit[name]
            continue
        try:
            manifest = read_manifest(folder / name)
        except ValueError as error:
            faults[name] = str(error)
            continue
        for bad, reason in faults.items():
            print(f"passing over checkpoint {bad}: {reason}", file=sys.stderr)
        if not manifest.sealed:
            print(f"checkpoint {name} is of an earlier version: its manifest carries no seal", file=sys.stderr)
        return name, manifest, faults
    return None, None, faults


def _fault_of(path: Path, expected: Mapping[str, Any]) -> str | None:
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != expected["bytes"]:
        return f"has {path.stat().st_size} bytes instead of {expected['bytes']}"
    if sha256_of(path) != expected["sha256"]:
        return "has changed since it was written (SHA-256 differs)"
    return None


def _line(content: Mapping[str, Any]) -> str:
    return json.dumps(content, allow_nan=False) + "\n"


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_line(content).encode()).hexdigest()


def _check_seal(checkpoint: Path, document: Any) -> bool:
    """Whether the document has one, after it was found to have the keys of its format and nothing changed."""
    kinds: dict[str, type] = {"format": int, "run": dict, "torch": str, "progress": dict, "files": dict}
    number = document.get("format") if isinstance(document, dict) else None
    # True == 1 in Python, and would pass for format 1.
    if number not in (SEALED, UNSEALED) or isinstance(number, bool):
        raise ValueError(f"{NAME} has format {brief(number)}, this program reads {UNSEALED} and {SEALED}")
    if number == SEALED:
        kinds["seal"] = str
    if document.keys() != kinds.keys():
        raise ValueError(f"{NAME} has the keys {brief(sorted(document))}, format {number} has {sorted(kinds)}")
    for key, kind in kinds.items():
        if not isinstance(document[key], kind):
            raise ValueError(f"{NAME} has {key} = {brief(document[key])}, which must be a {kind.__name__}")
    if number == UNSEALED:
        return False
    content = {key: value for key, value in document.items() if key != "seal"}
    # The bytes and not the parsed document: another spelling of the same numbers is a change too.
    if (checkpoint / NAME).read_bytes() != _line({**content, "seal": _seal(content)}).encode():
        raise ValueError(f"{NAME} has changed since it was written (its seal differs)")
    return True


def _check_progress(values: dict[str, Any], checkpoint: Path) -> TrainingProgress:
    if values.keys() != {field.name for field in fields(TrainingProgress)}:
        raise ValueError(f"{NAME} has the progress {brief(values)}, of which something is missing or unknown")
    for name, value in values.items():
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (whole or (name == "seconds" and isinstance(value, float))) or not 0 <= value < math.inf:
            raise ValueError(f"{NAME} has {name} = {brief(value)}, which must be a number from 0 on")
    progress = TrainingProgress(**values)
    named = FOLDER.fullmatch(checkpoint.name)
    # A folder that somebody renamed would pass for a newer, or an older one.
    if named is not None and int(named.group(1)) != progress.step:
        raise ValueError(f"{NAME} has step = {progress.step}, its folder is called {checkpoint.name}")
    if progress.micro_batches < progress.step:
        raise ValueError(f"{NAME} has {progress.step} steps of {progress.micro_batches} batches; a step takes one")
    return progress


def _check_files(files: dict[str, Any]) -> dict[str, dict[str, Any]]:
    for name, expected in files.items():
        # A manifest from elsewhere must not name files outside its folder.
        if Path(name).name != name or name == "..":
            raise ValueError(f"{NAME} names the file {brief(name)}, which is not a plain name")
        size, sha256 = (expected.get(key) if isinstance(expected, dict) else None for key in ("bytes", "sha256"))
        right_size = isinstance(size, int) and not isinstance(size, bool) and size >= 0
        if not right_size or not isinstance(sha256, str) or not re.fullmatch("[0-9a-f]{64}", sha256):
            raise ValueError(f"{NAME} has no size and SHA-256 for {brief(name)}: {brief(expected)}")
    # An empty list of files would verify.
    if not any(name.startswith("rank-") for name in files):
        raise ValueError(f"{NAME} names no file of a rank, only {brief(sorted(files))}")
    return files

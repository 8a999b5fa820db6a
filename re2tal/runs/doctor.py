"""What is wrong with videos and annotations before a build, and what a machine has. Nothing is changed."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import re2tal
from re2tal.data.building.annotation_entries import UNKNOWN_SECONDS, misfit
from re2tal.data.building.annotations import Annotations, read_annotations, read_keys
from re2tal.data.building.examine import Examined, examine_video
from re2tal.data.building.isolated import IsolatedPool
from re2tal.data.building.named_files import Chosen, NamedFiles, videos_in
from re2tal.machine import installed_version, memory_bytes, num_cores, num_workers, open_files
from re2tal.options import SHARE, check
from re2tal.progress import counted
from re2tal.runs.exit_status import SOME_LEFT_OUT
from re2tal.strict_json import write_json
from re2tal.structures import VideoRecord
from re2tal.tables import text_table
from re2tal.video_ids import composed, id_fault

SILENT_SECONDS = 120.0
"""Stop reading a file after this time without progress."""
MAX_ROWS = 50
PACKAGES = ("torch", "deepspeed", "accelerate", "transformers", "av", "decord", "webdataset", "numpy")
_OPERATION = re.compile(r"^(\w+) +\.* *\[(YES|NO)\] \.+ \[(OKAY|NO)\]", re.MULTILINE)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(slots=True)
class _Row:
    """What was found of one video."""

    video_id: str
    state: str
    """ok, missing, unusable, damaged, or "other length": all but the first are left out of a build."""
    remarks: list[str] = field(default_factory=list)
    examined: Examined | None = None


def check_data(
    videos: Path, annotations: Path | None, *, json: Path | None, quick: bool, max_damaged: float, workers: int | None
) -> int:
    """Print what is wrong; gives the exit status. `re2tal doctor --help` explains the arguments."""
    check("--max-damaged", max_damaged, SHARE)
    files, odd = _video_files(videos)
    # Of annotations, every video that has no file is named below.
    if not files and annotations is None:
        raise ValueError("; ".join([f"{videos} holds no video file; name the folder of the videos", *odd]))
    named = NamedFiles(files)
    looked_at = files if annotations is None else _listed(annotations, files, named)
    examined = _examine(looked_at, decode=not quick, workers=workers)
    problems: list[str] = []
    records: dict[str, VideoRecord] = {}
    keys: Mapping[str, str] = {}
    if annotations is not None and (read := _read(annotations, named, examined, problems)) is not None:
        records = {record.video_id: record for records in read.subsets.values() for record in records}
        keys = read.keys
    wanted = list(records or dict.fromkeys(composed(path.stem) for path in examined))
    # Without annotations ids are the files' own names: no prefix is tried.
    chosen = named.choose(wanted, keys=keys) if records else named.choose(wanted, ("{id}",))
    odd += chosen.notes.values()
    rows = [_row(one, chosen, examined, records.get(one), max_damaged) for one in wanted]
    # All files of an id, not only the chosen one: an entry knows of the others.
    used = set(_of(wanted, named))
    if unused := [path.name for path in files if path not in used]:
        odd.append(f"{len(unused)} files belong to no entry, such as {unused[0]}")
    _print(rows, problems, odd)
    if json is not None:
        found = [asdict(row) | {"num_damaged": row.examined and row.examined.damage.num_damaged} for row in rows]
        write_json(json, {"videos": found, "annotations": problems, "notes": odd})
    return SOME_LEFT_OUT if problems or any(row.state != "ok" for row in rows) else 0


def _video_files(folder: Path) -> tuple[list[Path], list[str]]:
    """(files that may be videos, what is odd about the folder)."""
    files, odd = videos_in(folder)
    faults = {path: id_fault(composed(path.stem)) for path in files}
    odd += [f"{path.name!a} cannot be used: {fault}" for path, fault in faults.items() if fault]
    return [path for path in files if not faults[path]], odd


def _listed(annotations: Path, files: Sequence[Path], named: NamedFiles[Path]) -> Sequence[Path]:
    """The files that the annotations name; all where they cannot be read, which is told later."""
    try:
        return _of(read_keys(annotations), named)
    except ValueError:
        return files


def _of(video_ids: Iterable[str], named: NamedFiles[Path]) -> list[Path]:
    return list(dict.fromkeys(path for one in video_ids for path in named.of(one)))


def _examine(files: Sequence[Path], *, decode: bool, workers: int | None) -> dict[Path, Examined | str]:
    """File -> what was found, or why the file cannot be used; each in a process that can be stopped."""
    num = max(1, min(num_workers(workers), len(files)))
    with IsolatedPool(num) as isolated, ThreadPoolExecutor(num) as pool:

        def one(path: Path) -> Examined | str:
            try:
                return isolated.call(SILENT_SECONDS, examine_video, path, decode=decode)
            except Exception as error:  # one file, whatever it does to us, never ends the check
                return str(error).replace(str(path), path.name)

        found = counted(pool.map(one, files), total=len(files), about="videos")
        return dict(zip(files, found, strict=True))


def _read(
    path: Path, named: NamedFiles[Path], examined: dict[Path, Examined | str], problems: list[str]
) -> Annotations | None:
    """The annotations without what is wrong in them, which goes to `problems`; None where nothing can be read."""

    seconds: dict[str, float] = {}

    def measured(video_id: str) -> float:
        # Once, and only where an annotation needs a length: the file is read a second time for its keys.
        if not seconds:
            keys = read_keys(path)
            found = {one: examined[file] for one, file in named.choose(list(keys), keys=keys).found.items()}
            seconds.update({one: what.seconds for one, what in found.items() if isinstance(what, Examined)})
        return seconds.get(video_id, UNKNOWN_SECONDS)

    try:
        annotations = read_annotations(path, duration_of=measured)
    except ValueError as error:
        problems.append(str(error))
    else:
        for note in annotations.notes:
            print(f"{path}: {note}")
        return annotations
    try:
        # The first reading told what is wrong; the second goes on without it, so that videos can be compared all the
        # same.
        return read_annotations(path, duration_of=measured, invalid_segments="drop", fix_labels=True)
    except ValueError:
        return None


def _row(
    video_id: str,
    chosen: Chosen[Path],
    examined: dict[Path, Examined | str],
    record: VideoRecord | None,
    max_damaged: float,
) -> _Row:
    if video_id in chosen.faults:
        return _Row(video_id, "unusable", [chosen.faults[video_id]])
    if video_id not in chosen.found:
        return _Row(video_id, "missing", ["there is no file of this name"])
    found = examined[chosen.found[video_id]]
    if isinstance(found, str):
        return _Row(video_id, "unusable", [found])
    row = _Row(video_id, "ok", examined=found)
    if str(found.damage):
        row.remarks.append(str(found.damage))
        row.state = "damaged" if found.damage.share > max_damaged else "ok"
    if found.has_variable_rate:
        row.remarks.append("its frame rate varies")
    if record is not None:
        if why := misfit(found.seconds, record.duration_seconds):
            row.state = "other length" if row.state == "ok" else row.state
            row.remarks.append(why)
        # Half a frame of tolerance, as annotators' tools round times to frames.
        beyond = [action for action in record.actions if action.end_seconds > found.seconds + 0.5 / found.fps]
        if beyond:
            last = max(action.end_seconds for action in beyond)
            row.remarks.append(f"{len(beyond)} actions end after the video, the last at {last:.2f} s")
    return row


def _print(rows: Sequence[_Row], problems: Sequence[str], odd: Sequence[str]) -> None:
    for problem in problems:
        print(problem)
    for line in odd[:MAX_ROWS]:
        print(f"note: {line}")
    told = [row for row in rows if row.remarks]
    if told:
        header = ("video", "state", "seconds", "fps", "size", "codec", "remarks")
        print(text_table([header, *map(_cells, told[:MAX_ROWS])], align="<<>>><<", rules=(1,)))
    if len(told) > MAX_ROWS:
        print(f"and {len(told) - MAX_ROWS} more; --json FILE has all")
    states = Counter(row.state for row in rows)
    counts = ", ".join(f"{number} {state}" for state, number in states.most_common())
    print(f"{len(rows)} videos: {counts or 'none'}; {len(problems)} faults of the annotations")


def _cells(row: _Row) -> tuple[str, ...]:
    remarks = "; ".join(row.remarks)
    if (one := row.examined) is None:
        return row.video_id, row.state, "", "", "", "", remarks
    size = f"{one.width}x{one.height}"
    return row.video_id, row.state, f"{one.seconds:.2f}", f"{one.fps:.2f}", size, one.codec, remarks


def check_machine(*, json: Path | None) -> int:
    """Print what this machine has; gives the exit status."""
    facts = dict(_machine())
    print(text_table([(name, str(value)) for name, value in facts.items()], align="<"))
    if json is not None:
        write_json(json, facts)
    missing = [name for name in PACKAGES if facts[name] == "not installed"]
    return SOME_LEFT_OUT if missing else 0


def _machine() -> Iterator[tuple[str, Any]]:
    yield "system", f"{platform.platform()}, Python {platform.python_version()}"
    yield "re2tal", re2tal.__version__
    yield from ((name, installed_version(name)) for name in PACKAGES)
    memory = "" if (size := memory_bytes()) is None else f", {size / 2**30:.1f} GiB memory"
    yield "processor", f"{num_cores()} cores for this process{memory}"
    yield "devices", "; ".join(_devices()) or "none: training runs on the processor"
    yield "DeepSpeed operations", _deepspeed_operations()
    shared = Path("/dev/shm")
    if shared.is_dir():
        usage = shutil.disk_usage(shared)
        # Batches go from workers to the training through shared memory; Docker gives 64 MB.
        remark = "; loader workers need more: docker run --shm-size=8g" if usage.free < 2**30 else ""
        yield "/dev/shm", f"{usage.free / 2**30:.2f} of {usage.total / 2**30:.2f} GiB free{remark}"
    if (limits := open_files()) is not None:
        soft, hard = limits
        yield "open files", f"{soft} (at most {hard})" + ("; raise it: ulimit -n 4096" if soft < 4096 else "")


def _devices() -> Iterator[str]:
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        yield f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, compute {facts.major}.{facts.minor}"


def _deepspeed_operations() -> str:
    """What DeepSpeed's own report says, from a process that can be stopped."""
    command = [sys.executable, "-m", "deepspeed.env_report"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return "its report did not end in 120 s"
    # The report is coloured for terminals.
    operations = _OPERATION.findall(_COLOUR.sub("", done.stdout))
    able = [f"{name} (built)" if built == "YES" else name for name, built, fits in operations if fits == "OKAY"]
    return f"{len(able)} of {len(operations)} can be built here: {', '.join(able)}"

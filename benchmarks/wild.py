"""Odd and damaged videos through the builder: what it stores at a wrong time, in wrong colours, or damaged unnoticed.

    python benchmarks/wild.py [--quick] [--videos DIR] [--only TEXT] --json FILE

Odd files (codecs, containers, rates, edits, colours) show their own number and known colours; some are written by the
program ffmpeg, which is asked what it shows, if it is there. Damaged files are made of
sound ones, whose frames PyAV gives; a stored picture that is far from all frames near its time is wrong.

    wrong_times, wrong_colours   stored pictures of odd files (3 levels)
    silent                       damaged files that are kept though more of their pictures are wrong than --max-damaged
    refused_odd                  sound files that are left out
    crashes, hangs               files that end the process that reads them, or stop it
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue

import av
import numpy as np
from wild_damage import CODECS, decoded, mutations, write_moving
from wild_ffmpeg import BY_FFMPEG, write_by_ffmpeg
from wild_files import ODD, Shown, numbers_in, write_odd

from re2tal.data.building.check import small
from re2tal.data.building.clips import TrimmedClip
from re2tal.data.building.isolated import Isolated
from re2tal.data.building.make_videos import Made
from re2tal.data.building.pack_videos import VideoPacker
from re2tal.data.building.probe import MAX_DAMAGED
from re2tal.data.contract.manifest import Encoding, FramesPerSecond
from re2tal.strict_json import write_json

MEAN, CELL = 4.0, 24.0
"""A picture is wrong if it is so many levels away on average, or in one of 16 x 16 cells: what compression loses is
below a quarter of that."""
NEAR_SECONDS = 0.002
"""Containers round times."""


@dataclass(frozen=True)
class Row:
    """What became of one file."""

    name: str
    state: str
    """kept, refused, crash or hang"""
    reason: str = ""
    wrong: int = 0
    """Stored pictures that are not what the undamaged file shows then."""
    stored: int = 0
    wrong_colours: int = 0
    told: float = 0.0
    """Share of the frames that the builder calls damaged."""

    @property
    def share(self) -> float:
        """Of the stored pictures, those that are wrong."""
        return self.wrong / max(1, self.stored)


def pack(source: Path, *, fps: float, isolated: Isolated) -> Made | Row:
    """The file as the builder stores it, beside its source."""
    target = source.with_name(f"{source.name}.stored.mp4")
    encoding = Encoding(FramesPerSecond(fps), short_side=120, crf=12, preset="veryfast")
    packer = VideoPacker({"a": source}, encoding, MAX_DAMAGED, copy=False)
    try:
        return packer.make(TrimmedClip("a", "x", "y"), target, isolated)
    except ValueError as error:
        kinds = {"its process died": "crash", "gave no sign of life": "hang"}
        state = next((state for text, state in kinds.items() if text in str(error)), "refused")
        return Row(source.name, state, str(error))


def stored(source: Path) -> np.ndarray:
    """(T, H, W, 3)"""
    with av.open(f"{source}.stored.mp4") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def near(times: np.ndarray, seconds: float) -> np.ndarray:
    """Which frames a player may show then: the nearest, or two that are as near."""
    away = np.abs(times - seconds)
    return np.flatnonzero(away <= away.min() + NEAR_SECONDS)


def judge_odd(name: str, folder: Path, isolated: Isolated) -> Row:
    """Numbers and colours of a file that is odd but sound."""
    shown = write_odd(folder / name, ODD[name]) if name in ODD else write_by_ffmpeg(folder / name, name)
    made = pack(folder / name, fps=shown.fps, isolated=isolated)
    if isinstance(made, Row):
        return made
    pictures, fps = stored(folder / name), made.description.fps
    found = numbers_in(pictures)
    right = [set(shown.numbers[near(shown.times, place / fps)]) for place in range(len(found))]
    wrong = sum(number not in allowed for number, allowed in zip(found, right, strict=True))
    colours = shown.wrong_colours(pictures)
    return Row(name, "kept", "", wrong, len(found), colours, made.description.damaged_share)


def judge_damaged(source: Path, truth: Shown, isolated: Isolated) -> Row:
    """Pictures of a file that was damaged, against those of the sound one."""
    made = pack(source, fps=truth.fps, isolated=isolated)
    if isinstance(made, Row):
        return made
    pictures, fps = stored(source), made.description.fps
    wrong = 0
    for place, picture in enumerate(pictures):
        cells = small(picture)
        away = [np.abs(cells - truth.cells[one]) for one in near(truth.times, place / fps)]
        wrong += all(one.mean() > MEAN or one.mean(-1).max() > CELL for one in away)
    return Row(source.name, "kept", made.damage, wrong, len(pictures), 0, made.description.damaged_share)


def sound_files(folder: Path, real: Sequence[Path]) -> Iterator[Path]:
    """One of each codec and container with a made and, if there is one, a real content."""
    for number, name in enumerate(CODECS):
        yield write_moving(folder / f"made-{name}", name)
        if real:
            yield write_moving(folder / f"real-{name}", name, content=real[number % len(real)])
    for path in real[:6]:
        target = folder / f"own-{path.name}"
        target.write_bytes(path.read_bytes())
        yield target


def run_all(jobs: Sequence, work) -> list[Row]:
    """Each job by any of the processes."""
    idle: SimpleQueue[Isolated] = SimpleQueue()
    isolated = [Isolated() for _ in os.sched_getaffinity(0)]
    for one in isolated:
        idle.put(one)

    def on_one(job) -> Row:
        process = idle.get()
        try:
            return work(*job, process)
        finally:
            idle.put(process)

    with ThreadPoolExecutor(len(isolated)) as pool:
        rows = list(pool.map(on_one, jobs))
    for one in isolated:
        one.__exit__(None, None, None)
    return rows


def measure(folder: Path, *, real: Sequence[Path], only: str, per_file: int, quick: bool) -> dict[str, object]:
    names = [name for name in (*ODD, *BY_FFMPEG) if only in name]
    odd = run_all([(name, folder) for name in (names[::4] if quick else names)], judge_odd)
    sound = [path for path in sound_files(folder, real) if only in path.name]
    truths = {path: decoded(path) for path in sound}
    whole = run_all([(path, truths[path]) for path in sound], judge_damaged)
    jobs = [(one, truths[path]) for path in sound for one in mutations(path, count=per_file)]
    damaged = run_all(jobs, judge_damaged)
    silent = [row for row in damaged if row.state == "kept" and row.share > MAX_DAMAGED]
    over = [row for row in (*odd, *whole) if row.state == "refused"]
    rows = [*odd, *whole, *damaged]
    return {
        "odd": len(odd),
        "wrong_times": sum(row.wrong for row in (*odd, *whole)),
        "wrong_colours": sum(row.wrong_colours for row in odd),
        "refused_odd": len(over),
        "mutations": len(damaged),
        "kept": sum(row.state == "kept" for row in damaged),
        "kept_with_wrong_pictures": sum(row.wrong > 0 for row in damaged),
        "silent": len(silent),
        "crashes": sum(row.state == "crash" for row in rows),
        "hangs": sum(row.state == "hang" for row in rows),
        "silent_by_kind": Counter(kind_of(row) for row in silent),
        "mutations_by_kind": Counter(kind_of(row) for row in damaged),
        "rows": [{**asdict(row), "share": row.share} for row in rows],
    }


def kind_of(row: Row) -> str:
    """Codec and container, and kind of damage: made-hevc.mkv.zero.3.mkv -> hevc.mkv zero"""
    stem, kind, *_ = row.name.rsplit(".", 3)
    return f"{stem.partition('-')[2]} {kind}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, help="folder of real videos, to be damaged too")
    parser.add_argument("--only", default="", help="files whose name holds this text")
    parser.add_argument("--quick", action="store_true", help="a quarter of the files")
    parser.add_argument("--mutations", type=int, default=6, help="of each sound file")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    real = sorted(options.videos.glob("*.mp4"), key=lambda path: path.stat().st_size)[:12] if options.videos else []
    per_file = max(1, options.mutations // 4) if options.quick else options.mutations
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), real=real, only=options.only, per_file=per_file, quick=options.quick)
    write_json(options.json, found)
    for key, value in found.items():
        if key not in ("rows", "mutations_by_kind"):
            print(f"{key}: {value}")


if __name__ == "__main__":
    main()

"""Injects faults into real runs and counts how many held: python tests/faults/campaign.py [--quick] --json FILE

    {"20 ranks that differ": {"tried": 24, "held": 24, "seconds": 310, "load": 3, "date": "2026-11-29", ...}, ...}

Every row is a set of tests, each of which injects faults for real: processes that are killed, launchers that end, bits
that flip, disks that fill up, links that are cut. --quick leaves out those marked slow. A row that held is not run
again, so a campaign goes on where it stopped. Exit status 1 if one did not hold. --table prints what FILE has, for
docs/cluster.md; words that someone wrote there by hand come along: "part", what alone was run, and "note".
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]

STREAM, CHECKPOINT = "tests/data/test_stream.py", "tests/training/test_checkpoint.py"
FAULTS = "tests/faults"

ROWS: dict[str, list[str]] = {
    "1 kill -9 of a random rank": [f"{FAULTS}/test_random_kills.py"],
    "2 and 3 killed inside a save": [f"{CHECKPOINT}::test_a_run_killed_anywhere_inside_a_save_"],
    "4 torn and flipped files of a checkpoint": [
        f"{CHECKPOINT}::test_a_damaged_checkpoint_is_named_",
        f"{CHECKPOINT}::test_a_flipped_bit_anywhere_",
        f"{CHECKPOINT}::test_when_all_are_damaged_",
    ],
    "4 every bit and field of a manifest": ["tests/training/test_manifest.py"],
    "5 a disk that is full": [
        f"{FAULTS}/test_disks.py::test_a_full_disk_",
        "tests/distributed/test_training.py::test_a_write_that_fails_on_one_rank_",
    ],
    "6 a folder that is read-only, gone or stalled": [
        f"{FAULTS}/test_disks.py::test_a_folder_that_",
        f"{FAULTS}/test_lost_ranks.py::test_a_disk_that_stalls_",
    ],
    "7 told to stop": [
        f"{FAULTS}/test_told_to_stop.py::test_a_signal_",
        f"{FAULTS}/test_told_to_stop.py::test_a_run_listens_",
        "tests/distributed/test_training.py::test_a_rank_that_is_told_to_stop_",
    ],
    "8 SIGUSR1 before a time limit": ["tests/launch/test_train_slurm.py::test_only_a_run_that_saved_"],
    "9 a third signal": ["tests/training/test_signals.py"],
    "10 a cut link, a host that is gone": [f"{FAULTS}/test_hosts.py"],
    "11 ranks that hang, are stopped or die": [f"{FAULTS}/test_lost_ranks.py::test_a_lost_rank_"],
    "11 loaders and saves that are slow, loaders that hang": [
        f"{FAULTS}/test_lost_ranks.py::test_a_loader_",
        f"{FAULTS}/test_lost_ranks.py::test_a_rank_that_is_slow_",
        f"{FAULTS}/test_lost_ranks.py::test_the_rank_",
    ],
    "12 and 13 data workers that hang or die": [
        f"{STREAM}::test_a_worker_that_dies_or_stops_",
        f"{STREAM}::test_an_idle_worker_that_is_killed_",
        f"{STREAM}::test_a_stopped_worker_",
    ],
    "14 damaged shards": [
        f"{STREAM}::test_a_change_inside_a_shard_",
        f"{STREAM}::test_a_sparse_member_",
        f"{STREAM}::test_a_shard_that_is_deleted_",
        f"{STREAM}::test_another_video_at_the_offset_",
    ],
    "15 ranks with unequally many clips": [f"{STREAM}::test_ranks_make_equally_many_steps_"],
    "16 odd and damaged videos": [
        f"{STREAM}::test_a_damaged_video_is_replaced_",
        f"{STREAM}::test_many_damaged_videos_",
        f"{STREAM}::test_an_index_that_promises_more_frames_",
    ],
    "17 and 18 NaN and infinity": [f"{FAULTS}/test_not_finite.py", f"{FAULTS}/test_fp16.py"],
    "19 a loss that jumps": [f"{FAULTS}/test_jumping_loss.py"],
    "20 ranks that differ": [f"{FAULTS}/test_differing_ranks.py"],
    "21 flipped bits of activations": [f"{FAULTS}/test_flipped_activations.py::test_a_flipped_"],
    "22 rebuilt states that drift": [
        f"{FAULTS}/test_flipped_activations.py::test_a_block_",
        "tests/reversible/test_monitor.py",
    ],
    "23 other ranks and ZeRO stages": [f"{FAULTS}/test_other_ranks.py"],
    "24 resumed as another run": [f"{CHECKPOINT}::test_another_run_is_refused_"],
    "25 a port that is taken, an interface that is missing": ["tests/training/test_rendezvous.py"],
    "26 launchers that end": [f"{FAULTS}/test_orphans.py"],
    "27 shared memory that is short": [
        f"{STREAM}::test_too_little_shared_memory_",
        f"{FAULTS}/test_disks.py::test_too_little_shared_memory_",
    ],
    "28 a stale lock of a build": [f"{FAULTS}/test_stale_locks.py"],
    "29 two runs, one folder": [f"{FAULTS}/test_two_runs_one_folder.py"],
    "30 queued again without progress": ["tests/launch/test_train_slurm.py::test_a_job_that_never_saves_"],
    "a damaged metrics.jsonl": ["tests/training/test_metrics.py::test_damaged_lines_"],
    "a hostile file in a checkpoint": [f"{CHECKPOINT}::test_nothing_in_a_checkpoint_is_executed"],
    "accelerate launch": [f"{FAULTS}/test_accelerate.py"],
}
"""Row -> files, or tests of files by the beginning of their names. Numbers are those of the list of faults."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="without the tests marked slow")
    parser.add_argument("--json", type=Path, required=True, help="file to write the counts to")
    parser.add_argument("--rows", nargs="*", help="these, by the beginning of their names, even if they held")
    parser.add_argument("--patience", type=float, default=1.0, help="times as long to wait, on a busy machine")
    parser.add_argument("--table", action="store_true", help="print the counts as a table, and run nothing")
    given = parser.parse_args()
    counts: dict[str, dict[str, Any]] = json.loads(given.json.read_text()) if given.json.exists() else {}
    if given.table:
        print(table(counts))
        return 0
    rows = [row for row in ROWS if row.startswith(tuple(given.rows))] if given.rows else _left(counts)
    for row in rows:
        counts[row] = run_row(ROWS[row], quick=given.quick, patience=given.patience)
        print(f"{row}: {counts[row]['held']} of {counts[row]['tried']} held", flush=True)
        given.json.write_text(json.dumps({name: counts[name] for name in ROWS if name in counts}, indent=1) + "\n")
    return 1 if set(rows) & set(_left(counts)) else 0


def table(counts: dict[str, dict[str, Any]]) -> str:
    """In Markdown."""
    lines = ["| Row | Tried | Held | What of it |", "|---|---:|---:|---|"]
    for row, count in counts.items():
        words = "; ".join([count.get("part", "all"), *([count["note"]] if "note" in count else [])])
        lines.append(f"| {row} | {count['tried']:,} | {count['held']:,} | {words} |")
    return "\n".join(lines)


def _left(counts: dict[str, dict[str, Any]]) -> list[str]:
    """Rows that did not hold, were not run, or (by "part", what was) not as a whole."""
    whole = {row for row, count in counts.items() if count["held"] == count["tried"] and "part" not in count}
    return [row for row in ROWS if row not in whole]


def run_row(places: list[str], *, quick: bool, patience: float) -> dict[str, Any]:
    """Runs the tests of a row and counts what they injected."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counted = [
            run_tests(place, Path(folder) / f"{n}.xml", quick=quick, patience=patience)
            for n, place in enumerate(places)
        ]
    return {
        "tried": sum(tried for tried, _ in counted),
        "held": sum(held for _, held in counted),
        "seconds": round(time.monotonic() - started),
        "load": round(os.getloadavg()[2]),
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} CPU cores, Python {platform.python_version()}, torch {version('torch')}, "
        f"deepspeed {version('deepspeed')}",
    }


def run_tests(place: str, report: Path, *, quick: bool, patience: float) -> tuple[int, int]:
    """How many faults the tests of one place injected, and how many held: one a test, or as many as it says itself."""
    file, _, name = place.partition("::")
    chosen = "not slow" if quick else "slow or not slow"
    command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", "-m", chosen, file]
    command += ["-o", f"timeout={300 * patience:g}"]
    if name:
        command += ["-k", name]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RE2TAL_TEST_PATIENCE": str(patience)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 5):  # 5: all tests of the place are slow
        print(done.stdout[-6000:], done.stderr[-2000:], file=sys.stderr, flush=True)
    tried = held = 0
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        said = {one.get("name"): int(one.get("value", "0")) for one in case.iter("property")}
        sound = all(case.find(kind) is None for kind in ("failure", "error", "skipped"))
        tried += said.get("tried", 1)
        held += said.get("held", said.get("tried", 1) if sound else 0)
    return tried, held


if __name__ == "__main__":
    sys.exit(main())

"""Injects faults into real runs and counts how many held: python tests/faults/campaign.py [--quick] --json FILE

    {"20 ranks that differ": {"tried": 14, "held": 14}, ...}

Every row is a set of tests, each of which injects a fault for real: processes that are killed, launchers that end, bits
that flip, gradients that are infinite. --quick leaves out those marked slow. Exit status 1 if one did not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]

STREAM, CHECKPOINT = "tests/data/test_stream.py", "tests/training/test_checkpoint.py"

ROWS: dict[str, list[str]] = {
    "1 kill -9 of a random rank": ["tests/faults/test_random_kills.py"],
    "2 and 3 killed inside a save": [f"{CHECKPOINT}::test_a_run_killed_anywhere_inside_a_save_*"],
    "4 torn and flipped files of a checkpoint": [
        f"{CHECKPOINT}::test_a_damaged_checkpoint_is_named_*",
        f"{CHECKPOINT}::test_a_flipped_bit_anywhere_*",
        f"{CHECKPOINT}::test_when_all_are_damaged_*",
    ],
    "4 every bit and field of a manifest": ["tests/training/test_manifest.py"],
    "5 a disk that is full": ["tests/distributed/test_training.py::test_a_write_that_fails_on_one_rank_*"],
    "7 told to stop": [
        "tests/faults/test_told_to_stop.py",
        "tests/distributed/test_training.py::test_a_rank_that_is_told_to_stop_*",
    ],
    "8 SIGUSR1 before a time limit": ["tests/launch/test_train_slurm.py::test_only_a_run_that_saved_*"],
    "9 a third signal": ["tests/training/test_signals.py"],
    "11 ranks that hang, are stopped or die": ["tests/faults/test_lost_ranks.py"],
    "12 and 13 data workers that hang or die": [
        f"{STREAM}::test_a_worker_that_dies_or_stops_*",
        f"{STREAM}::test_an_idle_worker_that_is_killed_*",
        f"{STREAM}::test_a_stopped_worker_*",
    ],
    "14 damaged shards": [
        f"{STREAM}::test_a_change_inside_a_shard_*",
        f"{STREAM}::test_a_sparse_member_*",
        f"{STREAM}::test_a_shard_that_is_deleted_*",
        f"{STREAM}::test_another_video_at_the_offset_*",
    ],
    "15 ranks with unequally many clips": [f"{STREAM}::test_ranks_make_equally_many_steps_*"],
    "16 odd and damaged videos": [
        f"{STREAM}::test_a_damaged_video_is_replaced_*",
        f"{STREAM}::test_many_damaged_videos_*",
        f"{STREAM}::test_an_index_that_promises_more_frames_*",
    ],
    "17 and 18 NaN and infinity": ["tests/faults/test_not_finite.py"],
    "20 ranks that differ": ["tests/faults/test_differing_ranks.py"],
    "21 and 22 rebuilt states that drift": ["tests/reversible/test_monitor.py"],
    "23 other ranks and ZeRO stages": ["tests/faults/test_other_ranks.py"],
    "24 resumed as another run": [f"{CHECKPOINT}::test_another_run_is_refused_*"],
    "25 a port that is taken, an interface that is missing": ["tests/training/test_rendezvous.py"],
    "26 launchers that end": ["tests/faults/test_orphans.py"],
    "27 shared memory that is short": [f"{STREAM}::test_too_little_shared_memory_*"],
    "29 two runs, one folder": ["tests/faults/test_two_runs_one_folder.py"],
    "30 queued again without progress": ["tests/launch/test_train_slurm.py::test_a_job_that_never_saves_*"],
    "a damaged metrics.jsonl": ["tests/training/test_metrics.py::test_damaged_lines_*"],
    "a hostile file in a checkpoint": [f"{CHECKPOINT}::test_nothing_in_a_checkpoint_is_executed"],
    "accelerate launch": ["tests/faults/test_accelerate.py"],
}
"""Row -> files, or tests of files by the beginning of their names. Numbers are those of the list of faults. Not
injected are 6 (a folder that vanishes), 10 (a cut link), 19 (a loss spike) and 28 (a stale lock of a build)."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="without the tests marked slow")
    parser.add_argument("--json", type=Path, required=True, help="file to write the counts to")
    parser.add_argument(
        "--rows", nargs="*", default=list(ROWS), help="only these rows, by the beginning of their names"
    )
    given = parser.parse_args()
    counts: dict[str, dict[str, int]] = {}
    for row, places in ROWS.items():
        if any(row.startswith(wanted) for wanted in given.rows):
            counts[row] = run_row(places, quick=given.quick)
            print(f"{row}: {counts[row]['held']} of {counts[row]['tried']} held", flush=True)
            given.json.write_text(json.dumps(counts, indent=1) + "\n")
    return 0 if all(count["held"] == count["tried"] for count in counts.values()) else 1


def run_row(places: list[str], *, quick: bool) -> dict[str, int]:
    """Runs the tests of a row and counts them; one that is skipped did not hold."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        files = sorted({place.partition("::")[0] for place in places})
        names = [place.partition("::")[2].rstrip("*") for place in places]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            f"--junitxml={report}",
            "-m",
            "not slow" if quick else "slow or not slow",
        ]
        if all(names):
            command += ["-k", " or ".join(names)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, *files], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode not in (0, 5):  # 5: all of the row's tests are slow
            print(done.stdout[-4000:], file=sys.stderr)
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    held = [case for case in cases if case.find("failure") is case.find("error") is case.find("skipped") is None]
    return {"tried": len(cases), "held": len(held)}


if __name__ == "__main__":
    sys.exit(main())

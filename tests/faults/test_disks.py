"""Disks that are full, read-only, gone or too small: real ones of a few kilobytes, in a namespace of their own."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from distributed.ranks import PATIENCE, run_ranks
from faults.runs import TRAIN, alone, small, write_both_subsets
from training.tiny import same, tiny_trainer, weights

from re2tal.distributed import is_main
from re2tal.training.config import TrainingConfig
from re2tal.training.process_group import leave

TRAINING = TrainingConfig(epochs=2, checkpoint_every_steps=3, keep_checkpoints=3, log_every_steps=1)
DISK = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
MOUNT = 'mount -t tmpfs -o "size=$SIZE$OPTIONS" none "$FOLDER" && exec "$@"'


def on_a_small_disk(function, folder: Path, *, size: str, options: str = "", **arguments) -> list[dict]:
    """`run_ranks` where `folder` is a disk of `size` bytes, which only these ranks see."""
    if subprocess.run([*DISK, "mount -t tmpfs none /mnt"], capture_output=True, check=False).returncode:
        pytest.skip("this user may mount nothing, not even in a namespace")
    folder.mkdir()
    environment = {**os.environ, "SIZE": size, "OPTIONS": options, "FOLDER": str(folder)}
    # A process that holds the disk: it is gone with the last process that sees it.
    command = [*DISK, MOUNT, "sh", "sh", "-c", "echo mounted; exec sleep 10000"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "mounted\n"
            given = {"folder": str(folder), **arguments}
            return run_ranks(function, world_size=2, timeout_seconds=250, namespaces_of=holder.pid, **given)
        finally:
            holder.kill()


def expected_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every rank calls this: of a run that nothing happens to."""
    whole = tiny_trainer(folder, stage=2, training=TRAINING)
    whole.train()
    return weights(whole)


def at_step_3(fault):
    """A hook on the stream that calls `fault` on every rank before the fourth step: two checkpoints are to come."""
    return lambda epoch, step: fault() if (epoch, step) == (0, 3) else None


def full(folder: str, free: list[int]) -> dict[str, dict]:
    """Runs whose disk has so few bytes left after the first checkpoint that the second one cannot be written."""
    root, answers = Path(folder), {}
    expected = expected_weights(root / "whole")
    for number in free:
        run = root / str(number)

        def fill(number: int = number, ballast: Path = root / "ballast") -> None:
            torch.distributed.barrier()
            if is_main():
                with ballast.open("wb", buffering=0) as file:
                    try:
                        while file.write(bytes(1024)):
                            pass
                    except OSError:
                        file.truncate(max(file.tell() - number, 0))
            torch.distributed.barrier()

        trainer = tiny_trainer(run, stage=2, training=TRAINING, on_batch=at_step_3(fill))
        trainer.checkpoints.pauses_seconds = (0.1,)
        message = "no error"
        try:
            trainer.train()
        except OSError as error:
            message = str(error)
        trainer.log.close()
        torch.distributed.barrier()  # rank 0 removes what is half written
        left = sorted(path.name for path in (run / "checkpoints").iterdir())
        torch.distributed.barrier()
        (root / "ballast").unlink(missing_ok=True)
        again = tiny_trainer(run, stage=2, training=TRAINING)
        at = again.resume() and again.progress.step
        again.train()
        again.log.close()
        rows = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        alike = same(weights(again), expected)
        answers[str(number)] = {"message": message, "left": left, "at": at, "alike": alike, "rows": rows}
        torch.distributed.barrier()
        if is_main():
            shutil.rmtree(run)
    leave()
    return answers


def limited(folder: str, limits: list[int]) -> dict[str, dict]:
    """The same, where rank 1 may write no file larger than so many bytes, as a quota would have it."""
    root, answers = Path(folder), {}
    expected = expected_weights(root / "whole")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for number in limits:
        run = root / str(number)

        def limit(number: int = number) -> None:
            if not is_main():
                resource.setrlimit(resource.RLIMIT_FSIZE, (number, before[1]))

        trainer = tiny_trainer(run, stage=2, training=TRAINING, on_batch=at_step_3(limit))
        trainer.checkpoints.pauses_seconds = (0.1,)
        message = "no error"
        try:
            trainer.train()
        except OSError as error:
            message = str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        torch.distributed.barrier()  # rank 0 removes what is half written
        left = sorted(path.name for path in (run / "checkpoints").iterdir())
        again = tiny_trainer(run, stage=2, training=TRAINING)
        at = again.resume() and again.progress.step
        again.train()
        alike = same(weights(again), expected)
        answers[str(number)] = {"message": message, "left": left, "at": at, "alike": alike}
    leave()
    return answers


def check_full(answers: list[dict], words: str) -> None:
    for of_rank in answers:
        for case, answer in of_rank.items():
            assert "checkpoint step-00000006 was not written" in answer["message"], (case, answer)
            assert words in answer["message"], (case, answer)
            assert "Earlier checkpoints are intact; free space" in answer["message"], (case, answer)
            assert (answer["left"], answer["at"]) == (["latest", "step-00000003"], 3), (case, answer)
            assert answer.get("rows", list(range(1, 9))) == list(range(1, 9)), (case, answer)
    assert all(answer["alike"] for answer in answers[0].values())


FREE = [0, 5_000, 9_000, 17_000, 33_000]


def test_a_full_disk_costs_no_checkpoint_and_no_line_of_the_log(tmp_path, record_property):
    record_property("tried", len(FREE))
    check_full(on_a_small_disk(full, tmp_path / "disk", size="4m", free=FREE), "No space left on device")


@pytest.mark.slow
def test_a_full_disk_in_the_sense_of_a_limit_on_files_costs_no_checkpoint(tmp_path, record_property):
    limits = [0, 100, 1_000, 3_000, 6_000]
    record_property("tried", len(limits))
    answers = run_ranks(limited, world_size=2, timeout_seconds=280, folder=str(tmp_path), limits=limits)
    check_full(answers, "File too large")


def mount(*options: str) -> None:
    subprocess.run(["mount", *options], check=True, capture_output=True)


def faulty(folder: str, fault: str) -> dict:
    """A run whose disk becomes unusable after the first checkpoint, for good or for a while."""
    root = Path(folder)
    run, healed = root / "run", threading.Event()
    expected = expected_weights(root / "whole")

    def hurt() -> None:
        torch.distributed.barrier()
        if is_main():
            if trainer.log.trackers is not None:  # a file of events is open, and keeps the disk writable
                trainer.log.trackers.close()
                trainer.log.trackers = None
            match fault:
                case "read-only":
                    mount("-o", "remount,ro", folder)
                case "read-only for a while":
                    mount("-o", "remount,ro", folder)
                    threading.Thread(target=heal).start()
                case "removed":
                    shutil.rmtree(run / "checkpoints")
                case "unmounted":
                    subprocess.run(["umount", "--lazy", folder], check=True)
                case "without inodes":
                    take_all_inodes(root)
        torch.distributed.barrier()

    def heal() -> None:
        time.sleep(4.0)
        mount("-o", "remount,rw", folder)
        healed.set()

    trainer = tiny_trainer(run, stage=2, training=TRAINING, on_batch=at_step_3(hurt))
    trainer.checkpoints.pauses_seconds = (0.2, 6.0) if fault == "read-only for a while" else (0.2,)
    message = ended = "no error"
    started = time.monotonic()
    try:
        ended = trainer.train()
    except OSError as error:
        message = str(error)
    took = time.monotonic() - started
    torch.distributed.barrier()  # rank 0 removes what is half written
    alike = ended == "no error" or same(weights(trainer), expected)
    left = [path.name for path in (run / "checkpoints").iterdir()] if (run / "checkpoints").exists() else []
    leave()
    return {"ended": ended, "message": message, "took": took, "alike": alike, "left": sorted(left)}


def take_all_inodes(root: Path) -> None:
    try:
        for number in range(1_000_000):
            (root / f"file{number}").touch()
    except OSError:
        return


WHOLE = ["latest", "step-00000003", "step-00000006", "step-00000008"]
FAULTS = {
    # how the run ends, what its error says, which checkpoints are left
    "read-only": ("no error", "Read-only file system", WHOLE[:2]),
    "read-only for a while": ("finished", "no error", WHOLE),
    "removed": ("finished", "no error", [WHOLE[0], *WHOLE[2:]]),
    "unmounted": ("finished", "no error", [WHOLE[0], *WHOLE[2:]]),
    "without inodes": ("no error", "No space left on device", WHOLE[:2]),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_that_cannot_be_written_ends_the_run_or_is_waited_for(fault, tmp_path):
    options = ",nr_inodes=200" if fault == "without inodes" else ""
    for of_rank in on_a_small_disk(faulty, tmp_path / "disk", size="4m", options=options, fault=fault):
        ended, words, left = FAULTS[fault]
        assert (of_rank["ended"], of_rank["left"]) == (ended, left), of_rank
        assert words in of_rank["message"], of_rank
        assert of_rank["took"] < PATIENCE * 60
    assert of_rank["alike"]


@pytest.mark.slow
def test_too_little_shared_memory_is_said_before_anything_is_read(tmp_path):
    """As in a container that was started without --shm-size: workers would die of bus errors."""
    features = write_both_subsets(tmp_path / "features", videos=4, channels=512, steps=400)
    command = [*TRAIN, *small(features, tmp_path / "run", workers=2)]
    environment = {**alone(), "SIZE": "16k", "OPTIONS": "", "FOLDER": "/dev/shm"}
    done = subprocess.run(
        [*DISK, MOUNT, "sh", *command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE * 200,
    )
    assert done.returncode == 2, done.stderr[-3000:]
    assert "/dev/shm has 0 MiB free, 2 workers" in done.stderr
    assert "enlarge it (docker run --shm-size" in done.stderr

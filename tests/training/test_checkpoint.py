"""Checkpoints against crashes, bad disks, other runs and hostile files, with an engine of one process."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distributed.ranks import TESTS
from torch import nn
from training.tiny import TinyDetector, same, tiny_trainer, weights

from re2tal.distributed import World
from re2tal.files import sha256_of
from re2tal.training import checkpoint, manifest
from re2tal.training.checkpoint import CheckpointStore
from re2tal.training.config import TrainingConfig
from re2tal.training.engine_weights import master_weights
from re2tal.training.manifest import TrainingProgress, complete_checkpoints, read_manifest, write_manifest
from re2tal.training.zero_file import HARMFUL

TRAINING = TrainingConfig(epochs=2, checkpoint_every_steps=3, keep_checkpoints=3, log_every_steps=1)


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A finished run of 8 steps with checkpoints at 3, 6 and 8."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    trainer = tiny_trainer(tmp_path, stage=2, training=TRAINING)
    trainer.train()
    return trainer


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_the_newest_checkpoints_stay_with_a_pointer_and_nothing_else(trained, tmp_path):
    assert checkpoints(tmp_path) == ["latest", "step-00000003", "step-00000006", "step-00000008"]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000008\n"
    trained.checkpoints.keep = 1
    trained.checkpoints.save(trained.engine, trained.average, trained.progress)
    assert checkpoints(tmp_path) == ["latest", "step-00000008"]


def test_a_copy_under_another_name_is_neither_loaded_nor_removed(trained, tmp_path):
    folder = tmp_path / "checkpoints"
    for name in ("step-best", "step-00000003-backup"):
        shutil.copytree(folder / "step-00000003", folder / name)
    assert complete_checkpoints(folder) == ["step-00000008", "step-00000006", "step-00000003"]
    (folder / "step-100000000").mkdir()
    (folder / "step-99999999").mkdir()
    assert complete_checkpoints(folder)[:2] == ["step-100000000", "step-99999999"]
    shutil.rmtree(folder / "step-100000000")
    shutil.rmtree(folder / "step-99999999")
    trained.checkpoints.keep = 1
    trained.checkpoints.save(trained.engine, trained.average, trained.progress)
    assert checkpoints(tmp_path) == ["latest", "step-00000003-backup", "step-00000008", "step-best"]


@pytest.mark.parametrize("damage", ["bit", "cut", "gone", "manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_loaded(trained, tmp_path, damage, capsys, record_property):
    newest = tmp_path / "checkpoints" / "step-00000008"
    record_property("tried", 1 if damage == "manifest" else len(list(newest.iterdir())) - 1)
    for victim in sorted(newest.iterdir()):
        content = victim.read_bytes()
        if (victim.name == "manifest.json") != (damage == "manifest"):
            continue
        match damage:
            case "bit":
                middle = len(content) // 2
                victim.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
            case "cut" | "manifest":
                victim.write_bytes(content[: len(content) // 2])
            case "gone":
                victim.unlink()
        with pytest.raises(ValueError, match=victim.name):
            read_manifest(newest)
        assert trained.resume()
        assert trained.progress.step == 6
        assert f"passing over checkpoint step-00000008: {victim.name}" in capsys.readouterr().err
        victim.write_bytes(content)
    assert read_manifest(newest).progress.step == 8


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_found(trained, tmp_path, record_property):
    newest = tmp_path / "checkpoints" / "step-00000008"
    generator = random.Random(0)
    files = sorted(newest.iterdir())
    found = 0
    record_property("tried", 1000)
    for number in range(1000):
        victim = files[number % len(files)]
        content = victim.read_bytes()
        place = generator.randrange(len(content))
        changed = content[place] ^ 1 << generator.randrange(8)
        victim.write_bytes(content[:place] + bytes([changed]) + content[place + 1 :])
        try:
            read_manifest(newest)
        except ValueError:
            found += 1
        victim.write_bytes(content)
    assert found == 1000


def test_a_checkpoint_from_before_the_seal_resumes_and_says_so_once(trained, tmp_path, capsys):
    manifest = tmp_path / "checkpoints" / "step-00000008" / "manifest.json"
    document = json.loads(manifest.read_text())
    del document["seal"]
    manifest.write_text(json.dumps({**document, "format": 1}) + "\n")
    assert trained.resume()
    assert trained.progress.step == 8
    assert capsys.readouterr().err.count("its manifest carries no seal") == 1


def test_a_checkpoint_of_weights_that_are_not_finite_is_passed_over(trained, tmp_path, monkeypatch, capsys):
    """Versions before this one could write it."""
    with torch.no_grad():
        master_weights(trained.engine)[0][3] = torch.nan
    monkeypatch.setattr(checkpoint, "find_non_finite", lambda engine: None)
    trained.checkpoints.save(trained.engine, None, trained.progress)
    monkeypatch.undo()
    trained.average = None
    assert trained.resume()
    assert trained.progress.step == 6
    assert re.search(r"passing over .*8: not all numbers are finite: the weights on rank 0", capsys.readouterr().err)


def test_a_file_that_the_disk_cannot_read_is_damage_too(trained, tmp_path, monkeypatch, capsys):
    def read(path: Path) -> str:
        if path.parent.name == "step-00000008":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return sha256_of(path)

    monkeypatch.setattr(manifest, "sha256_of", read)
    assert trained.resume()
    assert trained.progress.step == 6
    assert re.search(r"passing over .*8: \S+ cannot be read \(.*Input/output error", capsys.readouterr().err)


def test_a_damaged_newer_checkpoint_costs_none_that_is_sound(trained, tmp_path):
    """A run that went on from before it, and is stopped before it comes there again."""
    (tmp_path / "checkpoints" / "step-00000008" / "rank-00000.pt").unlink()
    assert trained.resume()
    trained.checkpoints.keep = 1
    trained.checkpoints.save(trained.engine, trained.average, replace(trained.progress, step=7, micro_batches=7))
    assert checkpoints(tmp_path) == ["latest", "step-00000007", "step-00000008"]
    assert trained.resume()
    assert trained.progress.step == 7


def test_an_old_checkpoint_that_cannot_be_removed_ends_no_run(trained, tmp_path, monkeypatch, capsys):
    """On NFS a file that another process reads is still there, under another name."""
    remove = shutil.rmtree

    def busy(path: Path, **options: bool) -> None:
        if path.name == "step-00000003":
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
        remove(path, **options)

    monkeypatch.setattr(checkpoint.shutil, "rmtree", busy)
    trained.checkpoints.keep, trained.checkpoints.pauses_seconds = 1, ()
    trained.checkpoints.save(trained.engine, trained.average, trained.progress)
    assert checkpoints(tmp_path) == ["latest", "step-00000003", "step-00000008"]
    assert "step-00000003 cannot be removed" in capsys.readouterr().err
    monkeypatch.undo()
    trained.checkpoints.save(trained.engine, trained.average, trained.progress)
    assert checkpoints(tmp_path) == ["latest", "step-00000008"]


def test_when_all_are_damaged_the_run_does_not_start_afresh_by_itself(trained, tmp_path):
    for folder in (tmp_path / "checkpoints").glob("step-*"):
        (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* is sound: .*manifest.json is unreadable"):
        trained.resume()


def test_another_run_is_refused_with_what_changed(trained):
    saved = trained.checkpoints
    changed = {**saved.identity, "zero_stage": 3, "world_size": 4, "optimizer.learning_rate": 1.0}
    trained.checkpoints = CheckpointStore(saved.folder, identity=changed)
    expected = r"optimizer.learning_rate is 1.0, the checkpoint has None; world_size is 4, .*1"
    with pytest.raises(ValueError, match=expected):
        trained.resume()


def test_a_value_that_had_no_name_when_a_checkpoint_was_written_was_the_default(trained):
    saved = trained.checkpoints
    now = {**saved.identity, "data.clips.augmentation": "none"}
    trained.checkpoints = CheckpointStore(saved.folder, identity=now, defaults={"data.clips.augmentation": "none"})
    assert trained.resume()
    trained.checkpoints = CheckpointStore(saved.folder, identity=now, defaults={"data.clips.augmentation": "opentad"})
    with pytest.raises(ValueError, match="augmentation is 'none', the checkpoint has 'opentad'"):
        trained.resume()


def test_a_checkpoint_of_several_ranks_with_scrambled_shards_is_refused(tmp_path, monkeypatch):
    """Earlier versions trained so, and resumed without the key, which put weights in each other's place."""
    monkeypatch.delitem(HARMFUL, ("zero_optimization", "round_robin_gradients", True))
    zero = {"stage": 1, "round_robin_gradients": True}
    tiny_trainer(tmp_path, stage=1, zero=zero, training=TRAINING).train()
    again = tiny_trainer(tmp_path, stage=1, training=TRAINING)
    assert again.resume()
    monkeypatch.setattr(checkpoint, "_rank", lambda: (0, 2))
    with pytest.raises(ValueError, match=r"step-00000008 was written with .*round_robin_gradients.* begin a run anew"):
        again.resume()


def test_shards_of_another_layout_are_refused_in_a_sentence(tmp_path):
    """It was DeepSpeed's traceback."""

    def build() -> TinyDetector:
        detector = TinyDetector()
        # A bias whose size is not a multiple of 16 bytes, before another.
        detector.backbone, detector.localizer = nn.Sequential(nn.Linear(48, 23), nn.LayerNorm(23)), nn.Linear(23, 1)
        return detector

    zero = {"stage": 1, "parameter_alignment": True}
    tiny_trainer(tmp_path, stage=1, zero=zero, training=TRAINING, build=build).train()
    again = tiny_trainer(tmp_path, stage=1, training=TRAINING, build=build)
    with pytest.raises(ValueError, match=r"step-00000008: .*parameter_alignment.*Load with the setting used to save"):
        again.resume()


def test_other_validation_shards_may_be_resumed_with_but_not_without_a_word(trained, capsys):
    saved = trained.checkpoints
    before = CheckpointStore(saved.folder, identity={**saved.identity, "validation shards": "1"})
    trained.checkpoints = before
    assert trained.resume()  # of an earlier version, which did not say it
    before.save(trained.engine, trained.average, trained.progress)
    assert trained.resume()
    assert capsys.readouterr().err == ""
    trained.checkpoints = CheckpointStore(saved.folder, identity={**saved.identity, "validation shards": "2"})
    assert trained.resume()
    assert "validation shards have changed since" in capsys.readouterr().err


def test_nothing_in_a_checkpoint_is_executed(trained, tmp_path):
    canary = tmp_path / "canary"

    class Hostile:
        def __reduce__(self):
            return (os.system, (f"touch {canary}",))

    newest = tmp_path / "checkpoints" / "step-00000008"
    manifest = json.loads((newest / "manifest.json").read_text())
    for name in manifest["files"]:
        content = (newest / name).read_bytes()
        torch.save({"module": {}, "optimizer_state_dict": Hostile()}, newest / name)
        files = {
            **manifest["files"],
            name: {"bytes": (newest / name).stat().st_size, "sha256": sha256_of(newest / name)},
        }
        write_manifest(newest, run=manifest["run"], progress=TrainingProgress(**manifest["progress"]), files=files)
        with pytest.raises(ValueError, match=r"holds something other than .* nothing of it was executed"):
            trained.resume()
        (newest / name).write_bytes(content)
    assert not canary.exists()


def test_weights_continue_where_they_stopped(trained):
    expected = weights(trained)
    trained.checkpoints.save(trained.engine, trained.average, trained.progress)
    with torch.no_grad():
        next(trained.engine.module.parameters()).add_(1)
    assert trained.resume()
    assert same(weights(trained), expected)


KILLED = """
import os, sys
sys.path.insert(0, sys.argv[1])
from training.tiny import tiny_trainer
from training.test_checkpoint import TRAINING
calls, armed = 0, False
def dying(call):
    def wrapped(*arguments, **options):
        global calls
        calls += armed
        if armed and calls == last:
            os._exit(9)
        return call(*arguments, **options)
    return wrapped
def train():
    os.fsync, os.replace, os.mkdir = dying(os.fsync), dying(os.replace), dying(os.mkdir)
    trainer = tiny_trainer(f"{sys.argv[2]}/{last}", stage=2, training=TRAINING)
    save = trainer.checkpoints.save
    def second_save(engine, average, progress):
        global armed
        armed = progress.step == 6
        return save(engine, average, progress)
    trainer.checkpoints.save = second_save
    trainer.train()
last, status = 0, 9
while status:
    last += 1
    if not (child := os.fork()):  # imports would take most of the time
        train()
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("ended", status, flush=True)
"""


@pytest.mark.slow
def test_a_run_killed_anywhere_inside_a_save_goes_on_from_a_sound_checkpoint(tmp_path, record_property):
    alone = {name: value for name, value in os.environ.items() if name not in World().variables()}
    command = [sys.executable, "-c", KILLED, str(TESTS), str(tmp_path)]
    environment = {**alone, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    ends = [line.split()[1] for line in killed.stdout.splitlines() if line.startswith("ended")]
    died = ends.index("0")
    assert ends == ["9"] * died + ["0"], killed.stderr
    assert died > 7  # the files of the rank, its folders, the manifest, the rename and the pointer were all met
    record_property("tried", died)
    whole = tiny_trainer(tmp_path / "whole", stage=2, training=TRAINING)
    whole.train()
    expected = weights(whole)
    for call in range(1, died + 1):
        folder = tmp_path / str(call)
        again = tiny_trainer(folder, stage=2, training=TRAINING)
        assert again.resume()
        assert again.progress.step in (3, 6)
        again.train()
        assert same(weights(again), expected), call
        assert not list((folder / "checkpoints").glob("tmp-*"))

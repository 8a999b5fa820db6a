"""Whose a run folder is."""

from __future__ import annotations

from pathlib import Path

import pytest

from re2tal.runs.folder import claim, say_if_trained_on


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("left", [(), ("latest",)])
def test_a_model_without_checkpoints_is_not_trained_over_without_a_word(
    resume: bool, left: tuple[str, ...], tmp_path: Path
) -> None:
    """Its checkpoints were removed, which are the largest part, or it was imported."""
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "checkpoints").mkdir()
    for name in left:
        (tmp_path / "checkpoints" / name).touch()
    with pytest.raises(ValueError, match=r"holds (a model, and no checkpoint to go on from|the checkpoints of)"):
        claim(tmp_path, resume=resume, overwrite=False)
    assert (tmp_path / "metrics.jsonl").exists()
    with pytest.raises(ValueError, match=r"has checkpoints, but no config\.json, so it is no run that could be over"):
        claim(tmp_path, resume=False, overwrite=True)
    (tmp_path / "config.json").touch()
    claim(tmp_path, resume=False, overwrite=True)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("start", ["model.safetensors", "best/step-00000008.safetensors", "../link/model.safetensors"])
def test_a_run_does_not_overwrite_what_it_starts_from(start: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "best").mkdir(parents=True)
    (tmp_path / "link").symlink_to(run)
    file = run / start
    file.touch()
    (run / "config.json").touch()
    with pytest.raises(ValueError, match=r"the run starts from .*safetensors, which overwrite would remove"):
        claim(run, resume=False, overwrite=True, start=[file])
    assert file.exists()


def test_checkpoints_behind_a_link_are_not_removed_and_the_link_stays_one(tmp_path: Path) -> None:
    """They may have been moved to another disk."""
    run, scratch = tmp_path / "run", tmp_path / "scratch"
    (scratch / "step-00000006").mkdir(parents=True)
    run.mkdir()
    (run / "checkpoints").symlink_to(scratch)
    for name in ("metrics.jsonl", "config.json"):
        (run / name).touch()
    with pytest.raises(ValueError, match=r"checkpoints is a link to .*scratch, and overwrite removes nothing behind"):
        claim(run, resume=False, overwrite=True)
    assert (scratch / "step-00000006").exists()
    assert (run / "metrics.jsonl").exists()
    (scratch / "step-00000006").rmdir()
    claim(run, resume=False, overwrite=True)
    assert (run / "checkpoints").is_symlink()
    assert not (run / "metrics.jsonl").exists()


@pytest.mark.parametrize(("resume", "overwrite"), [(False, False), (True, False), (False, True)])
def test_checkpoints_on_a_disk_that_is_not_there_are_an_error(resume: bool, overwrite: bool, tmp_path: Path) -> None:
    """A run that was to be resumed began anew, and could not save."""
    (tmp_path / "checkpoints").symlink_to(tmp_path / "scratch")
    with pytest.raises(ValueError, match=r"checkpoints is a link to .*scratch, which is not there; mount its disk"):
        claim(tmp_path, resume=resume, overwrite=overwrite)
    assert (tmp_path / "checkpoints").is_symlink()


def test_a_run_that_ended_or_died_before_its_first_checkpoint_is_resumed(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    claim(tmp_path, resume=True, overwrite=False)
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "checkpoints" / "step-00000006").mkdir(parents=True)
    claim(tmp_path, resume=True, overwrite=False)


def test_a_model_from_before_the_newest_checkpoint_is_told_of(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A run had ended, was resumed for more epochs, and has not ended yet."""
    (tmp_path / "summary.json").write_text('{"steps": 8}')
    for step in (6, 8):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    say_if_trained_on(tmp_path)
    assert capsys.readouterr().err == ""
    (tmp_path / "checkpoints" / "step-00000012").mkdir()
    say_if_trained_on(tmp_path)
    assert "the model of step 8, and has been trained on since (checkpoint step-00000012)" in capsys.readouterr().err


def test_a_damaged_summary_does_not_keep_the_model_from_its_use(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "summary.json").write_text('{"steps"')
    (tmp_path / "checkpoints" / "step-00000006").mkdir(parents=True)
    say_if_trained_on(tmp_path)
    assert "whether the run has been trained on since its model was written is not known" in capsys.readouterr().err

"""The logs of a run folder, over restarts and on ranks that do not write."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch

from re2tal.training.metrics import MetricsLog, peak_memory_gib


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write(folder: Path, *, resumed_at: int, until: int) -> None:
    log = MetricsLog(folder, enabled=True)
    log.open(step=resumed_at, num_steps=9)
    for step in range(resumed_at + 1, until + 1):
        log.write("train", {"loss": 1 / step, "loss/boundary": 0.5}, step=step)
    log.close()


def test_a_resumed_run_forgets_what_came_after_its_checkpoint_and_half_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, resumed_at=0, until=4)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "kind": "tr')
    write(tmp_path, resumed_at=2, until=3)
    assert steps(tmp_path) == [1, 2, 3]
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last == {"step": 3, "kind": "train", "loss": 1 / 3, "loss/boundary": 0.5}
    assert (tmp_path / "metrics.damaged").read_text() == '{"step": 5, "kind": "tr\n'
    printed = capsys.readouterr().err.splitlines()
    # Parts of the loss are for the files.
    assert printed[-1] == "step 3/9, time left not known yet  loss 0.3333"
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    "damage",
    [b"\x00\xff\xfe", b"[1, 2]", b"7", b'{"step": "x"}', b'{"step": Infinity}', b"{}", b"", b"[" * 100_000, b"null"],
    ids=["bytes", "list", "number", "words", "infinite", "no step", "empty", "deep", "null"],
)
def test_damaged_lines_are_kept_aside_and_counted_and_stop_nothing(damage, tmp_path, capsys) -> None:
    write(tmp_path, resumed_at=0, until=3)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + damage + b"\n" + lines[1] + lines[2])
    write(tmp_path, resumed_at=3, until=4)
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert (tmp_path / "metrics.damaged").read_bytes() == damage + b"\n"
    assert "had 1 lines that cannot be read; they are in metrics.damaged" in capsys.readouterr().err


def test_a_rank_that_does_not_write_leaves_no_file_and_no_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = MetricsLog(tmp_path / "run", enabled=False)
    log.open(step=0, num_steps=2)
    log.write("train", {"loss": 1.0}, step=1)
    log.say("unheard")
    log.advance()
    log.close()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_memory_on_a_cpu_is_what_the_process_held_at_most() -> None:
    before = peak_memory_gib(torch.device("cpu"))
    held = torch.ones(1 << 27)  # half a GiB
    assert peak_memory_gib(torch.device("cpu")) >= max(before, held.nbytes / 2**30)


def test_lines_wait_for_a_disk_that_cannot_be_written_and_none_is_halved(tmp_path, capsys) -> None:
    log = MetricsLog(tmp_path, enabled=True)
    log.open(step=0, num_steps=3)
    log.write("train", {"loss": 1.0}, step=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Room for a few bytes of the second line.
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.jsonl").stat().st_size + 5, before[1]))
    try:
        log.write("train", {"loss": 2.0}, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert "metrics.jsonl cannot be written" in said
    assert "training goes on, 1 lines wait" in said
    assert (tmp_path / "metrics.jsonl").read_bytes().count(b"\n") == 1
    log.write("train", {"loss": 3.0}, step=3)
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 2.0), (3, 3.0)]

"""The front door: commands, faults in one line, exit statuses."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import IO

import pytest
import torch
from distributed.ranks import launch_ranks

from re2tal import cli
from re2tal.cli import COMMANDS, main
from re2tal.runs import exit_status
from re2tal.strict_json import write_json

LAUNCHER = Path(__file__).parents[2] / "launch" / "train.py"


def status_of(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_is_there_and_explains_itself(name, capsys):
    assert status_of([name, "--help"]) == 0
    assert f"usage: re2tal {name}" in capsys.readouterr().out


def test_help_names_the_commands_without_importing_them(capsys):
    code = "import sys; from re2tal.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert all(name in done.stdout for name in COMMANDS)


def test_an_unknown_command_is_answered_with_the_known_ones(capsys):
    assert status_of(["trian"]) == 2
    printed = capsys.readouterr().err
    assert "unknown command 'trian'; known: demo, annotations, recipes, datasets, doctor, init, shards, " in printed
    assert printed.endswith("; did you mean 'train'?\n")


def test_an_option_that_is_mistyped_is_answered_with_the_nearest(capsys):
    assert status_of(["evaluate", "--predictions", "a.json", "--anotations", "b.json"]) == 2
    assert "--annotations" in capsys.readouterr().err


def test_an_unknown_shell_is_answered_with_the_known_ones(capsys):
    assert status_of(["--print-completion", "tcsh"]) == 2
    assert "--print-completion takes a shell: bash, zsh, fish" in capsys.readouterr().err


def runs_instead(function: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command is `function`."""
    monkeypatch.setattr(cli, "command", lambda name, arguments: (function, arguments))


def test_a_name_that_does_not_fit_the_terminals_encoding_is_escaped(monkeypatch):
    written = BytesIO()
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(written, encoding="latin-1"))
    runs_instead(lambda: print("прыг é", flush=True), monkeypatch)
    assert status_of(["doctor"]) == 0
    assert written.getvalue() == rb"\u043f\u0440\u044b\u0433 " + "é\n".encode("latin-1")


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("wrong key"), 2), (FileNotFoundError("no such file"), 2), (FloatingPointError("diverged"), 78)],
)
def test_a_fault_of_the_input_is_one_line_and_a_status_and_its_traceback_is_kept(
    error, status, monkeypatch, capsys, tmp_path
):
    def command() -> None:
        raise error

    runs_instead(command, monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = tmp_path / "re2tal" / "last_error.txt"
    assert status_of(["demo"]) == status
    assert capsys.readouterr().err == f"re2tal: {error} (traceback in {kept}; --debug prints it)\n"
    assert kept.read_text().startswith("Traceback (most recent call last):")
    kept.unlink()
    assert status_of(["demo", "--debug"]) == status
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback (most recent call last):")
    assert printed.endswith(f"re2tal: {error}\n")
    assert not kept.exists()


def test_a_message_of_ours_is_the_line_alone(capsys):
    assert status_of(["detect", "--model", "a", "--run", "b"]) == 2
    assert capsys.readouterr().err == (
        "re2tal: --model and --run mean the same; give one, the folder of a trained detector\n"
    )


def test_a_file_that_the_system_refuses_is_named_first(monkeypatch, capsys, tmp_path):
    runs_instead(lambda: print((tmp_path / "a.txt").read_text()), monkeypatch)
    assert status_of(["demo"]) == 2
    assert capsys.readouterr().err == f"re2tal: {tmp_path / 'a.txt'}: No such file or directory\n"


def test_a_home_that_cannot_be_written_to_is_no_second_fault(monkeypatch, capsys, tmp_path):
    def command() -> None:
        raise OSError("no space")

    runs_instead(command, monkeypatch)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert status_of(["demo"]) == 2
    assert capsys.readouterr().err == "re2tal: no space\n"


@pytest.mark.parametrize("ranks", ["", "two"])
def test_without_a_home_or_a_number_of_ranks_the_line_is_still_the_line(ranks, monkeypatch, capsys):
    def command() -> None:
        raise OSError("no space")

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    runs_instead(command, monkeypatch)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setenv("WORLD_SIZE", ranks)
    assert status_of(["demo"]) == 2
    assert capsys.readouterr().err == "re2tal: no space\n"


def unread() -> IO[str]:
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w", buffering=1)


@pytest.mark.parametrize("arguments", [["--json", "/dev/stdout"], ["--json=/dev/fd/1"]])
def test_what_is_printed_stands_beside_a_document_that_goes_to_stdout(arguments, monkeypatch, capfd):
    def prints_and_writes(json: Path) -> None:
        print("a table")
        write_json(json, [1])

    runs_instead(prints_and_writes, monkeypatch)
    assert status_of(["demo", *arguments]) == 0
    assert capfd.readouterr() == ("[1]\n", "a table\n")


@pytest.mark.parametrize("arguments", [["demo"], ["demo", "--help"], ["--help"], ["demo", "--help-all"]])
def test_output_that_nobody_reads_any_more_is_no_fault(arguments, monkeypatch, capsys):
    def command() -> None:
        print("a line")

    runs_instead(command, monkeypatch)
    with unread() as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert status_of(arguments) == 141
    assert capsys.readouterr().err == ""


def test_nor_is_more_output_than_a_pipe_holds(monkeypatch, capsys):
    """What could not be written is gone from the buffer then: to flush it once more succeeds."""

    def command() -> None:
        print("a line\n" * 100_000)

    runs_instead(command, monkeypatch)
    with unread() as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert status_of(["demo"]) == 141
    assert capsys.readouterr().err == ""


def test_a_pipe_that_breaks_elsewhere_is_told(monkeypatch, capsys):
    def command() -> None:
        raise BrokenPipeError("a worker is gone")

    runs_instead(command, monkeypatch)
    assert status_of(["demo"]) == 2
    assert "a worker is gone" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation"),
        MemoryError("Unable to allocate 11.1 PiB for an array with shape (125000000000, 14, 14)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_too_little_memory_is_said_with_what_needs_less(error, monkeypatch, capsys):
    def command() -> None:
        raise error

    runs_instead(command, monkeypatch)
    assert status_of(["train"]) == 2
    said = capsys.readouterr().err
    assert str(error).partition("\n")[0] in said
    assert "--engine.memory-budget-gb auto" in said


def test_the_keyboard_stops_a_command_in_one_line(monkeypatch, capsys):
    def command() -> None:
        raise KeyboardInterrupt

    runs_instead(command, monkeypatch)
    assert status_of(["demo"]) == 130
    said = capsys.readouterr().err
    assert said == "re2tal: stopped by the keyboard; finished files are kept, a training run goes on with --resume\n"


def test_a_bug_keeps_its_traceback(monkeypatch):
    def command() -> None:
        raise RuntimeError("ours")

    runs_instead(command, monkeypatch)
    with pytest.raises(RuntimeError, match="ours"):
        main(["demo"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "/no/such.json"], "/no/such.json is not a file"),
        (["--ds", "/no/ds.json"], "/no/ds.json is not a file"),
        (["--data.shards", "/no/shards", "--out", "OUT"], "/no/shards/training is not a folder"),
        (["--resume", "--overwrite"], "resume continues the earlier run, overwrite removes it; choose one of them"),
        (
            ["--recipe", "thumos14_re2swin_tiny"],
            "training is not a folder; if it was moved, give its new place, or else build",
        ),
    ],
)
def test_what_a_newcomer_gets_wrong_is_said_in_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert status_of(["train", *("run" if argument == "OUT" else argument for argument in arguments)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["detect", "a.mp4", "--classes"], "--classes"),
        (["shards", "build", "--subsets", "--videos", "a", "--annotations", "b", "--out", "c"], "--subsets"),
        (["compare", "a.json", "b.json", "--seeds_of_a", "--json", "c.json"], "--seeds_of_a"),
    ],
)
def test_an_option_of_several_values_is_not_given_without_one(arguments, option, capsys):
    """Most often its variable of the shell is not set; all classes, or all subsets, were taken."""
    assert status_of(arguments) == 2
    assert capsys.readouterr().err == f"re2tal: {option} has no value; give one or more, or leave it out\n"


def test_launched_by_the_script_too():
    with pytest.raises(
        RuntimeError, match=r"(?s)rank 0 ended with 2: .*unknown recipe 'demos'; nearest: \['demo', "
    ) as said:
        launch_ranks([sys.executable, str(LAUNCHER), "--recipe", "demos"], world_size=1)
    assert "Traceback" not in str(said.value)


def test_the_launchers_own_option_is_passed_over():
    from re2tal.cli.starting_point import starting_point

    arguments = ["--local_rank=1", "--recipe", "thumos14_re2swin_tiny", "--num-steps", "256"]
    run, rest = starting_point(arguments, default="demo")
    assert (run.name, rest) == ("thumos14_re2swin_tiny", ["--num-steps", "256"])


def test_the_version_is_told_without_importing_torch():
    code = "import sys; from re2tal.cli import main; main(['--version']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"re2tal {version('re2tal')}\n"


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "re2tal", "trian"], capture_output=True, text=True, check=False)
    assert done.returncode == exit_status.WRONG_INPUT
    assert "unknown command 'trian'" in done.stderr


def test_every_exit_status_means_one_thing_and_job_scripts_know_theirs():
    statuses = [value for name, value in vars(exit_status).items() if name.isupper()]
    assert len(set(statuses)) == len(statuses)
    assert str(exit_status.INTERRUPTED) in (LAUNCHER.parent / "train.slurm").read_text()


def test_an_unknown_preset_is_answered_with_the_known_ones(capsys):
    assert status_of(["train", "--ds", "zero4"]) == exit_status.WRONG_INPUT
    assert "presets are zero1, zero2, zero2_offload, zero3, zero3_offload" in capsys.readouterr().err

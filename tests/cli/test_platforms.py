"""What macOS and Windows lack is taken away from a process: the commands that need no training still work there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from re2tal.runs.model_folder import SHIPPED

SAMPLES = Path(__file__).parents[2] / "samples"

WITHOUT = """
import concurrent.futures.process, os, signal, subprocess, sys, torch  # on Linux, these need what goes now
from multiprocessing import resource_tracker
resource_tracker._HAVE_SIGMASK = False
for module, names in {
    os: ("sched_getaffinity", "register_at_fork", "O_DIRECTORY", "sysconf"),
    signal: ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGRTMIN", "pthread_sigmask", "sigwaitinfo"),
}.items():
    for name in names:
        delattr(module, name)
for name in ("decord", "deepspeed", "fcntl", "resource", "torchcodec"):
    sys.modules[name] = None  # its import fails
"""


def run(code: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + code], cwd=folder, capture_output=True, text=True, check=False, timeout=240
    )


def test_commands_that_need_no_training_work_without_what_linux_alone_has(tmp_path) -> None:
    video = next(SAMPLES.glob("*.mp4"))
    shutil.copytree(SHIPPED, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "loss": 1.0}\n')
    code = f"""
from re2tal.cli import main
def call(*arguments):
    try:
        main(arguments)
    except SystemExit as ended:
        assert not ended.code, (arguments, ended.code)
call("demo", "--out", "demo_data", "--num-training", "1", "--num-validation", "1")
call("detect", {str(video)!r}, "--out", "run/results.json", "--device", "cpu")
call("evaluate", "--predictions", "run/results.json", "--annotations", {str(SAMPLES / "annotations.json")!r})
call("report", "--run", "run", "--annotations", {str(SAMPLES / "annotations.json")!r})
call("doctor", {str(SAMPLES)!r}, "--quick")
call("init", {str(SAMPLES)!r}, {str(SAMPLES / "annotations.json")!r}, "--out", "recipe.json")
from re2tal.runs.viewing import ViewOptions, open_viewer
open_viewer(__import__("pathlib").Path("run/results.json"), ViewOptions(port=0)).server_close()
from re2tal.data.streaming.workers import heed_only_the_parent, stop_signals_blocked
with stop_signals_blocked():
    heed_only_the_parent()
main(["train", "--recipe", "demo"])
"""
    done = run(code, tmp_path)
    assert done.returncode == 2, done.stderr[-3000:]  # of training, the last one
    assert done.stderr.splitlines()[-1].startswith("re2tal: training needs DeepSpeed, and DeepSpeed needs Linux")
    assert list(json.loads((tmp_path / "run" / "results.json").read_text())["results"]) == [video.stem]
    assert (tmp_path / "run" / "report" / "index.html").is_file()
    assert "what a step needs is not known here, without DeepSpeed" in done.stdout
    assert len(list((tmp_path / "demo_data" / "videos").iterdir())) == 2


def test_pyav_stands_in_for_decord_with_a_word_and_the_same_pictures(tmp_path) -> None:
    code = f"""
import numpy as np
from re2tal.data.streaming.decode import DECODERS, check_decoder, count_frames
check_decoder("decord"); check_decoder("decord")
video = open({str(next(SAMPLES.glob("*.mp4")))!r}, "rb").read()
wanted = np.array([0, 7, count_frames(video) - 1])
same = [next(DECODERS[name](video, wanted, at_once=9)) for name in ("decord", "pyav")]
assert (same[0] == same[1]).all()
"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("PyAV decodes the same pictures") == 1

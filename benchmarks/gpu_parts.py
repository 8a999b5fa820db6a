"""The parts of gpu.py: each yields its rows as it measures them."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Row = dict[str, Any]
GIGABYTE = 10**9
SMALL_CLIPS = ["--data.clips.size", "32", "--data.clips.windowing.num-frames", "96", "--num-steps", "24"]
REPOSITORY = Path(__file__).resolve().parents[1]


def machine(device: torch.device) -> Iterator[Row]:
    """One row."""
    import deepspeed
    import transformers

    row: Row = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "transformers": transformers.__version__,
        "cores": os.cpu_count(),
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        properties = torch.cuda.get_device_properties(device)
        row |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "total_gib": total / 2**30,
            "free_gib": free / 2**30,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    yield row


def exactness(device: torch.device) -> Iterator[Row]:
    """A row for each family, number format and way of running."""
    from forms import Case, Network, stages_of

    from re2tal.backbones import BACKBONES
    from re2tal.reversible.monitor import Monitor

    torch.use_deterministic_algorithms(True, warn_only=True)
    for name in (name for name in BACKBONES if name.endswith("_nano")):
        network = Network(name, device=device)
        for autocast in (False, True):
            # Without a grid float32 states are rebuilt with a rounding error.
            grid: float | str = "auto" if autocast else 2.0**-18
            for way, form, saved in (
                ("whole", "reversible", 0),
                ("pieces", "in pieces", 0),
                ("pieces, outputs saved", "in pieces", 2),
            ):
                case = Case(16, 64, 0.5, known=saved)

                def measure(network=network, form=form, case=case, grid=grid, autocast=autocast) -> Row:
                    def gradients(recompute: bool) -> tuple[list[Tensor], float]:
                        torch.manual_seed(0)
                        for parameter in network.parameters:
                            parameter.grad.zero_()
                        backbone = network.form(form, case, recompute=recompute, grid=grid)
                        stages = stages_of(backbone)
                        for path, stage in stages.items():
                            stage.monitor = Monitor(path, every=1)
                        network.step_of(backbone, form, case, autocast=autocast)()
                        drift = max((stage.monitor.reading.drift for stage in stages.values() if recompute), default=0)
                        return [parameter.grad.clone() for parameter in network.parameters], drift

                    rebuilt, drift = gradients(True)
                    return {"drift": drift} | agreement(rebuilt, gradients(False)[0], gradients(False)[0])

                yield guarded({"family": name, "format": "bfloat16" if autocast else "float32", "way": way}, measure)


def agreement(rebuilt: list[Tensor], kept: list[Tensor], again: list[Tensor]) -> Row:
    """How far gradients are from each other, relative to their norm."""
    scale = norm(kept)
    return {
        "equal": all(torch.equal(one, other) for one, other in zip(rebuilt, kept, strict=True)),
        "difference": norm([one - other for one, other in zip(rebuilt, kept, strict=True)]) / scale,
        "noise": norm([one - other for one, other in zip(again, kept, strict=True)]) / scale,
        "finite": all(bool(one.isfinite().all()) for one in rebuilt),
    }


def norm(tensors: list[Tensor]) -> float:
    """Of all of them together."""
    return float(torch.stack([tensor.double().norm() for tensor in tensors]).norm())


def training(device: torch.device) -> Iterator[Row]:
    """A row for each recipe and ZeRO stage."""
    real = ["--data.clips.workers", "2", "--backbone.no-norm-eval", *([] if device.type == "cuda" else SMALL_CLIPS)]
    recipes: dict[str, list[str]] = {"demo": [], "activitynet_re2swin_tiny": real}
    with tempfile.TemporaryDirectory() as folder:
        demo = Path(folder) / "demo"
        run_command(["demo", "--out", str(demo), "--num-training", "8", "--num-validation", "2"])
        places = [
            f"--videos={demo / 'videos'}",
            f"--annotations={demo / 'annotations.json'}",
            f"--out={demo / 'shards'}",
        ]
        run_command(["shards", "build", "--dataset", "demo", *places])
        for recipe, options in recipes.items():
            for stage in (2, 3):
                out = Path(folder) / f"{recipe}-{stage}"
                command = ["--recipe", recipe, "--ds", f"ds_configs/zero{stage}.json", "--out", str(out)]
                command += ["--data.shards", str(demo / "shards"), "--training.epochs", "1", *options]
                command += ["--training.log-every-steps", "1", "--schedule.warmup-epochs", "0"]

                def train(command=command, out=out) -> Row:
                    start = time.perf_counter()
                    launch = ["-m", "deepspeed.launcher.runner", "--num_accelerators", "1", "launch/train.py"]
                    call([sys.executable, *launch, *command])
                    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
                    losses = [line["loss"] for line in log if "loss" in line]
                    return {"seconds": time.perf_counter() - start, "losses": losses, "steps": len(losses)}

                yield guarded({"recipe": recipe, "zero": stage}, train)


def run_command(arguments: list[str]) -> None:
    """One of this package's commands."""
    call([sys.executable, "-m", "re2tal", *arguments])


def call(command: list[str]) -> None:
    """RuntimeError with the end of its output where a command fails."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")


def memory(device: torch.device) -> Iterator[Row]:
    """A row for each backbone, number format and form."""
    from forms import Network, peak_bytes, seconds
    from memory import MODELS, TIMED

    small = device.type != "cuda"
    for autocast in (True,) if small else (True, False):
        for name, model in MODELS.items():
            if small and name not in ("swin3d_tiny", "videomae_base"):
                continue
            network = Network(name, device=device)
            case = replace(model.quick, frames=16, size=64) if small else model.real
            for form in TIMED:

                def measure(form=form, case=case, network=network, autocast=autocast) -> Row:
                    step = network.step(form, case, autocast=autocast)
                    peak = peak_bytes(step, device)
                    reserved = torch.cuda.max_memory_reserved() if device.type == "cuda" else None
                    times = [seconds(step, device) for _ in range(2 if small else 3)]
                    return {"peak_gib": peak / 2**30, "reserved_bytes": reserved, "seconds": statistics.median(times)}

                about = {"backbone": name, "format": "bfloat16" if autocast else "float32", "form": form}
                yield guarded(about | {"case": str(case)}, measure)


def longest(device: torch.device) -> Iterator[Row]:
    """A row for each budget, form and length that was tried."""
    from forms import Case, Network, peak_bytes

    small = device.type != "cuda"
    name, size, unit = ("swin3d_nano", 32, 16) if small else ("swin3d_tiny", 224, 64)
    total = 24 * 2**20 if small else torch.cuda.get_device_properties(device).total_memory
    shapes, network = Network(name, device=device, predicted=True), Network(name, device=device)
    weights = sum(2 * parameter.nbytes for parameter in network.parameters)
    budgets = {"11 GB": 11 * GIGABYTE, "whole": int(0.97 * total)} if not small else {"24 MiB": total}
    for label, budget in budgets.items():
        for form in ("plain", "checkpoint", "in pieces"):

            def case(frames: int) -> Case:
                return Case(frames, size, 2 if small else 384)

            def predicted(frames: int, form=form) -> int:
                step = shapes.step(form, case(frames), autocast=True)
                with shapes.mode:
                    step()
                    return peak_bytes(step, torch.device("cpu"))

            # A line through two lengths, then through the longer one and where that line met the budget.
            most, lengths = 0, [4 * unit, 8 * unit]
            for _ in range(2):
                first, second = (predicted(length) for length in lengths)
                slope = (second - first) / (lengths[1] - lengths[0])
                most = max(unit, int((budget - weights - second) / slope + lengths[1]) // unit * unit)
                lengths = [8 * unit, max(most, 9 * unit)]

            for frames in (most - unit * max(1, most // (20 * unit)), most + unit * max(1, most // (10 * unit))):

                def attempt(frames=frames, form=form, budget=budget) -> Row:
                    if device.type == "cuda":
                        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total))
                    start = time.perf_counter()
                    peak = peak_bytes(network.step(form, case(frames), autocast=True), device)
                    found = {"fits": peak + weights <= budget, "peak_gib": peak / 2**30}
                    return found | {"seconds_of_two_steps": time.perf_counter() - start}

                about = {"budget": label, "form": form, "frames": frames, "size": size, "predicted_frames": most}
                yield guarded(about | {"predicted_gib": predicted(frames) / 2**30}, attempt)


def planner(device: torch.device) -> Iterator[Row]:
    """A row for each backbone."""
    from planner import CASES, QUICK, measure

    with tempfile.TemporaryDirectory() as folder:
        ds = Path(folder) / "ds.json"
        ds.write_text(json.dumps({"zero_optimization": {"stage": 0}}))
        for name, case in (CASES if device.type == "cuda" else QUICK).items():
            yield guarded({"backbone": name}, lambda name=name, case=case: measure(name, *case, ds, device, repeats=3))


def offload(device: torch.device) -> Iterator[Row]:
    """A row for each backbone."""
    from forms import Case, Network, peak_bytes, rounds

    cases = {"swin3d_tiny": Case(256, 224, 384), "videomae_base": Case(256, 224, 256)}
    if device.type != "cuda":
        cases = {"swin3d_nano": Case(32, 32, 1)}
    for name, case in cases.items():

        def measure(name=name, case=case) -> Row:
            network = Network(name, device=device)
            steps = {
                "device": network.step("in pieces", case, autocast=True),
                "host": network.step("in pieces", case, autocast=True, offload=True),
            }
            peaks = {where: peak_bytes(step, device) / 2**30 for where, step in steps.items()}
            ratios = [each["host"] / each["device"] for each in rounds(steps, device, num=3)]
            return {"peak_gib": peaks, "time_host_to_device": statistics.median(ratios)}

        yield guarded({"backbone": name, "case": str(case)}, measure)


def loader(device: torch.device) -> Iterator[Row]:
    """A row for each number of workers."""
    from dataclasses import asdict

    from streaming import demo_shards, measure

    from re2tal.data.streaming.stream import ClipConfig
    from re2tal.data.streaming.windows import Slide

    windowing = Slide(128, frames_per_second=8.0)
    config = ClipConfig(windowing=windowing, size=64, fit="stretch", crop_area=(1, 1), flip=False)
    with tempfile.TemporaryDirectory() as folder:
        shards = demo_shards(Path(folder), num_videos=32 if device.type == "cuda" else 8)
        for workers in (0, 2, os.cpu_count() or 2) if device.type == "cuda" else (0, 1):
            measured = replace(config, workers=workers)
            yield guarded({}, lambda measured=measured: asdict(measure(shards, measured, batch_size=4, epochs=1)))


def coupling(device: torch.device) -> Iterator[Row]:
    """A row for each shape."""
    from coupling import CASES, QUICK, compare

    for name, case in (CASES if device.type == "cuda" else QUICK).items():
        yield guarded({"case": name}, lambda case=case: compare(*case, rounds=5, device=device))


def guarded(about: Row, measure: Callable[[], Row]) -> Row:
    """What was measured, or what kept it from being measured."""
    start = time.perf_counter()
    try:
        found = measure()
    except torch.OutOfMemoryError:
        found = {"out_of_memory": True}
    except Exception as error:
        found = {"failure": f"{type(error).__name__}: {error}"[:2000], "traceback": traceback.format_exc()[-2000:]}
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return about | found | {"took": round(time.perf_counter() - start, 2)}


PARTS: dict[str, Callable[[torch.device], Iterator[Row]]] = {
    part.__name__: part for part in (machine, exactness, training, memory, longest, planner, offload, loader, coupling)
}

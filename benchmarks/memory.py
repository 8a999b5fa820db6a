"""Peak activation memory and step time of every way to train a backbone; forms.py says what the ways are.

    python benchmarks/memory.py [--quick] [--device cuda] [--autocast] [--model NAME] [--form NAME] [--json FILE]

    peak       most bytes alive at once in forward and backward, less parameters and their gradients: counted storage by
               storage on the CPU, by the allocator on CUDA
    predicted  the same, counted on tensors without numbers, by the device's operations: equal to the byte on a CPU
    resident   what the process held at most during a step, less what it held before it: the operating system's count
    time       median over paired runs: all forms in turn, in every one
    growth     what the peak in pieces gains when the stage with most blocks has twice as many; predicted
    drift      gradient of the first weight in pieces, against the same network that keeps its activations

On a CPU, videos are as large as a machine of 16 GiB holds plain, with peaks predicted and resident, and the peaks of
the paper's sizes are predicted; on CUDA they are measured. With `--quick` peaks are predicted, and time and drift are
measured on smaller videos. Beside every time stands the predicted peak of the same form on the same video. `--json`
writes {model: {vs_plain, vs_checkpoint, resident_vs_plain, resident_vs_checkpoint, depth_growth, time_vs_plain,
time_vs_checkpoint, drift}}, in pieces.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from forms import FORMS, Case, Network, Step, median_ratio, peak_bytes, resident_bytes, rounds

from re2tal.strict_json import write_json


@dataclass(frozen=True)
class Model:
    """On what a backbone is measured."""

    stage: str
    """Where `growth` comes from."""
    case: Case
    """What a machine of 16 GiB holds plain: frames, rows and columns, MiB of a piece."""
    quick: Case
    """What a step takes a few seconds for, in pieces that are as many states as in `case`, or whole."""
    real: Case
    """The paper's frames, or as many of its clips of 16 as make the same video."""


VIDEOMAE = "encoder.model.videomae.encoder.layer"
# Of four stages of the slow pathway, then of the fast one. Their first blocks take 18 % of all multiplications, those
# of the last two 12 %, and least of the memory.
LAST_TWO = (False, False, True, True) * 2
# Video Swin's states are halved from stage to stage, its multiplications are not: what late stages keep costs little.
LATE = (0, 1, 6, 2)
MODELS = {
    "swin3d_tiny": Model(
        "layers.2.blocks",
        Case(256, 224, 192, known=LATE),
        quick=Case(64, 112, 12, known=LATE),
        real=Case(768, 224, 512, known=LATE),
    ),
    "videomae_base": Model(
        VIDEOMAE, Case(256, 112, 32, known=7), quick=Case(32, 112, 64, known=7), real=Case(768, 224, 128, known=8)
    ),
    "videomae_large": Model(
        VIDEOMAE, Case(128, 112, 32, known=12), quick=Case(16, 64, 16, known=12), real=Case(768, 224, 128, known=15)
    ),
    "slowfast_r101_8x8": Model(
        "slow_path.layer3",
        Case(64, 112, 64, keep_nonresidual=LAST_TWO),
        quick=Case(32, 112, 64, keep_nonresidual=LAST_TWO),
        real=Case(768, 224, 256, keep_nonresidual=LAST_TWO),
    ),
}
BASES = ("plain", "checkpoint")
JUDGED = (*BASES, "in pieces")
QUICKLY = (*JUDGED, "pieces, attention", "pieces, both")
TIMED = (*BASES, "reversible", "in pieces", "pieces, known", "pieces, attention", "pieces, both")


def peaks_of(
    network: Network,
    case: Case,
    device: torch.device,
    *,
    forms: Sequence[str],
    autocast: bool,
    doubled: str | None = None,
) -> dict[str, int]:
    """Of every form that there is; on CUDA those that do not fit are left out. `doubled` is a stage, twice as deep."""
    peaks = {}
    for form in forms:
        step = network.step(form, case, doubled=doubled, autocast=autocast)
        if step is None:
            continue
        try:
            with network.mode:
                if network.predicted:
                    step()  # tables that a network makes once stay
                peaks[form] = peak_bytes(step, torch.device("cpu") if network.predicted else device)
        except torch.OutOfMemoryError:
            print(f"{form}: out of memory")
    return peaks


def drift(network: Network, case: Case, *, autocast: bool) -> float:
    """Relative error of the first weight's gradient, which all rebuilt states have gone into."""
    weight = next(parameter for parameter in network.parameters if parameter.ndim > 1)
    gradients = []
    for recompute in (True, False):
        assert weight.grad is not None
        weight.grad.zero_()
        step = network.step("in pieces", case, recompute=recompute, autocast=autocast)
        assert step is not None
        step()
        gradients.append(weight.grad.clone())
    rebuilt, kept = gradients
    return float((rebuilt - kept).norm() / kept.norm())


def times(
    network: Network, case: Case, device: torch.device, *, forms: Sequence[str], num: int, autocast: bool
) -> tuple[list[dict[str, float]], dict[str, int]]:
    """Seconds of the forms in every round, and the bytes that the operating system saw in one more; none on CUDA."""
    steps: dict[str, Step] = {}
    for form in forms:
        step = network.step(form, case, autocast=autocast)
        assert step is not None
        steps[form] = step
    resident = {form: resident_bytes(step) for form, step in steps.items()} if device.type == "cpu" else {}
    return list(rounds(steps, device, num=num, warm=bool(resident))), resident


def show(
    title: str,
    peaks: Mapping[str, int],
    seconds: Sequence[Mapping[str, float]] = (),
    resident: Mapping[str, int] | None = None,
) -> None:
    """Prints a table of peaks, of what the operating system saw, and of times: of those that there are."""
    print(f"\n{title}")
    heads = ["peak MiB", "x plain", "x ckpt"] if peaks else []
    heads += ["resident", "x plain", "x ckpt"] if resident else []
    heads += ["seconds", "x plain", "x ckpt"] if seconds else []
    print(f"{'':22}" + "".join(f"{head:>10}" for head in heads))
    for form in peaks or seconds[0]:
        line = f"{form:22}"
        for found in (peaks, resident):
            if found:
                line += f"{found[form] / 2**20:10.1f}" + "".join(
                    f"{found[form] / found[base]:10.3f}" if base in found else f"{'-':>10}" for base in BASES
                )
        if seconds and form in seconds[0]:
            line += f"{statistics.median(each[form] for each in seconds):10.2f}" + "".join(
                f"{median_ratio(seconds, form, base):10.2f}" for base in BASES
            )
        print(line, flush=True)


def measure(
    name: str, device: torch.device, *, quick: bool, autocast: bool, num: int, chosen: Sequence[str] | None
) -> dict[str, float]:
    """Prints the tables of one backbone, and returns its ratios."""
    model, network = MODELS[name], Network(name, device=device)
    shapes = Network(name, device=device, predicted=True)
    case, counted, how = model.case, shapes, "predicted"
    if device.type == "cuda":
        case, counted, how = model.real, network, "measured"
    peaks = peaks_of(counted, case, device, forms=JUDGED if quick else FORMS, autocast=autocast)
    doubled = peaks_of(counted, case, device, forms=["in pieces"], autocast=autocast, doubled=model.stage)
    show(f"{name}, {case}, {how}", peaks)
    if case is not model.real and not quick:
        show(f"{name}, {model.real}, predicted", peaks_of(shapes, model.real, device, forms=FORMS, autocast=autocast))
    timed = model.quick if quick else case
    forms = [form for form in (QUICKLY if quick else TIMED) if form in JUDGED or chosen is None or form in chosen]
    beside = peaks_of(shapes, timed, device, forms=forms, autocast=autocast)
    seconds, resident = times(network, timed, device, forms=forms, num=num, autocast=autocast)
    show(f"{name}, {timed}: peaks predicted, times measured", beside, seconds, resident)
    ratios = {f"vs_{base}": peaks["in pieces"] / peaks[base] for base in BASES}
    ratios |= {f"resident_vs_{base}": resident["in pieces"] / resident[base] for base in BASES if resident}
    ratios |= {"depth_growth": doubled["in pieces"] / peaks["in pieces"] - 1}
    ratios |= {f"time_vs_{base}": median_ratio(seconds, "in pieces", base) for base in BASES}
    return ratios | {"drift": drift(network, timed, autocast=autocast)}


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small videos, 3 runs; under 5 minutes on two cores")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--autocast", action="store_true", help="bfloat16 branches, all states in float32 on the grid")
    parser.add_argument("--model", action="append", choices=sorted(MODELS), help="only these; may be repeated")
    parser.add_argument("--form", action="append", choices=TIMED, help="of the other forms, time only these")
    parser.add_argument("--runs", type=int, help="how many timed runs of each form")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results = {}
    for name in [name for name in MODELS if name in (arguments.model or MODELS)]:
        results[name] = measure(
            name,
            arguments.device,
            quick=arguments.quick,
            autocast=arguments.autocast,
            num=arguments.runs or (3 if arguments.quick else 5),
            chosen=arguments.form,
        )
        print(f"\n{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in results[name].items()), flush=True)
    if arguments.json:
        write_json(arguments.json, results)


if __name__ == "__main__":
    main()

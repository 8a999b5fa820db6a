"""RevNet against its equations written out, rewired and plain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from re2tal.backbones.base import freeze_norms
from re2tal.backbones.born_reversible.revnet import REVNET, SIZES, RevNet
from re2tal.backbones.weights import load_weights
from re2tal.reversible.live_bytes import LiveBytes
from re2tal.rewire import RewiringConfig, rewire

BOTTLENECKS = {"bottleneck": True, "stem": (7, 2), "channels": (16, 32, 32, 64), "depths": (2, 1, 3)}
KINDS = {"basic": SIZES["revnet_nano"] | {"depths": (3, 2)}, "bottleneck": BOTTLENECKS}


def build(kind: str, wiring: RewiringConfig | None = None, **options) -> RevNet:
    torch.manual_seed(0)
    model = RevNet(**KINDS[kind] | options)
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    if wiring is not None:
        rewire(model, config=wiring)
    return model


def clips(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    frames = torch.randn(2, 3, 2, 18, 21, dtype=dtype, generator=torch.Generator().manual_seed(1))
    return frames, torch.ones(2, 2, dtype=torch.bool)


def written_out(entries: dict[str, Tensor], frames: Tensor, *, training: bool, depths: tuple[int, ...]) -> Tensor:
    """From entries by name alone: (B, 3, T, H, W) -> (B, C, T)."""

    def norm(x: Tensor, name: str) -> Tensor:
        means, variances = (entries[f"{name}.running_{one}"] for one in ("mean", "var"))
        if training:
            means, variances = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), unbiased=False)
        x = (x - means[:, None, None]) / (variances + 1e-3).sqrt()[:, None, None]
        return x * entries[f"{name}.weight"][:, None, None] + entries[f"{name}.bias"][:, None, None]

    def convolved(x: Tensor, name: str, stride: int) -> Tensor:
        weight = entries[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def residual(x: Tensor, name: str, stride: int) -> Tensor:
        for index in range(3 if f"{name}.2.conv.weight" in entries else 2):
            if f"{name}.{index}.norm.weight" in entries:
                x = norm(x, f"{name}.{index}.norm").clamp(min=0)
            x = convolved(x, f"{name}.{index}.conv", stride if index == 0 else 1)
        return x

    def skip(x: Tensor, name: str, stride: int, channels: int) -> Tensor:
        if f"{name}.weight" in entries:
            return convolved(x, name, stride)
        if stride == 2:
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        zeros = torch.zeros_like(x[:, :1]).expand(-1, (channels - x.shape[1]) // 2, -1, -1)
        return torch.cat((zeros, x, zeros), dim=1)

    stem = 2 if entries["stem.conv.weight"].shape[-1] == 7 else 1
    x = norm(convolved(torch.cat(list(frames.transpose(1, 2))), "stem.conv", stem), "stem.norm").clamp(min=0)
    x = F.max_pool2d(x, 3, 2, padding=1) if stem == 2 else x
    first, second = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
    for stage, depth in enumerate(depths):
        for index in range(depth):
            name, stride = f"stages.{stage}.{index}", 2 if stage and not index else 1
            before = second
            change = residual(second, f"{name}.f", stride)
            first = skip(first, f"{name}.skip1", stride, change.shape[1]) + change
            change = residual(first, f"{name}.g", 1)
            second = skip(before, f"{name}.skip2", stride, change.shape[1]) + change
    x = norm(torch.cat((first, second), dim=1), "norm").clamp(min=0).mean(dim=(2, 3))
    return x.unflatten(0, (len(frames), -1)).transpose(1, 2)


WIRINGS = {
    "plain": None,
    "rewired": RewiringConfig(),
    "in pieces": RewiringConfig(chunk_mebibytes=0.001),
    "whatever else it says": RewiringConfig(unit="block", beta=0.0, segment=1, merge="extrapolate"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_it_is_the_equations_written_out(kind, training, wiring) -> None:
    if training and wiring == "in pieces":
        pytest.skip("batch statistics are of all pieces")
    model = build(kind, WIRINGS[wiring]).double().train(training)
    frames, mask = clips()
    entries = {
        name: value.detach().clone().requires_grad_(value.is_floating_point())
        for name, value in model.state_dict().items()
    }
    wanted = written_out(entries, frames, training=training, depths=KINDS[kind]["depths"])
    found = model(frames, mask).values
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    for output in (wanted, found):
        (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    torch.testing.assert_close(gradients, {name: entries[name].grad for name in gradients}, rtol=1e-7, atol=1e-8)


def test_with_an_example_it_is_shown_to_be_the_same_network_and_statistics_are_written_once() -> None:
    model, plain = build("basic"), build("basic")
    frames, mask = clips(torch.float32)
    report = rewire(model, example=(frames, mask))
    assert [(stage.name, stage.blocks, stage.rewired_blocks) for stage in report.stages] == [
        ("stages.0", 3, 3),
        ("stages.1", 2, 1),
    ]
    assert report.ends == ()
    for network in (model, plain):
        network(frames, mask).values.square().sum().backward()
    assert list(model.state_dict()) == list(plain.state_dict())
    torch.testing.assert_close(dict(model.named_buffers()), dict(plain.named_buffers()))


def test_units_are_rebuilt_to_the_bit_in_float32() -> None:
    frames, mask = clips(torch.float32)
    gradients = []
    for recompute in (True, False):
        model = build("bottleneck", RewiringConfig(recompute=recompute))
        freeze_norms(model)
        model(frames, mask).values.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert all(map(torch.equal, *gradients))


def test_weights_load_by_name(tmp_path) -> None:
    model, other = build("bottleneck", RewiringConfig()), build("bottleneck")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    entries = other.state_dict()
    save_file(entries | {"head.weight": torch.zeros(5, 64)}, tmp_path / "revnet.safetensors")
    report = load_weights(model, tmp_path / "revnet.safetensors", layouts=(REVNET,))
    assert report.ignored == ("head.weight",)
    torch.testing.assert_close(model.state_dict(), entries)


def test_memory_hardly_grows_with_depth() -> None:
    peaks = {}
    for rewired in (True, False):
        for depth in (3, 9):
            model = build("basic", RewiringConfig() if rewired else None, depths=(depth, 1))
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            with LiveBytes() as live:
                model(*clips(torch.float32)).values.sum().backward()
            peaks[rewired, depth] = live.peak
    assert peaks[True, 9] < 1.1 * peaks[True, 3]
    assert peaks[True, 9] < 0.6 * peaks[False, 9]


@pytest.mark.parametrize(("name", "millions"), [("revnet_38", 0.46), ("revnet_104", 45.2)])
def test_sizes_are_those_of_the_paper(name, millions) -> None:
    """Table 1, which counts a classifier of 10 or 1000 classes too."""
    with torch.device("meta"):
        model = RevNet(**SIZES[name])
    head = (1000 if name == "revnet_104" else 10) * (model.out_channels + 1)
    assert sum(one.numel() for one in model.parameters()) + head == pytest.approx(1e6 * millions, rel=0.02)


def test_the_example_of_the_documentation_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "backbones.md").read_text()
    code = page.partition("## Born reversible")[2].partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    assert all(parameter.grad is not None for parameter in names["model"].parameters())

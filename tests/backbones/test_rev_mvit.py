"""RevViT and Rev-MViT against their equations written out, and weights with PySlowFast's names."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from re2tal.backbones.born_reversible.rev_mvit import PYSLOWFAST, SIZES, RevMViT
from re2tal.backbones.weights import load_weights
from re2tal.reversible.live_bytes import LiveBytes
from re2tal.rewire import RewiringConfig, rewire

NANO = ["rev_mvit_nano", "rev_vit_nano"]


def build(name: str, wiring: RewiringConfig | None = None, **options) -> RevMViT:
    """Plain without `wiring`."""
    torch.manual_seed(0)
    model = RevMViT(**SIZES[name] | options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    if wiring is not None:
        rewire(model, config=wiring)
    return model


def clips(name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    frames = torch.randn(2, 3, 4, 32, 32, dtype=dtype, generator=generator)
    return frames, torch.ones(2, 4, dtype=torch.bool)


# The layers of PySlowFast's checkpoint, computed from its entries by name alone.


def written_out(
    entries: dict[str, Tensor], frames: Tensor, *, strides: dict[int, int], depth: int, heads: int
) -> Tensor:
    """Rev-MViT of video: (B, 3, T, H, W) -> (B, 2 C, T / 2)."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], entries[f"{name}.weight"], entries[f"{name}.bias"], eps=1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, entries[f"{name}.weight"], entries.get(f"{name}.bias"))

    def pool(x: Tensor, name: str, letter: str, grid: tuple[int, int, int], stride: int) -> Tensor:
        weight = entries.get(f"{name}.pool_{letter}.weight")
        if weight is None:
            return x
        heads_out = []
        for head in range(x.shape[1]):
            video = x[:, head].permute(0, 2, 1).reshape(len(x), -1, *grid)
            video = F.conv3d(video, weight, stride=(1, stride, stride), padding=1, groups=len(weight))
            heads_out.append(norm(video.flatten(2).permute(0, 2, 1), f"{name}.norm_{letter}"))
        return torch.stack(heads_out, dim=1)

    def by_head(x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], heads, -1).permute(0, 2, 1, 3)

    def attend(x: Tensor, name: str, grid: tuple[int, int, int], q_stride: int, kv_stride: int) -> Tensor:
        q, k, v = linear(norm(x, f"{name}.F.norm"), f"{name}.F.attn.qkv").chunk(3, dim=-1)
        q = pool(by_head(q), f"{name}.F.attn", "q", grid, q_stride)
        k = pool(by_head(k), f"{name}.F.attn", "k", grid, kv_stride)
        v = pool(by_head(v), f"{name}.F.attn", "v", grid, kv_stride)
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
        return linear((weights @ v).permute(0, 2, 1, 3).flatten(2), f"{name}.F.attn.proj")

    def mlp(x: Tensor, name: str) -> Tensor:
        return linear(F.gelu(linear(norm(x, f"{name}.G.norm"), f"{name}.G.mlp.fc1")), f"{name}.G.mlp.fc2")

    weight, bias = entries["patch_embed.proj.weight"], entries["patch_embed.proj.bias"]
    video = F.conv3d(frames, weight, bias, stride=(2, 4, 4), padding=(1, 3, 3))
    grid = (video.shape[2], video.shape[3], video.shape[4])
    x = video.flatten(2).permute(0, 2, 1)
    x = x + entries["pos_embed_spatial"].repeat(1, grid[0], 1)
    x = x + entries["pos_embed_temporal"].repeat_interleave(grid[1] * grid[2], dim=1)
    first, second, kv_stride = x, x, 4
    for index in range(depth):
        name = f"rev_backbone.layers.{index}"
        if index in strides:
            heads, kv_stride = 2 * heads, kv_stride // strides[index]
            x = (first + second) / 2
            skip = pool(by_head(linear(x, f"{name}.res_proj")), f"{name}.F.attn", "q", grid, strides[index])
            x = skip.permute(0, 2, 1, 3).flatten(2) + attend(x, name, grid, strides[index], kv_stride)
            x = x + mlp(x, name)
            grid = (grid[0], grid[1] // strides[index], grid[2] // strides[index])
            first = second = x
        else:
            first = first + attend(second, name, grid, 1, kv_stride)
            second = second + mlp(first, name)
    x = norm(torch.cat([first, second], dim=-1), "norm")
    return x.reshape(len(x), grid[0], -1, x.shape[-1]).mean(dim=2).permute(0, 2, 1)


def pictures_written_out(entries: dict[str, Tensor], frames: Tensor, *, depth: int, heads: int) -> Tensor:
    """RevViT, frame by frame: (B, 3, T, H, W) -> (B, 2 C, T). No layer pools."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], entries[f"{name}.weight"], entries[f"{name}.bias"], eps=1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ entries[f"{name}.weight"].T + entries[f"{name}.bias"]

    weight, features = entries["patch_embed.proj.weight"], []
    for picture in frames.unbind(2):
        x = F.conv2d(picture, weight, entries["patch_embed.proj.bias"], stride=weight.shape[-1])
        first = second = x.flatten(2).permute(0, 2, 1) + entries["pos_embed"]
        for index in range(depth):
            name = f"rev_backbone.layers.{index}"
            normed = norm(second, f"{name}.F.norm")
            q, k, v = (linear(normed, f"{name}.F.attn.{one}").unflatten(-1, (heads, -1)) for one in "qkv")
            weights = torch.einsum("bihc,bjhc->bhij", q, k).div(q.shape[-1] ** 0.5).softmax(dim=-1)
            first = first + linear(torch.einsum("bhij,bjhc->bihc", weights, v).flatten(2), f"{name}.F.attn.proj")
            hidden = F.gelu(linear(norm(first, f"{name}.G.norm"), f"{name}.G.mlp.fc1"))
            second = second + linear(hidden, f"{name}.G.mlp.fc2")
        features.append(norm(torch.cat([first, second], dim=-1), "norm").mean(dim=1))
    return torch.stack(features, dim=-1)


WRITTEN_OUT = {
    "rev_mvit_nano": lambda entries, frames: written_out(entries, frames, strides={1: 2, 3: 2}, depth=5, heads=1),
    "rev_vit_nano": lambda entries, frames: pictures_written_out(entries, frames, depth=4, heads=2),
}
WIRINGS = {
    "plain": None,
    "rewired": RewiringConfig(),
    "in pieces": RewiringConfig(chunk_mebibytes=0.01),
    "saving outputs": RewiringConfig(known=3, saved_attention=2),
    "whatever else it says": RewiringConfig(unit="block", beta=0.3, segment=1, merge="extrapolate"),
}


@pytest.mark.parametrize("name", NANO)
@pytest.mark.parametrize("wiring", WIRINGS)
def test_it_is_the_equations_written_out_with_pyslowfast_s_names(name, wiring) -> None:
    model = build(name, WIRINGS[wiring]).double()
    frames, mask = clips(name)
    entries = {name: value.detach().clone().requires_grad_() for name, value in model.state_dict().items()}
    wanted = WRITTEN_OUT[name](entries, frames)
    found = model(frames, mask).values
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    for output in (wanted, found):
        (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.testing.assert_close(gradients, {name: entry.grad for name, entry in entries.items()}, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", NANO)
def test_with_an_example_it_is_shown_to_be_the_same_network(name) -> None:
    model = build(name)
    frames, mask = clips(name, torch.float32)
    report = rewire(model, example=(frames[:1], mask[:1]))
    assert report.ends == ()
    assert sum(stage.rewired_blocks for stage in report.stages) == {"rev_mvit_nano": 3, "rev_vit_nano": 4}[name]


@pytest.mark.parametrize("name", NANO)
def test_gradients_with_drop_path_are_those_of_the_plain_network(name) -> None:
    results = []
    for wiring in (RewiringConfig(), None):
        model = build(name, wiring, drop_path=0.5).double()
        torch.manual_seed(3)
        model(*clips(name)).values.square().mean().backward()
        results.append({key: parameter.grad for key, parameter in model.named_parameters()})
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", NANO)
def test_weights_in_pyslowfast_s_layout_load(name, tmp_path) -> None:
    model, other = build(name), build(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    entries = other.state_dict()
    anchors = {"rev_backbone.layers.0.F.norm.weight", "rev_backbone.layers.0.G.mlp.fc1.bias", "patch_embed.proj.weight"}
    assert anchors | {"norm.weight"} <= set(entries)
    save_file(entries | {"head.projection.weight": torch.zeros(5, model.out_channels)}, tmp_path / "rev.safetensors")
    report = load_weights(model, tmp_path / "rev.safetensors", layouts=(PYSLOWFAST,))
    assert report.layout == "PySlowFast"
    assert report.ignored == ("head.projection.weight",)
    torch.testing.assert_close(model.state_dict(), entries)


def test_pictures_are_taken_one_by_one() -> None:
    model = build("rev_vit_nano").double().eval()
    frames, mask = clips("rev_vit_nano")
    features = model(frames, mask)
    assert features.values.shape == (2, model.out_channels, 4)
    alone = model(frames[:, :, 2:3], mask[:, :1]).values
    torch.testing.assert_close(features.values[:, :, 2:3], alone)


def test_memory_hardly_grows_with_depth() -> None:
    peaks = {}
    for rewired in (True, False):
        for depth in (4, 12):
            model = build("rev_vit_nano", RewiringConfig() if rewired else None, depth=depth)
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            frames, mask = clips("rev_vit_nano", torch.float32)
            with LiveBytes() as live:
                model(frames, mask).values.sum().backward()
            peaks[rewired, depth] = live.peak
    assert peaks[True, 12] < 1.1 * peaks[True, 4]
    assert peaks[True, 12] < 0.5 * peaks[False, 12]


def test_other_sizes_are_refused() -> None:
    model = build("rev_mvit_nano")
    frames, mask = clips("rev_mvit_nano", torch.float32)
    with pytest.raises(ValueError, match=r"takes clips of 4 frames of 32 x 32, and got \(2, 3, 2, 32, 32\); resize"):
        model(frames[:, :, :2], mask[:, :2])

"""Video Swin and its rewired form against mmaction2, torchvision and OpenTAD: values, stages and every gradient."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from parity.compare import Tolerances, check_gradients, check_loss, check_values
from parity.sizes import swin_size
from parity.vectors import Case, cases, load
from torch import Tensor, nn

from re2tal.backbones.swin3d import network as swin3d
from re2tal.backbones.swin3d.layouts import KEY_LAYOUTS
from re2tal.backbones.swin3d.network import VideoSwin
from re2tal.backbones.swin3d.shifted_windows import clip_window, window_regions, windows_per_axis
from re2tal.conversion import export_backbone
from re2tal.rewire import RewiringConfig, rewire

TOLERANCES = Tolerances(
    output={torch.float32: 5e-6, torch.float64: 1e-9},
    grad_x={torch.float32: 1e-5, torch.float64: 1e-5},
    loss={torch.float32: 1e-4, torch.float64: 1e-8},
    norm={torch.float32: 2e-5, torch.float64: 1e-8},
    norm_floor={torch.float32: 1e-6, torch.float64: 0.0},
    probe={torch.float32: 1e-5, torch.float64: 1e-8},
)
LAYOUTS = {layout.name.split()[0]: layout for layout in KEY_LAYOUTS}
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def build(case: Case, layout: str, dtype: torch.dtype) -> VideoSwin:
    swin = VideoSwin(**swin_size(case.config["arguments"]))
    swin.load_state_dict({ours: case.state[theirs] for theirs, ours in names(case, layout).items()})
    return swin.to(dtype).eval()


def names(case: Case, layout: str) -> dict[str, str]:
    return LAYOUTS[layout].to_ours(case.state)


def capture(swin: VideoSwin) -> dict[str, Tensor]:
    """Filled by a forward: patch embedding, each stage's blocks, each merging, the final norm; channels last."""
    captured: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: captured.__setitem__(name, output)

    swin.patch_embed.register_forward_hook(keep("patch_embed"))
    for index, layer in enumerate(swin.layers):
        layer.blocks.register_forward_hook(keep(f"stage{index}"))
        list(layer.children())[-1].register_forward_hook(keep(f"layer{index}"))
    swin.norm.register_forward_hook(keep("norm"))
    return captured


def run(swin: VideoSwin, case: Case, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    captured = capture(swin)
    x = case.tensor("x").to(dtype).requires_grad_()
    swin(x, torch.ones(x.shape[0], x.shape[2], dtype=torch.bool))
    return x, captured


def project(case: Case, outputs: dict[str, Tensor]) -> Tensor:
    """The scalar that the reference gradients differentiate: sum of out * w / sqrt(numel) over outputs."""
    terms = [(out * case.tensor(f"w_{name}").to(out.dtype)).sum() / out.numel() ** 0.5 for name, out in outputs.items()]
    return torch.stack(terms).sum()


def peer_gradients(case: Case, layout: str, swin: VideoSwin, others: nn.Module) -> list[Tensor | None]:
    """Gradients in the peer's order, of our parameters by the key map and of `others` by their own names."""
    ours, mapped, extra = dict(swin.named_parameters()), names(case, layout), dict(others.named_parameters())
    return [
        (ours[mapped[name]] if name in mapped else extra[name]).grad for name in case.arrays["param_names"].tolist()
    ]


def channels_first(x: Tensor) -> Tensor:
    return x.movedim(-1, 1)


@both_precisions
@pytest.mark.parametrize("name", cases("swin_mmaction"))
def test_equals_mmaction2(name: str, dtype: torch.dtype) -> None:
    case = load(name)
    swin = build(case, "mmaction2", dtype)
    x, captured = run(swin, case, dtype)
    last = len(swin.layers) - 1
    returned = case.config["arguments"]["out_indices"]
    norms = nn.ModuleDict({f"norm{i}": nn.LayerNorm(captured[f"stage{i}"].shape[-1]) for i in returned if i != last})
    norms.load_state_dict({key: case.state[key] for key in norms.state_dict()})
    norms.to(dtype)
    outputs = {
        f"stage{i}": channels_first(captured["norm"] if i == last else norms[f"norm{i}"](captured[f"stage{i}"]))
        for i in returned
    }

    values = {"raw_patch_embed": channels_first(captured["patch_embed"])}
    values |= {f"raw_layer{i}": captured[f"stage{i}"] for i in range(last + 1)}
    values |= {f"out_{out}": value for out, value in outputs.items()}
    check_values(case, values, TOLERANCES, dtype=dtype)
    loss = project(case, outputs)
    check_loss(case, loss, TOLERANCES)
    loss.backward()
    check_gradients(case, x, peer_gradients(case, "mmaction2", swin, norms), TOLERANCES)


@both_precisions
@pytest.mark.parametrize("name", cases("swin_torchvision"))
def test_equals_torchvision(name: str, dtype: torch.dtype) -> None:
    case = load(name)
    swin = build(case, "torchvision", dtype)
    x, captured = run(swin, case, dtype)
    head = nn.Module()
    head.head = nn.Linear(swin.out_channels, case.config["arguments"]["num_classes"])
    head.load_state_dict({key: case.state[key] for key in head.state_dict()})
    head.to(dtype)
    logits = head.head(captured["norm"].mean(dim=(1, 2, 3)))

    values = {"raw_patch_embed": captured["patch_embed"], "raw_norm": captured["norm"], "out_logits": logits}
    values |= {f"raw_features{2 * i}": captured[f"stage{i}"] for i in range(len(swin.layers))}
    values |= {f"raw_features{2 * i + 1}": captured[f"layer{i}"] for i in range(len(swin.layers))}
    check_values(case, values, TOLERANCES, dtype=dtype)
    loss = project(case, {"logits": logits})
    check_loss(case, loss, TOLERANCES)
    loss.backward()
    check_gradients(case, x, peer_gradients(case, "torchvision", swin, head), TOLERANCES)


@pytest.mark.parametrize("name", cases("swin_masks"))
def test_shift_masks_are_exact(name: str) -> None:
    case = load(name)
    configurations = sorted(key for key in case.arrays if key.startswith("cfg"))
    assert configurations
    for key in configurations:
        grid, nominal, effective, shifts, padded = (tuple(row.tolist()) for row in case.arrays[key])
        window, shift = clip_window(grid, nominal, tuple(size // 2 for size in nominal))
        counts = windows_per_axis(grid, window)
        regions = window_regions(counts, window=window, shift=shift)
        assert (window, shift) == (effective, shifts)
        assert tuple(n * size for n, size in zip(counts, window, strict=True)) == padded
        np.testing.assert_array_equal(
            regions[:, :, None] != regions[:, None, :], case.arrays[key.replace("cfg", "mask")], err_msg=key
        )


@both_precisions
@pytest.mark.parametrize("recompute", [True, False], ids=["rebuilt", "kept"])
@pytest.mark.parametrize("name", cases("re2swin"))
def test_rewired_equals_opentad(name: str, recompute: bool, dtype: torch.dtype) -> None:
    case = load(name)
    swin = build(case, "OpenTAD", dtype)
    rewire(swin, config=RewiringConfig(recompute=recompute))
    entered = capture_last_states(swin)
    x, captured = run(swin, case, dtype)
    outputs = {"final": channels_first(captured["norm"])}

    values = {"raw_patch_embed": channels_first(captured["patch_embed"]), "out_final": outputs["final"]}
    values |= {f"raw_layer{i}": channels_first(captured[f"layer{i}"]) for i in range(len(swin.layers))}
    # The stage's output is the mean of its two last states.
    values |= {f"streams_layer{i}": torch.cat([y1, 2 * captured[f"stage{i}"] - y1], -1) for i, y1 in entered.items()}
    check_values(case, values, TOLERANCES, dtype=dtype)
    loss = project(case, outputs)
    check_loss(case, loss, TOLERANCES)
    loss.backward()
    check_gradients(case, x, peer_gradients(case, "OpenTAD", swin, nn.Module()), TOLERANCES)


def capture_last_states(swin: VideoSwin) -> dict[int, Tensor]:
    """Filled by a forward: by stage, the last state but one, which is what enters the last MLP branch."""
    entered: dict[int, Tensor] = {}

    def keep(index: int) -> Callable[..., None]:
        return lambda module, inputs: entered.__setitem__(index, inputs[0].detach().clone())

    for index, layer in enumerate(swin.layers):
        list(layer.blocks.children())[-1].norm2.register_forward_pre_hook(keep(index))
    return entered


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, "mmaction2") for name in cases("swin_mmaction")]
    + [(name, "torchvision") for name in cases("swin_torchvision")]
    + [(name, "OpenTAD") for name in cases("re2swin")],
)
def test_every_entry_of_the_peer_is_written_back_but_its_norms_of_earlier_stages_and_its_head(
    name: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = load(name)
    monkeypatch.setitem(swin3d.SIZES, "case", {})  # what tells the family by its name
    written = export_backbone(build(case, layout, torch.float32), name="case", to=layout)
    left_out = {key.split(".")[0] for key in case.state.keys() - written.keys()}
    assert left_out <= {"norm0", "norm1", "norm2", "head"}
    for key, value in written.items():
        assert torch.equal(value, case.state[key].to(value.dtype)), key
        assert value.shape == case.state[key].shape, key

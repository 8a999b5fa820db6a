"""InternVideo2: files of the release, against its forward written down with plain sums and a softmax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from re2tal.backbones import BackboneConfig, build_backbone
from re2tal.backbones.hub.internvideo2 import SIZES, original, sinusoid
from re2tal.backbones.weights import export_state
from re2tal.conversion import import_backbone

NAME = "internvideo2_nano"
WIDTH, HEADS, FRAMES, SIDE, PATCH = 48, 2, 4, 4, 8


def build(**fields: Any) -> Any:
    return build_backbone(BackboneConfig(name=NAME, **fields))


def released(seed: int = 0) -> dict[str, Tensor]:
    """A file of the release, by its names, with what such a file holds beside the network."""
    torch.manual_seed(seed)
    state = {
        "cls_token": torch.randn(1, 1, WIDTH),
        "pos_embed": torch.randn(1, 1 + FRAMES * SIDE**2, WIDTH),
        "patch_embed.proj.weight": torch.randn(WIDTH, 3, 1, PATCH, PATCH) / 14,
        "patch_embed.proj.bias": torch.randn(WIDTH),
        "clip_projector.norm1_q.weight": torch.ones(WIDTH),
        "clip_projector.cross_attn.q_bias": torch.ones(WIDTH),
        "fc_norm.weight": torch.ones(16),
        "head.weight": torch.ones(5, 16),
        "clip_decoder.0.head.weight": torch.ones(3, WIDTH),
        "clip_pos_embed": torch.ones(1, 65, WIDTH),
    }
    for block in (f"blocks.{index}" for index in range(4)):
        state |= {f"{block}.{name}.weight": 1 + 0.3 * torch.randn(WIDTH) for name in ("norm1", "norm2")}
        state |= {f"{block}.attn.{name}.weight": 1 + 0.3 * torch.randn(WIDTH) for name in ("q_norm", "k_norm")}
        state |= {f"{block}.{name}.gamma": torch.randn(WIDTH) for name in ("ls1", "ls2")}
        state[f"{block}.attn.qkv.weight"] = torch.randn(3 * WIDTH, WIDTH) / 7
        shapes = {"attn.proj": (WIDTH, WIDTH), "mlp.fc1": (96, WIDTH), "mlp.fc2": (WIDTH, 96)}
        for name, shape in shapes.items():
            state[f"{block}.{name}.weight"] = torch.randn(shape) / 7
            state[f"{block}.{name}.bias"] = torch.randn(shape[0])
    return state


def of_the_network(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith(("clip_", "fc_norm", "head"))}


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def by_hand(state: dict[str, Tensor], clip: Tensor) -> Tensor:
    """(3, 4, 32, 32) -> (4, C): the last tokens of every frame, averaged."""
    state = {key: value.double() for key, value in state.items()}
    patches = clip.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # 3, frames, rows, columns, 8, 8
    tokens = torch.einsum("ctyxpq,dcpq->tyxd", patches, state["patch_embed.proj.weight"][:, :, 0])
    tokens = tokens.reshape(-1, WIDTH) + state["patch_embed.proj.bias"]
    x = torch.cat([state["cls_token"][0], tokens]) + state["pos_embed"][0]
    for index in range(4):
        block = {key.removeprefix(f"blocks.{index}."): value for key, value in state.items()}
        query, key, value = (rms(x, block["norm1.weight"]) @ block["attn.qkv.weight"].T).chunk(3, -1)
        query, key = rms(query, block["attn.q_norm.weight"]), rms(key, block["attn.k_norm.weight"])
        heads = []
        for part in range(HEADS):
            own = slice(part * WIDTH // HEADS, (part + 1) * WIDTH // HEADS)
            scores = query[:, own] @ key[:, own].T / (WIDTH / HEADS) ** 0.5
            heads.append(scores.softmax(-1) @ value[:, own])
        out = torch.cat(heads, -1) @ block["attn.proj.weight"].T + block["attn.proj.bias"]
        x = x + block["ls1.gamma"] * out
        inner = rms(x, block["norm2.weight"]) @ block["mlp.fc1.weight"].T + block["mlp.fc1.bias"]
        inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
        x = x + block["ls2.gamma"] * (inner @ block["mlp.fc2.weight"].T + block["mlp.fc2.bias"])
    return x[1:].reshape(FRAMES, -1, WIDTH).mean(1)


@torch.no_grad()
@pytest.mark.parametrize("place", ["top", "module", "prefixed"])
def test_a_file_of_the_release_gives_the_features_of_its_equations(place: str, tmp_path: Path) -> None:
    state = released()
    content: Any = {"module": state, "epoch": 3} if place == "module" else state
    if place == "prefixed":  # as multimodal training writes it
        content = {f"vision_encoder.{key}": value for key, value in state.items()} | {"temp": torch.ones(())}
    torch.save(content, tmp_path / "iv2.pt")
    backbone = build(weights=str(tmp_path / "iv2.pt"), rewired=False).double().eval()
    video = torch.randn(1, 3, 2 * FRAMES, 32, 32, dtype=torch.float64)
    values = backbone(video, torch.ones(1, 2 * FRAMES, dtype=torch.bool)).values[0].T
    wanted = torch.cat([by_hand(state, clip) for clip in video[0].split(FRAMES, dim=1)])
    torch.testing.assert_close(values, wanted, rtol=1e-10, atol=1e-10)


def test_weights_go_back_under_the_names_of_the_release(tmp_path: Path) -> None:
    state = released()
    torch.save(state, tmp_path / "iv2.pt")
    backbone, report = import_backbone(tmp_path / "iv2.pt", name=NAME)
    assert report.layout == "original InternVideo2"
    assert len(report.ignored) == len(state) - len(of_the_network(state))
    exported = export_state(backbone, layout=original(SIZES[NAME]))
    assert exported.keys() == of_the_network(state).keys()
    assert all(torch.equal(value, exported[key]) for key, value in of_the_network(state).items())


@torch.no_grad()
def test_a_table_for_half_as_many_frames_is_resampled_in_time(tmp_path: Path) -> None:
    state = released()
    table = torch.randn(1, 1 + 2 * SIDE**2, WIDTH)
    torch.save(state | {"pos_embed": table}, tmp_path / "iv2.pt")
    found = build(weights=str(tmp_path / "iv2.pt"), rewired=False).encoder.model.pos_embed[0]
    first, second = table[0, 1:].split(SIDE**2)
    # Frames lie at 0, 1, .. of two; of four at -1/4 (the edge), 1/4, 3/4 and 5/4 (the edge).
    wanted = [first, 0.75 * first + 0.25 * second, 0.25 * first + 0.75 * second, second]
    torch.testing.assert_close(found[1:], torch.cat(wanted))
    assert torch.equal(found[:1], table[0, :1])


@torch.no_grad()
def test_a_table_in_three_parts_becomes_one(tmp_path: Path) -> None:
    state = released()
    del state["pos_embed"]
    parts = {
        "pos_embed_spatial": torch.randn(1, SIDE**2, WIDTH),
        "pos_embed_temporal": torch.randn(1, FRAMES, WIDTH),
        "pos_embed_cls": torch.randn(1, 1, WIDTH),
    }
    torch.save(state | parts, tmp_path / "iv2.pt")
    found = build(weights=str(tmp_path / "iv2.pt"), rewired=False).encoder.model.pos_embed[0]
    space, time, class_token = (part[0] for part in parts.values())
    assert torch.equal(found[0], class_token[0])
    for frame in range(FRAMES):
        for place in range(SIDE**2):
            torch.testing.assert_close(found[1 + frame * SIDE**2 + place], space[place] + time[frame])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pos_embed": torch.zeros(1, 1 + 4 * 8 * 8, WIDTH)}, r"which may be any of \[\(4, 8, 8\), \(16, 4, 4\)\]"),
        ({"pos_embed": torch.zeros(1, 8, WIDTH)}, r"pos_embed \(1, 8, 48\), not \(1, 65, 48\)"),
        ({"blocks.0.attn.qkv.bias": torch.zeros(144)}, r"1 unexpected: encoder\.model\.blocks\.0\.attn\.qkv\.bias"),
    ],
)
def test_files_that_do_not_fit_are_refused(change: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    torch.save(released() | change, tmp_path / "iv2.pt")
    with pytest.raises(ValueError, match=message):
        build(weights=str(tmp_path / "iv2.pt"), rewired=False)


def test_a_hub_name_is_refused() -> None:
    with pytest.raises(ValueError, match="internvideo2_nano takes a file of the release"):
        build(weights="OpenGVLab/InternVideo2-Stage1-1B-224p-K400")


def test_the_first_positions_by_hand() -> None:
    table = sinusoid((2, 3, 3), 16)
    assert table.shape == (1, 19, 16)
    assert not table[0, 0].any()
    place = table[0, 1 + 9 + 2 * 3 + 1].double()  # frame 1, row 2, column 1
    # 4 channels of time, 6 of the column, 6 of the row; speeds 10000^0, 10000^(-1/2) and so on.
    time = [1.0, 1.0 / 100]
    slow = [1.0, 10000 ** (-1 / 3), 10000 ** (-2 / 3)]
    angles = [torch.tensor(time), torch.tensor(slow), 2 * torch.tensor(slow)]
    wanted = torch.cat([torch.cat([angle.sin(), angle.cos()]) for angle in angles]).double()
    torch.testing.assert_close(place, wanted, rtol=1e-5, atol=1e-6)

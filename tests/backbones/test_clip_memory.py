"""A share of the clips trains, the features of the others are remembered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from re2tal.backbones import BackboneConfig, build_backbone
from re2tal.backbones.clip_memory import ClipMemory
from re2tal.backbones.hub.tiling import ClipwiseBackbone

CLIPS = 5


def build(folder: Path, **fields: Any) -> ClipwiseBackbone:
    torch.manual_seed(0)
    backbone = build_backbone(BackboneConfig(name="videomae_nano", **fields))
    assert isinstance(backbone, ClipwiseBackbone)
    backbone.memory = ClipMemory(folder, share=0.4)
    return backbone.train()


def videos() -> tuple[Tensor, Tensor]:
    frames = torch.randn(2, 3, 4 * CLIPS, 32, 32, generator=torch.Generator().manual_seed(1))
    return frames, torch.ones(2, 4 * CLIPS, dtype=torch.bool)


def forward(backbone: ClipwiseBackbone, ids: Sequence[str | None] = ("a", "b"), seed: int = 3) -> Tensor:
    """(B, clips, steps, C)."""
    assert backbone.memory is not None
    backbone.memory.next_batch(ids, seed=seed)
    return backbone(*videos()).values.transpose(1, 2).unflatten(1, (CLIPS, 2))


def all_encoded(backbone: ClipwiseBackbone) -> Tensor:
    with torch.no_grad():
        return backbone(*videos()).values.transpose(1, 2).unflatten(1, (CLIPS, 2))


def trained_of(backbone: ClipwiseBackbone, seed: int = 3) -> list[int]:
    """By their gradients: the clips whose frames get one."""
    frames, mask = videos()
    backbone.memory.next_batch((None, None), seed=seed)
    backbone(frames.requires_grad_(), mask).values.sum().backward()
    backbone.zero_grad()
    return [clip for clip in range(CLIPS) if frames.grad[0, :, 4 * clip : 4 * clip + 4].any()]


@pytest.mark.parametrize("fields", [{}, {"clips_at_once": 2}, {"rewired": False}], ids=["rewired", "groups", "plain"])
def test_unknown_clips_are_encoded_and_pass_no_gradient(fields: dict[str, Any], tmp_path: Path) -> None:
    backbone = build(tmp_path, **fields)
    chosen = trained_of(backbone)
    assert len(chosen) == 2
    values = forward(backbone)
    torch.testing.assert_close(values, all_encoded(backbone), rtol=1e-4, atol=1e-5)
    weights = torch.linspace(-1, 1, values.numel()).view_as(values)
    (values * weights).sum().backward()
    found = {key: parameter.grad for key, parameter in backbone.named_parameters()}
    # The same by plain autograd over all clips, of which only those chosen count.
    plain = build(tmp_path / "other", rewired=fields.get("rewired", True), recompute=False)
    plain.memory = None
    every = plain(*videos()).values.transpose(1, 2).unflatten(1, (CLIPS, 2))
    (every * weights)[:, chosen].sum().backward()
    for key, parameter in plain.named_parameters():
        torch.testing.assert_close(found[key], parameter.grad, rtol=1e-3, atol=1e-4)


def test_known_clips_keep_what_earlier_weights_gave(tmp_path: Path) -> None:
    backbone = build(tmp_path)
    before = forward(backbone).detach()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.mul_(1.5)
    now, chosen = all_encoded(backbone), trained_of(backbone, seed=4)
    values = forward(backbone, seed=4).detach()
    others = [clip for clip in range(CLIPS) if clip not in chosen]
    torch.testing.assert_close(values[:, chosen], now[:, chosen], rtol=1e-4, atol=1e-5)
    assert torch.equal(values[:, others], before[:, others].half().float())
    assert not torch.allclose(values[:, others], now[:, others], rtol=1e-2)
    # Those that trained are remembered in their turn.
    third = forward(backbone, seed=5).detach()
    again = [clip for clip in chosen if clip not in trained_of(backbone, seed=5)]
    assert torch.equal(third[:, again], now[:, again].half().float()) or torch.allclose(
        third[:, again], now[:, again], rtol=1e-2
    )


def test_evaluation_encodes_all_clips(tmp_path: Path) -> None:
    backbone = build(tmp_path).eval()
    with torch.no_grad():
        backbone(*videos())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut off", "another shape", "other numbers", "not finite"])
def test_files_that_cannot_be_used_are_encoded_anew(damage: str, tmp_path: Path) -> None:
    backbone = build(tmp_path)
    forward(backbone)
    (path, _) = sorted(tmp_path.glob("*.npy"))
    content = np.load(path)
    assert (content.shape, content.dtype) == ((CLIPS, 2, 48), np.float16)
    match damage:
        case "cut off":
            path.write_bytes(path.read_bytes()[:200])
        case "another shape":
            np.save(path, content[:3])
        case "other numbers":
            np.save(path, content.astype(np.float64))
        case "not finite":
            content[:] = np.nan
            np.save(path, content)
    torch.testing.assert_close(forward(backbone), all_encoded(backbone), rtol=1e-2, atol=1e-3)
    assert np.isfinite(np.load(path)).all()


def test_videos_that_could_not_be_decoded_are_not_remembered(tmp_path: Path) -> None:
    forward(build(tmp_path), ids=("a", None))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_keeps_what_there_was_and_is_told_once(tmp_path: Path, monkeypatch, caplog) -> None:
    backbone = build(tmp_path)
    before = forward(backbone).detach()

    def full(file: Any, *args: Any, **kwargs: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("re2tal.backbones.clip_memory.np.save", full)
    for _ in range(2):
        torch.testing.assert_close(forward(backbone).detach(), before, rtol=1e-2, atol=1e-3)
    assert all(path.suffix == ".npy" for path in tmp_path.iterdir())
    (record,) = caplog.records
    assert "No space left on device" in record.message


def test_names_of_videos_stay_inside_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "memory"
    forward(build(folder), ids=("../../escape", "/etc/x"))
    assert len(list(folder.glob("*.npy"))) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["memory"]


def test_all_ranks_encode_equally_often_and_as_many(tmp_path: Path) -> None:
    """Another rank has three rounds of unknown clips, this one two, and then none."""
    sizes: list[int] = []

    def encoded(clips: Sequence[int]) -> Tensor:
        sizes.append(len(clips))
        return torch.ones(1, len(clips), 2, 4)

    memory = ClipMemory(tmp_path, share=0.4, most=lambda number: max(number, 3))
    for _ in range(2):
        memory.next_batch(["a"], seed=0)
        memory.features(encoded, num_clips=CLIPS, steps=2, channels=4)
    assert sizes == [2] * 8


def test_a_batch_that_nobody_announced_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="was not told which videos come next"):
        build(tmp_path)(*videos())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "swin3d_nano"}, r"backbone\.trained_clips is 0\.5, but swin3d_nano takes a video as one clip"),
        ({"adapter": "temporal"}, "the adapters of this backbone convolve over all clips"),
        ({"trained_clips": 0.0}, r"backbone\.trained_clips is 0\.0; give a share above 0"),
        ({"name": "features", "feature_channels": 4, "rewired": False}, "there are no clips to encode"),
    ],
)
def test_what_has_no_clips_of_its_own_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_backbone(BackboneConfig(**{"name": "videomae_nano", "trained_clips": 0.5, **fields}))

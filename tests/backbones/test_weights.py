"""Checkpoints of every layout load by renaming alone; what does not fit is refused by name."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from re2tal.backbones.hub.pretrained import weights_file
from re2tal.backbones.swin3d.layouts import KEY_LAYOUTS
from re2tal.backbones.swin3d.network import VideoSwin
from re2tal.backbones.weights import WRAPPERS, LoadReport, export_state, load_weights, read_checkpoint, read_state

every_layout = pytest.mark.parametrize("layout", KEY_LAYOUTS, ids=lambda layout: layout.name)


def swin(*, seed: int = 0, depths: tuple[int, ...] = (2, 1), embed_dim: int = 8) -> VideoSwin:
    model = VideoSwin(embed_dim=embed_dim, depths=depths, num_heads=(2,) * len(depths), window=(2, 3, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(seed))
    return model


def load(model: VideoSwin, path: Path) -> LoadReport:
    return load_weights(model, path, layouts=KEY_LAYOUTS)


def equal(one: VideoSwin, other: VideoSwin) -> bool:
    return all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


def write(path: Path, state: dict[str, Tensor]) -> Path:
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path


@every_layout
@pytest.mark.parametrize("prefix", ["", "backbone.", "module.backbone.model."])
def test_every_layout_comes_back_as_it_was_written(tmp_path, layout, prefix: str) -> None:
    source, target = swin(), swin(seed=1)
    state = {prefix + key: value for key, value in export_state(source, layout=layout).items()}
    report = load(target, write(tmp_path / "weights.safetensors", state))
    assert equal(source, target)
    assert (report.layout, report.prefix, report.ignored) == (layout.name, prefix, ())
    assert sorted(report.loaded) == sorted(source.state_dict())


@pytest.mark.parametrize("wrapper", [name for name in WRAPPERS if name != "encoder"])
def test_torch_files_are_unwrapped(tmp_path, wrapper: str) -> None:
    source, target = swin(), swin(seed=1)
    # What trainers keep beside the weights: a tensor, an average that is switched off, V-JEPA's other networks.
    beside = {"best_acc1": torch.tensor(71.2), "ema": None, "encoder": swin(seed=2).state_dict(), "opt": {"state": {}}}
    content = beside | {wrapper: source.state_dict(), "epoch": 3, "meta": {"note": "text"}}
    torch.save(content, tmp_path / "weights.pth")
    load(target, tmp_path / "weights.pth")
    assert equal(source, target)


def test_the_moving_average_is_what_a_training_checkpoint_gives(tmp_path) -> None:
    average, raw = swin().state_dict(), swin(seed=2).state_dict()
    for name, content, taken_from in (
        ("both", {"epoch": 3, "state_dict": raw, "state_dict_ema": average}, "state_dict_ema"),
        ("none", {"epoch": 3, "state_dict": average, "state_dict_ema": None}, "state_dict"),
        (
            "trainer's",
            {"model": raw, "model_ema": {"module": average}, "best_acc1": torch.ones(())},
            "model_ema.module",
        ),
        ("nested", {"model": {"state_dict": average}}, "model.state_dict"),
        ("top", average, ""),
    ):
        torch.save(content, tmp_path / f"{name}.pth")
        checkpoint = read_checkpoint(tmp_path / f"{name}.pth")
        assert checkpoint.taken_from == taken_from
        assert all(torch.equal(value, average[key]) for key, value in checkpoint.tensors.items())


def test_layouts_name_entries_as_their_code_bases_do() -> None:
    exported = {layout.name: set(export_state(swin(), layout=layout)) for layout in KEY_LAYOUTS}
    assert "features.2.0.mlp.3.weight" in exported["torchvision"]
    assert "features.1.reduction.weight" in exported["torchvision"]
    assert "layers.1.blocks.0.mlp.fc2.weight" in exported["mmaction2"]
    assert "norm1.weight" in exported["mmaction2"]
    assert {"norm.weight", "layers.0.downsample.reduction.weight"} <= exported["original"]
    assert "layers.1.blocks.0.inv_block.Gm.mlp.fc2.weight" in exported["OpenTAD Re2Swin"]
    assert "norm3.weight" in exported["OpenTAD Re2Swin"]


def test_original_release_is_our_own_layout(tmp_path) -> None:
    source, target = swin(), swin(seed=1)
    load(target, write(tmp_path / "weights.safetensors", source.state_dict()))
    assert equal(source, target)


def test_heads_constant_tables_and_other_parts_are_ignored_by_name(tmp_path) -> None:
    source, target = swin(), swin(seed=1)
    ignored = {
        "backbone.layers.0.blocks.0.attn.relative_position_index": torch.zeros(18, 18, dtype=torch.int64),
        "backbone.norm0.weight": torch.ones(8),
        "backbone.head.weight": torch.ones(5, 16),
        "cls_head.fc_cls.weight": torch.ones(5, 16),
    }
    mmaction = next(layout for layout in KEY_LAYOUTS if layout.name.startswith("mmaction2"))
    state = {f"backbone.{key}": value for key, value in export_state(source, layout=mmaction).items()}
    report = load(target, write(tmp_path / "weights.safetensors", state | ignored))
    assert equal(source, target)
    assert sorted(report.ignored) == sorted(ignored)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": (2, 2)}, r"13 missing: layers\.1\.blocks\.1\.norm1\.weight, .* and \d+ more"),
        ({"depths": (1, 1)}, r"13 unexpected: layers\.0\.blocks\.1\.[^;]* and 7 more\."),
        (
            {"embed_dim": 12},
            r"\d+ of another shape: patch_embed\.proj\.weight \(8, 3, 2, 4, 4\), not \(12, 3, 2, 4, 4\)",
        ),
    ],
)
def test_another_architecture_is_refused_by_name_and_shape(tmp_path, change: dict, message: str) -> None:
    path, target = write(tmp_path / "weights.safetensors", swin().state_dict()), swin(seed=1, **change)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(ValueError, match=rf"weights\.safetensors .* does not fit this VideoSwin: .*{message}"):
        load(target, path)
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def test_weights_of_another_family_are_refused(tmp_path) -> None:
    path = write(tmp_path / "weights.safetensors", {"slow_path.conv1.conv.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"not a checkpoint of VideoSwin .* called slow_path\.conv1\.conv\.weight"):
        load(swin(), path)


@pytest.mark.parametrize("content", [b"hello", b"\0" * 1000, b"PK\3\4broken", b"\x80\2]q\0.", b""])
def test_what_is_no_torch_file_is_said_to_be_none(tmp_path, content: bytes) -> None:
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.pth (is not a readable torch file|holds no tensors)") as refused:
        load(swin(), tmp_path / "weights.pth")
    assert "weights_only" not in str(refused.value).replace("``weights_only=True`` with files saved", "")


def test_two_networks_in_one_file_are_refused(tmp_path) -> None:
    state = {
        f"{prefix}.{key}": value for prefix in ("student", "teacher") for key, value in swin().state_dict().items()
    }
    with pytest.raises(ValueError, match=r"2 networks .* under \['student\.', 'teacher\.'\]"):
        load(swin(), write(tmp_path / "weights.safetensors", state))


class Payload:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_a_file_that_would_run_code_is_refused_and_does_not_run(tmp_path) -> None:
    torch.save({"state_dict": swin().state_dict(), "meta": Payload(tmp_path / "ran")}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights\.pth holds more than tensors.*safetensors\.torch\.save_file"):
        load(swin(), tmp_path / "weights.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("weights.safetensors", b"not tensors at all", "not a readable safetensors file"),
        ("weights.pth", b"PK\x03\x04 truncated", "not a readable torch file"),
        ("weights.pth", b"", "not a readable torch file"),
    ],
)
def test_damaged_files_are_refused(tmp_path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(name) + " is " + message):
        read_state(tmp_path / name)


def test_a_file_without_tensors_is_refused(tmp_path) -> None:
    torch.save({"state_dict": {}, "epoch": 3, "weights": {"a": torch.ones(1)}}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"holds no tensors by name, .*; it holds state_dict, epoch, weights"):
        read_state(tmp_path / "weights.pth")


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors does not exist"):
        read_state(tmp_path / "nowhere.safetensors")


def test_a_swin_for_pictures_is_inflated_and_sees_a_still_clip_as_its_picture(tmp_path) -> None:
    sizes = {"embed_dim": 8, "depths": (2, 1), "num_heads": (2, 2)}
    # Windows and patches of one frame: a network for pictures. Its file holds convolutions of rows and columns.
    picture = VideoSwin(**sizes, window=(1, 3, 3), patch=(1, 4, 4)).eval()
    with torch.no_grad():
        for parameter in picture.parameters():
            parameter.normal_(std=0.3)
    state = picture.state_dict() | {"layers.0.blocks.1.attn_mask": torch.zeros(4, 9, 9), "head.bias": torch.zeros(5)}
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"][:, :, 0]
    torch.save({"model": state}, tmp_path / "swin_tiny.pth")
    video = VideoSwin(**sizes, window=(2, 3, 3), patch=(2, 4, 4)).eval()
    report = load(video, tmp_path / "swin_tiny.pth")
    assert sorted(report.ignored) == ["head.bias", "layers.0.blocks.1.attn_mask"]
    frames = torch.randn(1, 3, 1, 24, 24)
    with torch.no_grad():
        wanted = picture(frames, torch.ones(1, 1, dtype=torch.bool)).values
        found = video(frames.expand(-1, -1, 8, -1, -1), torch.ones(1, 8, dtype=torch.bool)).values
    torch.testing.assert_close(found, wanted.expand(-1, -1, 4), rtol=1e-4, atol=1e-4)
    other = VideoSwin(**sizes, window=(2, 4, 4), patch=(2, 4, 4))
    with pytest.raises(ValueError, match=r"of another shape: layers\.0\.blocks\.0\.attn\.relative_position_bias_table"):
        load(other, tmp_path / "swin_tiny.pth")


def test_suffixes_in_capitals_are_those_of_weights(tmp_path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "A.SAFETENSORS")
    assert list(read_state(tmp_path / "A.SAFETENSORS")) == ["w"]
    assert weights_file("x.PTH") == Path("x.PTH")
    assert weights_file("owner/name") is None

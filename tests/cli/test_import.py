"""`re2tal import` and `re2tal export`: detectors that OpenTAD trained, and backbones of every origin, and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from data.numbered import encode_numbered
from parity.pyramids import opentad_config
from parity.sizes import frames_per_step, slowfast_size, swin_size
from parity.suppressions import suppression
from parity.vectors import Case, cases, load
from safetensors.torch import load_file, save_file
from torch import Tensor

from re2tal.backbones import BACKBONES, BackboneConfig, build_backbone
from re2tal.backbones.slowfast import network as slowfast
from re2tal.backbones.slowfast.layouts import KEY_LAYOUTS as SLOWFAST_LAYOUTS
from re2tal.backbones.swin3d import network as swin3d
from re2tal.backbones.swin3d.layouts import KEY_LAYOUTS as SWIN_LAYOUTS
from re2tal.cli import main
from re2tal.config import DataConfig, RunConfig, build_detector, load_config, save_config
from re2tal.conversion import export_detector
from re2tal.data.streaming.stream import ClipConfig
from re2tal.data.streaming.transforms import normalise
from re2tal.data.streaming.windows import ResizeWhole, Slide
from re2tal.evaluation.results import read_results
from re2tal.evaluation.suppression import SuppressionConfig
from re2tal.localizers.pyramid.actionformer import ActionFormerConfig
from re2tal.rewire import wiring_of
from re2tal.runs.trained import load_detector
from re2tal.training.export import read_model, write_model

FAMILIES = {
    "SwinTransformer3D_inv": (swin3d.SIZES, swin3d.build_swin3d, swin_size, 2e-5),
    "ResNet3dSlowFast_inv": (slowfast.SIZES, slowfast.build_slowfast, slowfast_size, 1e-4),
}
DETECTORS = [name for name in cases("det_") if load(name).config["backbone"]["type"] in FAMILIES]
TELLS_CLASSES_APART = next(name for name in DETECTORS if load(name).config["rpn_head"]["num_classes"] > 1)
all_detectors = pytest.mark.parametrize("name", DETECTORS)


@pytest.fixture
def write_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes a reference detector's network known under the name "case", and writes its config.json and classes.txt."""

    def write(name: str) -> Case:
        case = load(name)
        sizes, build, size_of, _ = FAMILIES[case.config["backbone"]["type"]]
        monkeypatch.setitem(sizes, "case", size_of(case.config["backbone"]))
        monkeypatch.setitem(BACKBONES, "case", build)
        is_slowfast = sizes is slowfast.SIZES
        num_classes = case.config["rpn_head"]["num_classes"]
        localizer = replace(opentad_config(case.config), class_agnostic=num_classes == 1)
        config = RunConfig(
            num_steps=case.config["num_steps"],
            data=DataConfig(clips=ClipConfig(windowing=ResizeWhole(num_frames=case.arrays["frames"].shape[3]))),
            backbone=BackboneConfig(
                name="case", norm_eval=True, frames_per_step=frames_per_step(case) if is_slowfast else None
            ),
            localizer=localizer,
            suppression=suppression(case.config["nms"]),
        )
        save_config(tmp_path / "config.json", config)
        (tmp_path / "classes.txt").write_text("".join(f"class {index}\n" for index in range(num_classes)))
        return case

    return write


def run_command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


def import_detector(folder: Path, weights: Path, *more: object, out: str = "run") -> int:
    options = ("--config", folder / "config.json", "--classes", folder / "classes.txt", "--out", folder / out)
    return run_command("import", weights, *options, *more)


def save_training(path: Path, averaged: dict[str, Tensor]) -> Path:
    """A checkpoint as OpenTAD's trainer writes it, with other weights beside the averaged ones."""
    averaged = {f"module.{key}": value for key, value in averaged.items()}
    raw = {key: value + 1 for key, value in averaged.items()}
    torch.save({"epoch": 7, "state_dict": raw, "optimizer": {"state": {}}, "state_dict_ema": averaged}, path)
    return path


def off(ours: Tensor, reference: Tensor, valid: Tensor) -> float:
    """The largest difference at valid points, as a share of the largest value."""
    return ((ours - reference)[valid].abs().max() / reference.abs().max()).item()


@all_detectors
def test_a_published_detector_becomes_a_run_that_detects_as_it_did(
    name: str, write_case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = write_case(name)
    assert import_detector(tmp_path, save_training(tmp_path / "epoch_7.pth", case.state)) == 0
    said = capsys.readouterr().out
    assert "weights of its state_dict_ema, backbone in the layout of OpenTAD Re2S" in said
    assert "under module.backbone.model.backbone." in said
    assert "unused: module.rpn_head" not in said
    detector = load_detector(tmp_path / "run", load_config(tmp_path / "run" / "config.json")).eval()
    frames = case.tensor("frames").flatten(0, 1)
    mask = case.tensor("masks").repeat_interleave(frames.shape[2] // case.config["num_steps"], dim=1)
    with torch.no_grad():
        outputs = detector(normalise(frames), mask)
    valid = case.tensor("point_masks")
    tolerance = FAMILIES[case.config["backbone"]["type"]][3]
    assert off(outputs.logits, case.tensor("cls_logits"), valid) <= tolerance
    assert off(outputs.offsets, case.tensor("reg_offsets"), valid) <= tolerance


@all_detectors
def test_a_detector_goes_back_as_it_came(name: str, write_case, tmp_path: Path) -> None:
    case = write_case(name)
    save_file(case.state, tmp_path / "weights.safetensors")
    assert import_detector(tmp_path, tmp_path / "weights.safetensors") == 0
    back = tmp_path / "back.safetensors"
    assert run_command("export", "--run", tmp_path / "run", "--to", "opentad", "--out", back) == 0
    exported = load_file(back)
    assert exported.keys() == case.state.keys()
    for key, value in case.state.items():
        assert torch.equal(exported[key], value.to(exported[key].dtype)), key
        assert exported[key].shape == value.shape, key


def test_videos_are_detected_in_after_one_command(tmp_path: Path) -> None:
    clips = ClipConfig(windowing=Slide(num_frames=16, frames_per_second=8.0), size=32, workers=0)
    config = nano_config(rewired=True, clips=clips)
    torch.manual_seed(0)
    classes = ("jump", "run")
    trained = build_detector(config, classes)
    save_training(tmp_path / "epoch_7.pth", export_detector(trained, config=config.backbone))
    save_config(tmp_path / "config.json", config)
    (tmp_path / "classes.txt").write_text("\n".join(classes))
    assert import_detector(tmp_path, tmp_path / "epoch_7.pth") == 0
    (tmp_path / "own").mkdir()
    save_config(tmp_path / "own" / "config.json", config)
    write_model(tmp_path / "own" / "model.safetensors", trained.state_dict(), classes=classes)
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "one.mp4").write_bytes(encode_numbered(90))
    for run in ("own", "run"):
        assert run_command("detect", "--run", tmp_path / run, "--videos", tmp_path / "videos", "--device", "cpu") == 0
    own, imported = (read_results(tmp_path / run / "detections.json").predictions["one"] for run in ("own", "run"))
    assert len(own) == 5
    (tmp_path / "empty").mkdir()
    assert import_detector(tmp_path, tmp_path / "epoch_7.pth", "--videos", tmp_path / "empty", out="none") == 2
    assert not (tmp_path / "none").exists()
    assert import_detector(tmp_path, tmp_path / "epoch_7.pth", "--videos", tmp_path / "videos", out="at once") == 0
    at_once = read_results(tmp_path / "at once" / "detections.json").predictions["one"]
    assert torch.equal(at_once.segments, own.segments)
    assert torch.equal(at_once.scores, own.scores)
    assert torch.equal(own.scores, imported.scores)
    assert torch.equal(own.segments, imported.segments)


def test_classes_and_settings_are_in_the_run_folder(write_case, tmp_path: Path) -> None:
    case = write_case(TELLS_CLASSES_APART)
    save_file(case.state, tmp_path / "weights.safetensors")
    assert import_detector(tmp_path, tmp_path / "weights.safetensors", "--suppression.max-per-video", 7) == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "README.md",
        "config.json",
        "model.json",
        "model.safetensors",
    ]
    config = load_config(tmp_path / "run" / "config.json")
    assert (config.name, config.suppression.max_per_video, config.backbone.weights) == ("run", 7, None)
    num_classes = case.config["rpn_head"]["num_classes"]
    classes = tuple(f"class {index}" for index in range(num_classes))
    assert read_model(tmp_path / "run" / "model.safetensors").classes == classes


def test_a_file_without_an_average_gives_what_it_has(
    write_case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = write_case(DETECTORS[0])
    torch.save({"state_dict": case.state}, tmp_path / "weights.pth")
    assert import_detector(tmp_path, tmp_path / "weights.pth") == 0
    assert "weights of its state_dict, backbone" in capsys.readouterr().out


def test_a_detector_that_does_not_fit_is_refused_and_leaves_no_folder(
    write_case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = write_case(TELLS_CLASSES_APART)
    classes = (tmp_path / "classes.txt").read_text()
    num_classes = case.config["rpn_head"]["num_classes"]
    save_file(case.state, tmp_path / "weights.safetensors")
    video = {key: value for key, value in case.state.items() if key.startswith("backbone.")}
    save_file(video, tmp_path / "video.safetensors")
    save_file({key: case.state[key] for key in case.state.keys() - video.keys()}, tmp_path / "rest.safetensors")
    first = "projection.stem.0.ln1.weight"
    save_file({k: v for k, v in case.state.items() if k != first}, tmp_path / "torn.safetensors")

    def refused(message: str, weights: str, *more: object) -> None:
        assert import_detector(tmp_path, tmp_path / weights, *more) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()

    refused("video.safetensors holds no localizer (nothing under projection., neck., rpn_head.)", "video.safetensors")
    refused("rest.safetensors is not a checkpoint of", "rest.safetensors")
    torn = f"torn.safetensors: these are not the opentad weights of this actionformer: missing 1 ({first})"
    refused(torn, "torn.safetensors")
    another = ("--backbone.name", "swin3d_nano", "--backbone.frames-per-step", "None")
    refused("VideoSwin", "weights.safetensors", *another)
    (tmp_path / "classes.txt").write_text(classes + "one more\n")
    refused(f"tells {num_classes} classes apart, and {num_classes + 1} were given", "weights.safetensors")
    (tmp_path / "classes.txt").write_text("same\nsame\n\n")
    refused("classes.txt names same more than once", "weights.safetensors")
    (tmp_path / "classes.txt").write_text("\n")
    refused("classes.txt names no class; write one per line", "weights.safetensors")
    (tmp_path / "classes.txt").unlink()
    refused("classes.txt is not a file", "weights.safetensors")


def nano_config(*, rewired: bool, clips: ClipConfig) -> RunConfig:
    return RunConfig(
        num_steps=8,
        data=DataConfig(clips=clips),
        backbone=BackboneConfig(name="swin3d_nano", rewired=rewired),
        localizer=ActionFormerConfig(channels=16, max_num_steps=8, regression_ranges=((0, 4), (4, 10_000))),
        suppression=SuppressionConfig(max_per_video=5),
    )


@pytest.mark.parametrize("rewired", [True, False], ids=["rewired", "plain"])
def test_plain_and_rewired_detectors_are_told_apart(
    rewired: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = nano_config(rewired=rewired, clips=ClipConfig(windowing=ResizeWhole(num_frames=16)))
    state = export_detector(build_detector(config, ("jump", "run")), config=config.backbone)
    save_file(state, tmp_path / "weights.safetensors")
    (tmp_path / "classes.txt").write_text("jump\nrun\n")
    save_config(tmp_path / "config.json", config)
    wrong = "no-" if rewired else ""
    assert import_detector(tmp_path, tmp_path / "weights.safetensors", f"--backbone.{wrong}rewired") == 2
    kind = "rewired" if rewired else "plain"
    said = capsys.readouterr().err
    assert f"weights.safetensors was trained with a {kind} backbone" in said
    assert f"set backbone.rewired to {'true' if rewired else 'false'}" in said
    if rewired:
        assert import_detector(tmp_path, tmp_path / "weights.safetensors", "--backbone.merge", "extrapolate") == 2
        assert "set them to branch, mean, None and 1" in capsys.readouterr().err
    assert import_detector(tmp_path, tmp_path / "weights.safetensors") == 0
    out = tmp_path / "back.safetensors"
    assert run_command("export", "--run", tmp_path / "run", "--to", "opentad", "--out", out) == 0
    back = load_file(out)
    assert back.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in back.items())


def test_a_run_is_not_written_over_and_classes_are_asked_for(
    write_case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = write_case(TELLS_CLASSES_APART)
    save_file(case.state, tmp_path / "weights.safetensors")
    assert import_detector(tmp_path, tmp_path / "weights.safetensors", out=".") == 2
    assert "is the folder of another run; choose another one" in capsys.readouterr().err
    options = ("--config", tmp_path / "config.json", "--out", tmp_path / "run")
    assert run_command("import", tmp_path / "weights.safetensors", *options) == 2
    assert "a checkpoint does not name its classes; give a text file (classes)" in capsys.readouterr().err


class Payload:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_nothing_is_run_and_folders_are_looked_into(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": {"a": Payload(tmp_path / "ran")}}, tmp_path / "evil.pth")
    out = ("--out", tmp_path / "out.safetensors", "--backbone.name", "swin3d_nano")
    assert run_command("import", tmp_path / "evil.pth", *out) == 2
    assert "evil.pth holds more than tensors, and reading it would run code" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    assert run_command("import", tmp_path, *out) == 2
    assert "is a folder that holds evil.pth; name one file" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert run_command("import", tmp_path / "empty", *out) == 2
    assert "is a folder that holds no weights file" in capsys.readouterr().err
    assert run_command("import", tmp_path / "absent.pth", *out) == 2
    assert "absent.pth does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "to", "prefix"),
    [("swin3d_nano", layout.name.split()[0].lower(), "backbone.") for layout in SWIN_LAYOUTS]
    + [("slowfast_nano", layout.name.split()[0].lower(), "") for layout in SLOWFAST_LAYOUTS]
    + [("videomae_nano", "original", "")],
)
def test_a_backbone_of_any_origin_goes_both_ways(name: str, to: str, prefix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = build_backbone(BackboneConfig(name=name, rewired=False)).state_dict()
    save_file(first, tmp_path / "first.safetensors")
    source = ("--weights", tmp_path / "first.safetensors", "--backbone", name)
    theirs = tmp_path / "theirs.safetensors"
    assert run_command("export", *source, "--to", to, "--out", theirs, "--prefix", prefix) == 0
    assert all(key.startswith(prefix) for key in load_file(theirs))
    assert run_command("import", theirs, "--backbone.name", name, "--out", tmp_path / "ours.safetensors") == 0
    ours = load_file(tmp_path / "ours.safetensors")
    assert ours.keys() == first.keys()
    assert all(torch.equal(value, first[key]) for key, value in ours.items())


@pytest.mark.parametrize("name", ["videomae_nano", "clip_nano"])
def test_a_model_of_the_transformers_library_goes_both_ways(name: str, tmp_path: Path, capsys) -> None:
    torch.manual_seed(0)
    first = build_backbone(BackboneConfig(name=name, rewired=False)).state_dict()
    save_file(first, tmp_path / "first.safetensors")
    folder, ours = tmp_path / "folder", tmp_path / "ours.safetensors"
    source = ("--weights", tmp_path / "first.safetensors", "--backbone", name)
    assert run_command("export", *source, "--to", "transformers", "--out", folder) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    capsys.readouterr()
    assert run_command("import", folder, "--backbone.name", name, "--out", ours) == 0
    assert "backbone in the layout of transformers" in capsys.readouterr().out
    assert all(torch.equal(value, first[key]) for key, value in load_file(ours).items())
    assert run_command("export", *source, "--to", "transformers", "--out", folder) == 2
    assert "is there already" in capsys.readouterr().err
    save_file(build_backbone(BackboneConfig(name="swin3d_nano")).state_dict(), tmp_path / "swin.safetensors")
    source = ("--weights", tmp_path / "swin.safetensors", "--backbone", "swin3d_nano")
    assert run_command("export", *source, "--to", "transformers", "--out", tmp_path / "swin") == 2
    assert "swin3d_nano is no model of the transformers library; its layouts: [" in capsys.readouterr().err


def test_a_rewired_detectors_backbone_goes_back_to_the_transformers_library(tmp_path: Path) -> None:
    config = replace(
        nano_config(rewired=True, clips=ClipConfig(windowing=ResizeWhole(num_frames=16))),
        backbone=BackboneConfig(name="videoprism_nano", drop_path=0.1),
    )
    detector = build_detector(config, ("jump", "run"))
    save_config(tmp_path / "config.json", config)
    write_model(
        tmp_path / "model.safetensors", detector.state_dict(), classes=("jump", "run"), wiring=wiring_of(detector)
    )
    assert run_command("export", "--run", tmp_path, "--to", "transformers", "--out", tmp_path / "back") == 0
    back = build_backbone(BackboneConfig(name="videoprism_nano", weights=str(tmp_path / "back")))
    wanted = detector.backbone.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in back.state_dict().items())


def test_what_cannot_be_exported_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(build_backbone(BackboneConfig(name="swin3d_nano")).state_dict(), tmp_path / "swin.safetensors")
    source = ("--weights", tmp_path / "swin.safetensors")
    out = ("--out", tmp_path / "out.safetensors")
    for arguments, message in (
        ((*source, *out, "--to", "torchvision"), "give either --run FOLDER, or --weights FILE and --backbone NAME"),
        ((*source, "--backbone", "swin3d_nano", *out, "--to", "pytorchvideo"), "swin3d_nano has no layout 'pytorchvi"),
        (
            (*source, "--backbone", "swin3d_nano", "--out", tmp_path / "out.pth", "--to", "opentad"),
            "only format of weights files",
        ),
        ((*source, "--backbone", "slowfast_nano", *out, "--to", "mmaction2"), "is not a checkpoint of SlowFast"),
    ):
        assert run_command("export", *arguments) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "out.safetensors").write_bytes(b"mine")
    assert run_command("export", *source, "--backbone", "swin3d_nano", *out, "--to", "opentad") == 2
    assert "is there already" in capsys.readouterr().err
    assert (tmp_path / "out.safetensors").read_bytes() == b"mine"


def test_without_a_recipe_the_published_network_is_meant(
    write_case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = write_case(next(name for name in DETECTORS if load(name).config["backbone"]["type"].startswith("Swin")))
    save_file(case.state, tmp_path / "weights.safetensors")
    num_classes = case.config["rpn_head"]["num_classes"]
    (tmp_path / "classes.txt").write_text("\n".join(map(str, range(num_classes))))
    options = ("--classes", tmp_path / "classes.txt", "--out", tmp_path / "run")
    assert run_command("import", tmp_path / "weights.safetensors", *options) == 2
    shape = tuple(case.state["backbone.model.backbone.patch_embed.proj.weight"].shape)
    assert f"of another shape: patch_embed.proj.weight {shape}, not (96, 3, 2, 4, 4)" in capsys.readouterr().err


def test_clips_of_another_length_are_not_lost_in_a_file(tmp_path: Path, capsys) -> None:
    from transformers import VJEPA2Config, VJEPA2Model

    from re2tal.backbones.hub.vjepa2 import SIZES

    VJEPA2Model(VJEPA2Config(**SIZES["vjepa2_nano"] | {"frames_per_clip": 8})).save_pretrained(tmp_path / "long")
    out = tmp_path / "file.safetensors"
    assert run_command("import", tmp_path / "long", "--backbone.name", "vjepa2_nano", "--out", out) == 2
    assert "takes clips of 8 frames, and a file of a vjepa2_nano is read as" in capsys.readouterr().err
    assert not out.exists()

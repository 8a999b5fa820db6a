"""A trained model as the start of another run: what is taken, what is new, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from re2tal.backbones import BackboneConfig
from re2tal.config import RecognitionConfig, RunConfig, build_detector, build_recognizer, save_config
from re2tal.data.contract.shards import ShardSet
from re2tal.localizers import ActionFormerConfig, VSGNConfig
from re2tal.rewire import wiring_of
from re2tal.runs.start import build_from, find_start, without_gone_files
from re2tal.training.annealing import AnnealingConfig
from re2tal.training.export import write_model

BEFORE, NOW = ("dive", "jump", "run"), ("run", "swim", "dive", "throw")
SMALL = ActionFormerConfig(
    channels=16, num_heads=2, num_embedding_convs=1, num_stem_blocks=1, max_num_steps=16,
    regression_ranges=((0, 4), (4, 100)),
)  # fmt: skip
SHARDS = ShardSet.__new__(ShardSet)


def run(**changes) -> RunConfig:
    return replace(RunConfig(backbone=BackboneConfig(name="swin3d_nano"), localizer=SMALL, num_steps=16), **changes)


def scattered(model: nn.Module) -> nn.Module:
    """Random everywhere: several parameters are zero or one by default, which would hide mistakes."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def trained(folder: Path, config: RunConfig | RecognitionConfig, classes=BEFORE) -> dict[str, Tensor]:
    """A run folder as training leaves it; its weights."""
    folder.mkdir()
    build = build_detector if isinstance(config, RunConfig) else lambda *args: build_recognizer(*args)[0]
    model = scattered(build(config, classes))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    save_config(folder / "config.json", config)
    write_model(folder / "model.safetensors", weights, classes=model.classes, wiring=wiring_of(model))
    return weights


def started(config, source: Path, classes=NOW) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of a run that starts from `source`, and of one that does not."""
    torch.manual_seed(3)
    fresh = build_from(config, classes, None).state_dict()
    config = replace(config, start_from=source)
    torch.manual_seed(3)
    return build_from(config, classes, find_start(config, SHARDS)).state_dict(), fresh


@pytest.mark.parametrize("whole_folder", [True, False])
def test_classes_of_the_same_name_keep_their_rows_and_the_rest_is_as_initialised(whole_folder, tmp_path, capsys):
    before = trained(tmp_path / "before", run())
    source = tmp_path / "before" if whole_folder else tmp_path / "before" / "model.safetensors"
    now, fresh = started(run(), source)
    for name, value in now.items():
        if name.startswith("localizer.classifier.output."):
            assert torch.equal(value[0], before[name][2]), "run"
            assert torch.equal(value[2], before[name][0]), "dive"
            assert value[1].shape == fresh[name][1].shape
            assert not any(torch.equal(value[row], old) for row in (1, 3) for old in before[name]), "new classes"
        else:
            assert torch.equal(value, before[name]), name
    said = capsys.readouterr().err
    assert "classes: 2 as trained (run, dive), 2 new (swim, throw), 1 of the start not in this run (jump)\n" in said
    for part in ("backbone", "localizer.encoder"):
        sizes = [value.numel() for name, value in now.items() if name.startswith(part)]
        assert re.search(rf"^{part} +{len(sizes)} \({sum(sizes):,}\)$", said, re.MULTILINE)
    assert re.search(rf"^localizer.classifier .* 2 \({4 * (16 * 3 + 1)}\)$", said, re.MULTILINE)


def test_the_same_classes_in_another_order_give_the_same_rows_by_name(tmp_path):
    config = run(localizer=VSGNConfig(channels=16, num_groups=4, num_levels=2, first_stride=2, num_head_convs=1))
    before = trained(tmp_path / "before", config)
    now, _ = started(config, tmp_path / "before", classes=("run", "dive", "jump"))
    name = "localizer.classifier.output.bias"
    wanted = before[name].view(2, 4)[:, [0, 3, 1, 2]]  # of each of two anchors: background, then the classes
    assert torch.equal(now[name].view(2, 4), wanted)


def test_another_size_of_localizer_is_new_where_it_differs_and_says_so(tmp_path, capsys):
    before = trained(tmp_path / "before", run())
    wider = run(localizer=replace(SMALL, channels=32, step_supervision=0.5))
    now, fresh = started(wider, tmp_path / "before")
    layers = {name.rpartition(".")[0] for name in now if now[name].shape != before.get(name, torch.empty(0)).shape}
    kept = {name for name in now if name.rpartition(".")[0] not in layers}  # a bias is nothing without its weight
    assert {name for name in now if name.startswith("backbone.")} < kept
    for name, value in now.items():
        assert torch.equal(value, (before if name in kept else fresh)[name]), name
    said = capsys.readouterr().err
    assert "classes: 0 as trained, 4 new (run, swim, dive, throw), 1 of the start not in this run (jump)\n" in said
    count = sum(name.startswith("localizer.encoder") and name not in kept for name in now)
    assert re.search(rf"^localizer.encoder .*{count} \([\d,]+\)$", said, re.MULTILINE)
    assert re.search(r"^ +taken +of another shape +not in the file$", said, re.MULTILINE)
    assert re.search(r"^localizer.step_classifier +2 \([\d,]+\)$", said, re.MULTILINE)


def test_a_detector_takes_a_recognizers_backbone_and_names_what_it_leaves(tmp_path, capsys):
    clips = RecognitionConfig(backbone=BackboneConfig(name="swin3d_nano"))
    before = trained(tmp_path / "clips", clips)
    now, fresh = started(run(), tmp_path / "clips")
    assert all(torch.equal(now[name], before[name]) for name in now if name.startswith("backbone."))
    assert all(torch.equal(now[name], fresh[name]) for name in now if name.startswith("localizer."))
    assert "left in the file: 2 of classifier\n" in capsys.readouterr().err


def test_a_recognizers_classifier_goes_by_class_unless_a_new_one_is_wanted(tmp_path):
    clips = RecognitionConfig(backbone=BackboneConfig(name="swin3d_nano"))
    before = trained(tmp_path / "clips", clips)
    now, fresh = started(clips, tmp_path / "clips")
    assert torch.equal(now["classifier.weight"][[0, 2]], before["classifier.weight"][[2, 0]])
    anew = replace(clips, recognizer=replace(clips.recognizer, pretrained_classifier=False))
    now, fresh = started(anew, tmp_path / "clips")
    assert torch.equal(now["classifier.weight"], fresh["classifier.weight"])
    assert all(torch.equal(now[name], before[name]) for name in now if name.startswith("backbone."))


@pytest.mark.parametrize("whole_folder", [True, False])
def test_another_backbone_is_refused(whole_folder, tmp_path):
    trained(tmp_path / "before", run(backbone=BackboneConfig(name="vit_nano")))
    source = tmp_path / "before" if whole_folder else tmp_path / "before" / "model.safetensors"
    by_name, by_tensors = "was trained with the backbone vit_nano, this run has swin3d_nano", "in a layout we know"
    with pytest.raises(ValueError, match=by_name if whole_folder else by_tensors):
        started(run(), source)


def test_another_wiring_is_refused_before_anything_is_built(tmp_path):
    trained(tmp_path / "before", run())
    for config in (
        run(backbone=BackboneConfig(name="swin3d_nano", rewired=False)),
        run(backbone=BackboneConfig(name="swin3d_nano", beta=0.5)),
        run(annealing=AnnealingConfig(epochs=1)),
    ):
        with pytest.raises(ValueError, match=r"model.safetensors was trained rewired with"):
            find_start(replace(config, start_from=tmp_path / "before"), SHARDS)


def test_what_is_no_trained_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a file; train first"):
        find_start(run(start_from=tmp_path / "nowhere"), SHARDS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty/model.safetensors is not a file"):
        find_start(run(start_from=tmp_path / "empty"), SHARDS)
    (tmp_path / "x.safetensors").write_bytes(b"not one")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        find_start(run(start_from=tmp_path / "x.safetensors"), SHARDS)


def test_a_resumed_run_is_built_without_files_that_are_gone_and_with_those_that_are_there(tmp_path, capsys):
    """Its checkpoint has their weights; a hub name gives the network's size."""
    (start := tmp_path / "before").mkdir()
    here = tmp_path / "here.safetensors"
    here.touch()
    config = run(start_from=start, backbone=BackboneConfig(name="swin3d_nano", weights=str(tmp_path / "gone.pth")))
    assert without_gone_files(config) == run(backbone=BackboneConfig(name="swin3d_nano"))
    said = capsys.readouterr().err
    assert f"start_from, {start}/model.safetensors, is gone; the checkpoint has its weights" in said
    assert f"backbone.weights, {tmp_path}/gone.pth, is gone; the checkpoint has its weights" in said
    videomae = replace(config, backbone=replace(config.backbone, name="videomae_base"))
    assert without_gone_files(videomae) == videomae, "which norm it ends in is told by its file alone"
    (start / "model.safetensors").touch()
    for weights in (str(here), "OWNER/NAME"):
        kept = replace(config, backbone=BackboneConfig(name="vivit_base", weights=weights))
        assert without_gone_files(kept) == kept

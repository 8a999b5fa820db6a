"""A recognizer pools what is valid, learns from trimmed clips, and hands its backbone on."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from re2tal.backbones import BACKBONES, BackboneConfig, build_backbone
from re2tal.backbones.base import VideoBackbone
from re2tal.cli.import_weights import import_weights
from re2tal.config import RecognitionConfig, build_detector, build_recognizer
from re2tal.conversion import export_backbone
from re2tal.recipes import find_recipe
from re2tal.recognizer import Recognition, Recognizer, RecognizerConfig, load_classifier
from re2tal.rewire import wiring_of
from re2tal.structures import Action, Features, Timeline
from re2tal.training.annealing import AnnealingConfig
from re2tal.training.export import write_model

CLASSES = ("run", "pour tea", "petting animal (not cat)")


class Means(VideoBackbone):
    """Every second frame's mean colour: three channels, no weights."""

    out_channels, frames_per_step = 3, 2

    def forward(self, frames: Tensor, mask: Tensor) -> Features:
        return Features(frames.mean(dim=(3, 4))[..., ::2], mask[:, ::2])


def recognizer(**config: float) -> Recognizer:
    torch.manual_seed(0)
    return Recognizer(Means(), RecognizerConfig(**{"dropout": 0.0, **config}), classes=CLASSES)


def shown(*labels: str | None) -> list[tuple[Action, ...]]:
    return [() if label is None else (Action(0.0, 1.0, label),) for label in labels]


def loss(model: Recognizer, outputs: Recognition, actions: list[tuple[Action, ...]]) -> Tensor:
    return model.loss(outputs, actions, [Timeline(0.0, 1.0, 8.0)] * len(actions), num_frames=8)["total"]


def test_the_mean_is_over_valid_steps_and_a_clip_of_none_is_said_to_be_one():
    model, frames = recognizer(), torch.rand(3, 3, 8, 2, 2)
    mask = torch.arange(8) < torch.tensor([[8], [4], [0]])
    outputs = model(frames, mask)
    for clip, steps in ((0, (0, 2, 4, 6)), (1, (0, 2))):
        mean = sum(frames[clip, :, step].mean(dim=(1, 2)) for step in steps) / len(steps)
        torch.testing.assert_close(outputs.logits[clip], model.classifier.weight @ mean + model.classifier.bias)
    assert outputs.valid.tolist() == [True, True, False]
    assert bool(outputs.logits.isfinite().all())


def test_the_loss_is_the_mean_cross_entropy_of_the_valid_clips():
    outputs = Recognition(
        torch.tensor([[0.0, math.log(3), 0.0], [5.0, 0, 0], [9.0, 0, 0]]), torch.tensor([1, 1, 0]) > 0
    )
    # exp(logits) of the first clip are 1, 3, 1: its class has 3/5. Of the second: 1 / (e^5 + 2).
    expected = (math.log(5 / 3) + math.log(math.e**5 + 2)) / 2
    assert loss(recognizer(), outputs, shown("pour tea", "pour tea", None)).item() == pytest.approx(expected)
    # Smoothing moves a tenth of the target evenly over the three classes.
    first = Recognition(outputs.logits[:1], outputs.valid[:1])
    smooth = 0.9 * math.log(5 / 3) + 0.1 / 3 * (math.log(5 / 3) + 2 * math.log(5))
    assert loss(recognizer(label_smoothing=0.1), first, shown("pour tea")).item() == pytest.approx(smooth)


def test_a_batch_without_a_valid_clip_teaches_nothing_but_has_gradients():
    model = recognizer()
    outputs = model(torch.rand(2, 3, 8, 2, 2), torch.zeros(2, 8, dtype=torch.bool))
    value = loss(model, outputs, shown(None, None))
    value.backward()
    assert value.item() == 0
    assert all(bool((parameter.grad == 0).all()) for parameter in model.classifier.parameters())


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (shown("fly"), r"a clip shows \['fly'\]; recognition trains on clips that show one of its 3 classes: build"),
        (shown(None), r"a clip shows \[\]; recognition trains"),
        ([shown("run")[0] * 2], r"a clip shows \['run', 'run'\]; recognition trains"),
    ],
)
def test_a_clip_that_does_not_show_one_class_is_an_error(actions, message):
    outputs = Recognition(torch.zeros(1, 3), torch.ones(1, dtype=torch.bool))
    with pytest.raises(ValueError, match=message):
        loss(recognizer(), outputs, actions)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RecognizerConfig(dropout=1.0), "recognizer.dropout is 1.0; give a number from 0 to below 1"),
        (lambda: RecognizerConfig(label_smoothing=-0.1), "recognizer.label_smoothing is -0.1"),
        (lambda: Recognizer(Means(), RecognizerConfig(), classes=["a"]), "classes must be distinct and at least two"),
        (lambda: Recognizer(Means(), RecognizerConfig(), classes=["a", "a"]), "classes must be distinct"),
    ],
)
def test_faulty_settings_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("head", ["cls_head.fc_cls", "head", "module.head", "head.projection", "blocks.6.proj"])
def test_a_public_checkpoint_gives_its_classifier_where_it_has_as_many_classes(tmp_path, head):
    state = {f"{head}.weight": torch.rand(3, 3), f"{head}.bias": torch.rand(3), "backbone.x": torch.rand(2)}
    torch.save({"state_dict": state}, tmp_path / "public.pth")
    model = recognizer()
    assert load_classifier(model, tmp_path / "public.pth") == f"the classifier is {head} of {tmp_path / 'public.pth'}"
    assert torch.equal(model.classifier.weight, state[f"{head}.weight"])
    assert torch.equal(model.classifier.bias, state[f"{head}.bias"])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"head.weight": (400, 3), "head.bias": (400,)}, "head in .* has 400 classes, not 3"),
        ({"head.weight": (3, 768), "head.bias": (3,)}, r"head in .* is \(3, 768\), not \(K, 3\)"),
        ({"layers.0.weight": (3, 3)}, "the classifier starts anew: .* has none"),
        ({"head.weight": (3, 3)}, "the classifier starts anew: .* has none"),
    ],
)
def test_a_classifier_that_does_not_fit_is_left_out_and_that_is_said(tmp_path, state, message):
    save_file({name: torch.ones(shape) for name, shape in state.items()}, tmp_path / "public.safetensors")
    model = recognizer()
    before = model.classifier.weight.clone()
    said = load_classifier(model, tmp_path / "public.safetensors")
    assert said.startswith("the classifier starts anew")
    assert re.search(message, said)
    assert torch.equal(model.classifier.weight, before)


@pytest.mark.parametrize("layout", ["mmaction2", "pytorchvideo"])
@torch.no_grad()
def test_a_plain_slowfast_says_what_it_said_where_it_was_trained(tmp_path, layout):
    """mmaction2's head takes the means of the fast pathway, then of the slow one; pytorchvideo's the reverse."""
    torch.manual_seed(0)
    config = RecognitionConfig(backbone=BackboneConfig(name="slowfast_nano", rewired=False))
    network = build_recognizer(config, CLASSES)[0].backbone.eval()
    head = nn.Linear(network.out_channels, len(CLASSES))
    name = {"mmaction2": "cls_head.fc_cls", "pytorchvideo": "blocks.6.proj"}[layout]
    weights = export_backbone(
        network, name="slowfast_nano", to=layout, prefix={"mmaction2": "backbone."}.get(layout, "")
    )
    torch.save({"state_dict": weights | {f"{name}.weight": head.weight, f"{name}.bias": head.bias}}, tmp_path / "k.pth")
    taken = replace(config, backbone=replace(config.backbone, weights=str(tmp_path / "k.pth")))
    loaded, said = build_recognizer(taken, CLASSES)
    assert said == f"the classifier is {name} of {tmp_path / 'k.pth'}"
    frames = torch.randn(2, 3, 16, 32, 32)
    slow, fast = (x.mean(dim=(2, 3, 4)) for x in network.pathways(frames))
    wanted = head(torch.cat([fast, slow] if layout == "mmaction2" else [slow, fast], dim=1))
    logits = loaded.eval()(frames, torch.ones(2, 16, dtype=torch.bool)).logits
    torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-5)


def test_a_classifier_trained_here_gives_each_class_its_own_row(tmp_path):
    trained = recognizer()
    nn.init.normal_(trained.classifier.bias)
    write_model(tmp_path / "model.safetensors", trained.state_dict(), classes=CLASSES)
    order = ("petting animal (not cat)", "run")
    model = Recognizer(Means(), RecognizerConfig(), classes=order)
    assert "is classifier of" in load_classifier(model, tmp_path / "model.safetensors")
    assert torch.equal(model.classifier.weight, trained.classifier.weight[[2, 0]])
    assert torch.equal(model.classifier.bias, trained.classifier.bias[[2, 0]])
    stranger = Recognizer(Means(), RecognizerConfig(), classes=("run", "fly"))
    assert "does not know fly" in load_classifier(stranger, tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", sorted(name for name in BACKBONES if name.endswith("_nano")))
def test_a_trained_recognizer_is_where_a_detector_or_another_recognizer_starts(tmp_path, name):
    torch.manual_seed(0)
    plain = RecognitionConfig(backbone=BackboneConfig(name=name, rewired=False))
    trained, said = build_recognizer(plain, CLASSES)
    assert said == "the classifier starts anew"
    path = tmp_path / "model.safetensors"
    write_model(path, trained.state_dict(), classes=CLASSES)
    backbone = build_backbone(BackboneConfig(name=name, weights=str(path)))
    assert same(backbone, trained.backbone)
    again, said = build_recognizer(RecognitionConfig(backbone=BackboneConfig(name=name, weights=str(path))), CLASSES)
    assert said == f"the classifier is classifier of {path}"
    assert same(again, trained)


def test_weights_of_a_rewired_network_are_not_taken_for_another_wirings(tmp_path):
    config = RecognitionConfig(backbone=BackboneConfig(name="swin3d_nano", unit="block"))
    trained, _ = build_recognizer(config, CLASSES)
    path = tmp_path / "model.safetensors"
    write_model(path, trained.state_dict(), classes=CLASSES, wiring=wiring_of(trained))
    taken = BackboneConfig(name="swin3d_nano", unit="block", weights=str(path))
    assert same(build_recognizer(replace(config, backbone=taken), CLASSES)[0], trained)
    for changes, ours in (({"rewired": False}, "plain"), ({"unit": "branch"}, "rewired with .*'unit': 'branch'")):
        backbone = replace(taken, **changes)
        message = rf"was trained rewired with .*'unit': 'block'.*, and here the backbone is {ours}.*; set back"
        with pytest.raises(ValueError, match=message):
            build_recognizer(replace(config, backbone=backbone), CLASSES)
        with pytest.raises(ValueError, match=message):
            build_detector(replace(find_recipe("demo"), backbone=backbone), CLASSES)
    plain = tmp_path / "plain.safetensors"
    import_weights(path, run=config, out=plain, as_plain=True)
    unwired = BackboneConfig(name="swin3d_nano", rewired=False, weights=str(plain))
    assert same(build_recognizer(replace(config, backbone=unwired), CLASSES)[0].backbone, trained.backbone)


@pytest.mark.parametrize("name", ["swin3d_nano", "slowfast_nano"])
def test_opentads_rewired_weights_are_those_of_the_papers_wiring_and_no_other(tmp_path, name, capsys):
    network = build_backbone(BackboneConfig(name=name, rewired=False))
    theirs = export_backbone(network, name=name, to="opentad", prefix="backbone.")
    torch.save({"state_dict": theirs}, tmp_path / "re2.pth")
    save_file(theirs, tmp_path / "re2.safetensors")
    config = RecognitionConfig(backbone=BackboneConfig(name=name))
    import_weights(tmp_path / "re2.pth", run=config, out=tmp_path / "imported.safetensors")
    assert "trained rewired with {'unit': 'branch', 'merge': 'mean', 'segment': None" in capsys.readouterr().out
    for file in ("re2.pth", "re2.safetensors", "imported.safetensors"):
        taken = BackboneConfig(name=name, weights=str(tmp_path / file))
        assert same(build_recognizer(replace(config, backbone=taken), CLASSES)[0].backbone, network)
        for changes in ({"rewired": False}, {"unit": "block", "merge": "extrapolate", "segment": 2}, {"beta": 0.5}):
            with pytest.raises(ValueError, match=f"{file} was trained rewired with .*--as-plain"):
                build_detector(replace(find_recipe("demo"), backbone=replace(taken, **changes)), CLASSES)


def test_annealing_starts_from_a_plain_network_or_where_training_ended(tmp_path):
    config = RecognitionConfig(backbone=BackboneConfig(name="swin3d_nano"))
    trained, _ = build_recognizer(config, CLASSES)
    path = tmp_path / "model.safetensors"
    write_model(path, trained.state_dict(), classes=CLASSES, wiring=wiring_of(trained))
    config = replace(config, backbone=BackboneConfig(name="swin3d_nano", weights=str(path)))
    detector = replace(find_recipe("demo"), backbone=config.backbone)
    for run, build in ((config, build_recognizer), (detector, build_detector)):
        message = r"rewired with beta 1\.0, and annealing would start at beta 0\.0.*; set annealing\.epochs to 0"
        with pytest.raises(ValueError, match=message):
            build(replace(run, annealing=AnnealingConfig(epochs=2)), CLASSES)
    half = replace(config, backbone=BackboneConfig(name="swin3d_nano", beta=0.5))
    write_model(path, trained.state_dict(), classes=CLASSES, wiring=wiring_of(build_recognizer(half, CLASSES)[0]))
    goes_on = replace(config, annealing=AnnealingConfig(epochs=2, start=0.5))
    assert same(build_recognizer(goes_on, CLASSES)[0], trained)
    write_model(path, trained.state_dict(), classes=CLASSES)  # of a plain network
    assert same(build_recognizer(replace(config, annealing=AnnealingConfig(epochs=2)), CLASSES)[0], trained)


def test_annealing_of_slowfast_takes_whole_blocks_because_its_branches_are_another_network(tmp_path):
    network = build_backbone(BackboneConfig(name="slowfast_nano", rewired=False))
    save_file(network.state_dict(), tmp_path / "plain.safetensors")
    backbone = BackboneConfig(name="slowfast_nano", weights=str(tmp_path / "plain.safetensors"))
    config = RecognitionConfig(backbone=backbone, annealing=AnnealingConfig(epochs=2))
    with pytest.raises(ValueError, match=r"they take its ReLUs inside\. Set backbone\.unit to 'block'"):
        build_recognizer(config, CLASSES)
    blocks, _ = build_recognizer(replace(config, backbone=replace(backbone, unit="block")), CLASSES)
    assert same(blocks.backbone, network)


def same(one: nn.Module, other: nn.Module) -> bool:
    theirs = other.state_dict()
    return one.state_dict().keys() == theirs.keys() and all(
        torch.equal(value, theirs[name]) for name, value in one.state_dict().items()
    )


def test_a_folder_of_weights_is_not_searched_for_a_classifier_and_one_may_be_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("re2tal.config.build.build_backbone", lambda config: Means())
    backbone = BackboneConfig(weights=str(tmp_path))
    _, said = build_recognizer(RecognitionConfig(backbone=backbone), CLASSES)
    assert said == f"the classifier starts anew: only files are searched for one, not {tmp_path}"
    refused = RecognizerConfig(pretrained_classifier=False)
    path = tmp_path / "w.safetensors"
    save_file({"head.weight": torch.ones(3, 3), "head.bias": torch.ones(3)}, path)
    _, said = build_recognizer(
        RecognitionConfig(backbone=BackboneConfig(weights=str(path)), recognizer=refused), CLASSES
    )
    assert said == "the classifier starts anew"

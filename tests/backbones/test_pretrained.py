"""Weights of the transformers library: what is refused, in which words, and that nothing is ever unpickled or run."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from re2tal.backbones import BackboneConfig, build_backbone
from re2tal.backbones.swin3d.network import DropPath


def build(weights: Path | str, *, name: str = "vivit_nano") -> Any:
    return build_backbone(BackboneConfig(name=name, weights=str(weights)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A ViViT as save_pretrained writes it."""
    backbone = build_backbone(BackboneConfig(name="vivit_nano", rewired=False))
    backbone.encoder.model.save_pretrained(tmp_path / "vivit")
    return tmp_path / "vivit"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_hub_name_without_a_network_says_how_to_fetch_it(monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError,
        match=r"cannot read 'someone/vivit-never-cached' .*`hf download someone/vivit-never-cached --local-dir",
    ):
        build("someone/vivit-never-cached")


@pytest.mark.parametrize("weights", ["/no/such/folder", "./here", "a/b/c"])
def test_a_folder_that_is_not_there_is_not_taken_for_a_hub_name(weights: str) -> None:
    with pytest.raises(ValueError, match=f"{weights!r} is neither a file, a folder nor a hub name"):
        build(weights)


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"weights file nowhere\.safetensors does not exist"):
        build("nowhere.safetensors")


def test_a_folder_without_configuration_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"vivit has no config\.json; give a folder written by save_pretrained"):
        build(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no weights in safetensors files"):
        build(folder)


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_weights_are_refused_unread(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung"), protocol=2))
    with pytest.raises(ValueError, match=r"pickled ones, \*\.bin and \*\.pth, are never read"):
        build(folder)
    with pytest.raises(ValueError):
        build(folder / "pytorch_model.bin")
    assert not (tmp_path / "sprung").exists()


def test_code_that_comes_with_weights_is_not_run(folder: Path, tmp_path: Path) -> None:
    (folder / "modeling.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    edit(folder / "config.json", auto_map={"AutoModel": "modeling.Model", "AutoConfig": "modeling.Config"})
    build(folder)
    edit(folder / "config.json", model_type="vivit_plus")
    with pytest.raises(ValueError, match="it also asks to run code that it brings, which is never done"):
        build(folder)
    assert not (tmp_path / "sprung").exists()


def test_another_architecture_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(
        ValueError, match="holds a model of type 'vivit', this backbone is 'clip_vision_model' or 'clip'"
    ):
        build(folder, name="clip_nano")


def test_another_size_is_refused_by_its_figures(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"another size of this family \(hidden_size 48, not 768, num_hidden_layers 4"):
        build(folder, name="vivit_base")


def test_missing_and_misshapen_entries_are_listed(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    lost, cut = (next(key for key in state if key.endswith(end)) for end in ("2.layernorm_before.weight", "cls_token"))
    del state[lost]
    state[cut] = torch.zeros(1, 1, 7)
    save_file(state | {"extra.weight": torch.zeros(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError,
        match=r"1 missing \['layers\.2\.layernorm_before\.weight'\], 1 of another shape \['embeddings\.cls_token'\], "
        r"1 unexpected \['extra\.weight'\]",
    ):
        build(folder)


def test_damaged_weights_are_refused(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="are damaged"):
        build(folder)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"num_hidden_layers": "4"}, "Field 'num_hidden_layers' expected int, got str"),
        ({"tubelet_size": [2, 0, 0]}, "ZeroDivisionError"),
        ({"hidden_act": "swoosh"}, "KeyError: 'swoosh'"),
    ],
)
def test_a_configuration_that_the_library_stumbles_over_is_named(folder: Path, changes: dict, what: str) -> None:
    edit(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=rf"the config\.json of '.*vivit' describes no model .*{what}"):
        build(folder)


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_a_damaged_index_is_named(folder: Path, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"vivit/model\.safetensors\.index\.json (is not usable|has no weight_map)"):
        build(folder)


def test_a_shard_that_the_index_lists_must_be_there(folder: Path) -> None:
    backbone = build(folder)
    (folder / "model.safetensors").unlink()
    from re2tal.rewire import unrewire

    unrewire(backbone)
    backbone.encoder.model.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    build(folder)
    lost = sorted(folder.glob("*.safetensors"))[0]
    lost.unlink()
    with pytest.raises(ValueError, match=f"lists {lost.name}, which the folder lacks; fetch the weights again"):
        build(folder)


def test_a_file_with_the_state_of_a_backbone_is_loaded(tmp_path: Path) -> None:
    source = build_backbone(BackboneConfig(name="vivit_nano"))
    save_file(
        {f"module.backbone.{key}": value for key, value in source.state_dict().items()}, tmp_path / "a.safetensors"
    )
    loaded = build(tmp_path / "a.safetensors")
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in source.state_dict().items())


def test_a_file_out_of_its_folder_is_not_enough(folder: Path, tmp_path: Path) -> None:
    message = (
        "is not a checkpoint of VivitEncoder in a layout we know .*Or give .*vivit, the whole folder of this model"
    )
    with pytest.raises(ValueError, match=message):
        build(folder / "model.safetensors")
    (tmp_path / "weights.pkl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"weights\.pkl' is a file of no kind that is read; give one of \.safetensors"):
        build(tmp_path / "weights.pkl")


def test_drop_path_grows_from_nothing_at_the_first_block() -> None:
    backbone = build_backbone(BackboneConfig(name="videoprism_nano", drop_path=0.5, rewired=False))
    rates = [module.rate for module in backbone.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    assert not any(isinstance(module, DropPath) for module in build_without_drops().modules())


def build_without_drops() -> nn.Module:
    return build_backbone(BackboneConfig(name="videoprism_nano"))

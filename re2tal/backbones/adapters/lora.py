"""Low-rank updates of linear layers (LoRA, Hu et al., ICLR 2022), by the peft library.

    y = W x + alpha / rank * B A x        A random, B zero at first; W is frozen

The layers are replaced inside of their branches, so blocks are rewired as before. Merged, W + alpha / rank * B A takes
the place of W, and the network has its own names again.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from re2tal.backbones.base import BackboneConfig

INSTALL = 'pip install "re2tal[lora]"'


def add_lora(backbone: nn.Module, config: BackboneConfig) -> list[nn.Parameter]:
    """Puts updates on the linear layers that `config.lora_targets` names, and returns their parameters.

    Raises ValueError for a target that is no linear layer here, and without peft.
    """
    peft = _library()
    layers = [name for name, module in backbone.named_modules() if type(module) is nn.Linear]
    linear = {_last(name) for name in layers}
    if not config.lora_targets or (unknown := sorted(set(config.lora_targets) - linear)):
        named = "names no layer" if not config.lora_targets else f"names {', '.join(unknown)}"
        raise ValueError(
            f"backbone.lora_targets {named}, and the linear layers of {config.name} are called "
            f"{', '.join(sorted(linear)) or 'nothing: it has none'}; name some of these"
        )
    # Whole names: by the last ones, peft would also update a convolution called proj, and layers of torch's attention,
    # whose forward takes their weights and no update.
    targets = [name for name in layers if _last(name) in config.lora_targets]
    lora = peft.LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=targets)
    peft.inject_adapter_in_model(lora, backbone)
    return [parameter for name, parameter in backbone.named_parameters() if ".lora_" in name]


def merge_lora(backbone: nn.Module) -> None:
    """Adds all updates to the layers that they are of, in place: afterwards nothing of peft is left in `backbone`."""
    lora_layer = _library().tuners.lora.LoraLayer
    for name, module in list(backbone.named_modules()):
        if isinstance(module, lora_layer):
            module.merge()
            backbone.set_submodule(name, module.get_base_layer())


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _library() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError(f"backbone.adapter 'lora' needs the peft package; install it: {INSTALL}") from error
    return peft

"""SlowFast and its rewired form against mmaction2 and OpenTAD: values, stages, laterals and every gradient.

ReLU and max-pooling have kinks, across which rounding can flip a gradient; the vectors were chosen to be free of that.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from parity.compare import Tolerances, check_gradients, check_loss, check_values
from parity.sizes import slowfast_size
from parity.vectors import Case, cases, load
from torch import Tensor

from re2tal.backbones.slowfast.layouts import KEY_LAYOUTS
from re2tal.backbones.slowfast.network import Bottleneck, InnerReluBottleneck, SlowFast
from re2tal.rewire import RewiringConfig, rewire

TOLERANCES = Tolerances(
    output={torch.float32: 1e-4, torch.float64: 1e-8},
    grad_x={torch.float32: 1e-4, torch.float64: 1e-6},
    loss={torch.float32: 1e-4, torch.float64: 1e-8},
    norm={torch.float32: 1e-3, torch.float64: 1e-7},
    norm_floor={torch.float32: 1e-5, torch.float64: 0.0},
    probe={torch.float32: 1e-4, torch.float64: 1e-7},
)
LAYOUTS = {layout.name.split()[0]: layout for layout in KEY_LAYOUTS}
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def build(case: Case, layout: str, block: type[Bottleneck], dtype: torch.dtype) -> SlowFast:
    slowfast = SlowFast(**slowfast_size(case.config["arguments"]), block=block)
    slowfast.load_state_dict({ours: case.state[theirs] for theirs, ours in names(case, layout).items()})
    return slowfast.to(dtype).eval()


def names(case: Case, layout: str) -> dict[str, str]:
    return LAYOUTS[layout].to_ours(case.state)


def run(slowfast: SlowFast, case: Case, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """The input, the two outputs, and every array that the reference may hold; streams for rewired stages."""
    captured: dict[str, Tensor] = {}
    entered: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: captured.__setitem__(name, output)

    def keep_input(name: str) -> Callable[..., None]:
        return lambda module, inputs: entered.__setitem__(name, inputs[0].detach().clone())

    for speed, pathway in (("slow", slowfast.slow_path), ("fast", slowfast.fast_path)):
        pathway.maxpool.register_forward_hook(keep(f"raw_{speed}_stem"))
        for index, layer in enumerate(pathway.layers(), start=1):
            layer.register_forward_hook(keep(f"raw_{speed}_layer{index}"))
            list(layer.children())[-1].conv1.register_forward_pre_hook(keep_input(f"{speed}_layer{index}"))
    for index, lateral in enumerate(slowfast.slow_path.laterals()):
        lateral.register_forward_hook(keep(f"raw_lateral_{f'layer{index}' if index else 'conv1'}"))
    x = case.tensor("x").to(dtype).requires_grad_()
    slow, fast = slowfast.pathways(x)
    # The last bottleneck sees the last state but one, y1; the stage's output is the mean of y1 and y2.
    for name, y1 in entered.items():
        captured[f"streams_{name}"] = torch.cat([2 * captured[f"raw_{name}"] - y1, y1], dim=1)
    return x, {"slow": slow, "fast": fast}, captured


def check(case: Case, layout: str, slowfast: SlowFast, dtype: torch.dtype) -> None:
    x, outputs, captured = run(slowfast, case, dtype)
    check_values(case, captured | {f"out_{name}": out for name, out in outputs.items()}, TOLERANCES, dtype=dtype)
    terms = [(out * case.tensor(f"w_{name}").to(dtype)).sum() / out.numel() ** 0.5 for name, out in outputs.items()]
    loss = torch.stack(terms).sum()
    check_loss(case, loss, TOLERANCES)
    loss.backward()
    ours, mapped = dict(slowfast.named_parameters()), names(case, layout)
    gradients = [ours[mapped[name]].grad for name in case.arrays["param_names"].tolist()]
    check_gradients(case, x, gradients, TOLERANCES)


@both_precisions
@pytest.mark.parametrize("name", cases("slowfast"))
def test_equals_mmaction2(name: str, dtype: torch.dtype) -> None:
    case = load(name)
    check(case, "mmaction2", build(case, "mmaction2", Bottleneck, dtype), dtype)


@both_precisions
@pytest.mark.parametrize("recompute", [True, False], ids=["rebuilt", "kept"])
@pytest.mark.parametrize("name", cases("re2slowfast"))
def test_rewired_equals_opentad(name: str, recompute: bool, dtype: torch.dtype) -> None:
    case = load(name)
    slowfast = build(case, "OpenTAD", InnerReluBottleneck, dtype)
    rewire(slowfast, config=RewiringConfig(recompute=recompute))
    check(case, "OpenTAD", slowfast, dtype)

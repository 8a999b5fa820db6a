"""Numbers that are NaN or infinite: in the weights before the first step, in gradients, and in what is saved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from re2tal.training.deepspeed_import import Engine
from re2tal.training.engine_weights import master_weights, replicated_weights


def check_finite(model: nn.Module) -> None:
    """Raises ValueError where a parameter of `model` is not finite: the first loss would not be either, whatever the
    learning rate. Waits for the device once.
    """
    named = list(model.named_parameters())
    counts = [(~torch.isfinite(parameter.detach())).sum() for _, parameter in named]
    # One transfer for all parameters: each `item` would wait for the device.
    bad = [] if not counts else torch.stack(counts).tolist()
    odd = [(name, count, parameter.numel()) for (name, parameter), count in zip(named, bad, strict=True) if count]
    if odd:
        name, count, size = odd[0]
        raise ValueError(
            f"before the first step, {len(odd)} of {len(named)} parameters hold NaN or infinity, such as {name} in "
            f"{count} of {size} elements: the weights that training starts from are broken; use another file, or one "
            "from before that run diverged"
        )


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no number in them is NaN or infinite; waits for each of their devices once."""
    sums: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        sums.setdefault(tensor.device, []).append(_sum(tensor))
    return all(bool(torch.stack(of_device).isfinite().all()) for of_device in sums.values())


def _sum(tensor: Tensor) -> Tensor:
    """Not finite where a number is not; ten times as fast on a CPU as the largest absolute value."""
    # A NaN or infinity survives any sum. Finite numbers would have to sum to 3e38 to pass for one.
    return tensor.detach().sum(dtype=torch.float32)


class GradientWatch:
    """Which batches of a step gave this rank a gradient that is not finite: seen before the ranks' are summed."""

    def __init__(self, engine: Engine) -> None:
        self._seen: list[tuple[tuple[str, ...], list[Tensor]]] = []
        for weight in engine.module.parameters():
            if weight.requires_grad:
                weight.register_hook(self._look)

    def new_step(self) -> None:
        """Forgets the batches of the step before."""
        self._seen = []

    def new_batch(self, video_ids: Sequence[str]) -> None:
        """The gradients from here on are of these videos."""
        self._seen.append((tuple(video_ids), []))

    def _look(self, gradient: Tensor) -> None:
        # Outside a batch of training, as while a plan is measured, nobody asks.
        if self._seen:
            _, total = self._seen[-1]
            here = _sum(gradient)
            total[:] = [total[0] + here if total else here]

    def culprits(self) -> list[str]:
        """The videos of the batches that were not finite on this rank."""
        return [video for videos, total in self._seen if not all_finite(total) for video in videos]


def find_non_finite(engine: Engine) -> str | None:
    """What of this rank's weights and optimizer state, or of its norms' statistics, is not finite; None if nothing."""
    # DeepSpeed's wrapper hides the state of torch's optimizer.
    optimizer = getattr(engine, "basic_optimizer", engine.optimizer)
    states = (value for state in optimizer.state.values() for value in state.values())
    parts: dict[str, Iterable[Tensor]] = {
        "the weights": master_weights(engine),
        "the weights in forward": replicated_weights(engine).values(),
        "the optimizer's state": (state for state in states if torch.is_tensor(state) and state.is_floating_point()),
        "the running statistics of norms": (
            buffer for name, buffer in engine.module.named_buffers() if name.endswith(("running_mean", "running_var"))
        ),
    }
    return next((name for name, tensors in parts.items() if not all_finite(tensors)), None)

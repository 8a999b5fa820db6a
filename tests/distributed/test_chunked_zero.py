"""Branches in pieces or stored, and states in host memory, under ZeRO 0 to 3 and DDP with two ranks: nothing changes.

Gradient hooks that fired more than once would show here: DDP and ZeRO-2 raise, ZeRO-3 silently trains something else.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from distributed.ranks import run_ranks
from torch import Tensor, nn

from re2tal.backbones.swin3d.network import VideoSwin
from re2tal.rewire import Branch, RewiringConfig, by_samples, by_tokens, residual_branches, rewire

WORLD_SIZE, NUM_STEPS, ACCUMULATION, CHANNELS = 2, 2, 2, 16
STAGES = (0, 1, 2, 3)
FORMS = {
    "kept": RewiringConfig(recompute=False),
    "cut": RewiringConfig(chunk_mebibytes=1e-4),  # as far as it can be
    "offloaded": RewiringConfig(chunk_mebibytes=1e-4, segment=3, offload=True),
    "stored": RewiringConfig(chunk_mebibytes=1e-4, stored=2),
    "known": RewiringConfig(chunk_mebibytes=1e-4, known=3),
    "kept segments": RewiringConfig(recompute=False, segment=3),
}

pytestmark = pytest.mark.timeout(600)  # a minute of two idle cores; they are often not idle


class Block(nn.Module):
    """Mixing over tokens, cut by samples, and an MLP, cut by tokens; the scales belong to the block itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.qkv, self.out = nn.Linear(CHANNELS, 3 * CHANNELS, bias=False), nn.Linear(CHANNELS, CHANNELS)
        self.up, self.down = nn.Linear(CHANNELS, 2 * CHANNELS), nn.Linear(2 * CHANNELS, CHANNELS)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((CHANNELS,), 0.5)) for _ in range(2))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return self.scale1 * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def transform(self, x: Tensor) -> Tensor:
        return self.scale2 * self.down(F.gelu(self.up(self.norm2(x))))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x)
        return x + self.transform(x)


@residual_branches.register
def _(block: Block) -> tuple[Branch, ...]:
    return (
        Branch("attention", Block.attend, through_block=True, cut=by_samples(inner_states=8)),
        Branch("mlp", Block.transform, through_block=True, cut=by_tokens(inner_states=8)),
    )


class Net(nn.Module):
    """A small Video Swin with drop-path, blocks that own parameters, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.swin = VideoSwin(embed_dim=8, depths=(2, 2), num_heads=(2, 2), window=(2, 2, 2), drop_path=0.3)
        self.stage = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), Block(), Block())
        self.head = nn.Linear(CHANNELS, 4)

    def forward(self, frames: Tensor) -> Tensor:
        mask = torch.ones(len(frames), frames.shape[2], dtype=torch.bool)
        return self.head(self.stage(self.swin(frames, mask).values.transpose(1, 2)).mean(1))


def network(*, form: str) -> Net:
    torch.manual_seed(0)
    net = Net()
    rewire(net, config=FORMS[form])
    return net


def optimizer(net: nn.Module) -> torch.optim.Optimizer:
    """AdamW, with an eps that keeps it from blowing up the rounding of gradients near zero."""
    return torch.optim.AdamW(net.parameters(), lr=1e-2, eps=1e-3)


def batches(rank: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(100 + rank)
    return [
        (torch.randn(2, 3, 6, 12, 12, generator=generator), torch.randn(2, 4, generator=generator))
        for _ in range(NUM_STEPS * ACCUMULATION)
    ]


def train(*, stage: int, precision: str, form: str) -> dict[str, Tensor]:
    """All parameters after NUM_STEPS steps of ACCUMULATION batches."""
    import deepspeed

    rank = torch.distributed.get_rank()
    net = network(form=form)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": 1.0,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 2000,
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": 2000,
            "stage3_max_live_parameters": 4000,
        },
        "bf16": {"enabled": precision == "bfloat16"},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer(net), config=config)
    torch.manual_seed(10 + rank)  # drop-path differs between ranks
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    for frames, target in batches(rank):
        engine.backward(F.mse_loss(engine(frames.to(dtype)).float(), target))
        engine.step()
    with deepspeed.zero.GatheredParameters(list(net.parameters()), enabled=stage == 3):
        found = {name: parameter.detach().float().clone() for name, parameter in net.named_parameters()}
    engine.destroy()
    return found


def train_with_ddp(*, form: str) -> dict[str, Tensor]:
    net = nn.parallel.DistributedDataParallel(network(form=form))
    adamw = optimizer(net)
    torch.manual_seed(10 + torch.distributed.get_rank())
    for frames, target in batches(torch.distributed.get_rank())[:NUM_STEPS]:
        adamw.zero_grad()
        F.mse_loss(net(frames), target).backward()
        adamw.step()
    return {name: parameter.detach() for name, parameter in net.module.named_parameters()}


def train_all(*, cases: list[list]) -> list[dict[str, Tensor]]:
    """One start of the ranks for all cases: starting takes longer than training."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else the start compiles what nothing here uses
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    return [
        train_with_ddp(form=form) if stage == "ddp" else train(stage=stage, precision=precision, form=form)
        for stage, precision, form in cases
    ]


OTHERS = [(2, "bfloat16"), (3, "bfloat16"), ("ddp", "float32")]
# Each case, and the one that it must agree with.
PAIRS = {
    **{(stage, "float32", "cut"): (0, "float32", "kept") for stage in STAGES},
    **{(stage, precision, "cut"): (stage, precision, "kept") for stage, precision in OTHERS},
    **{(stage, "float32", "stored"): (0, "float32", "kept") for stage in (2, 3)},
    **{(stage, "float32", "known"): (0, "float32", "kept") for stage in (2, 3)},
    **{("ddp", "float32", form): ("ddp", "float32", "kept") for form in ("stored", "known")},
    (3, "float32", "offloaded"): (0, "float32", "kept segments"),
}
CASES = [*PAIRS, *dict.fromkeys(PAIRS.values())]


@pytest.fixture(scope="module")
def results() -> dict[tuple, list[dict[str, Tensor]]]:
    """What every rank found, by case."""
    ranks = run_ranks(train_all, world_size=WORLD_SIZE, timeout_seconds=540, cases=CASES)
    return {case: [rank[index] for rank in ranks] for index, case in enumerate(CASES)}


@pytest.mark.parametrize("case", PAIRS, ids=str)
def test_parameters_after_training_are_those_of_whole_branches_with_all_kept(case, results) -> None:
    # Parameters in bfloat16 move in steps of up to 2**-9 of their size.
    atol = 2e-6 if case[1] == "float32" else 1e-2
    for rank in range(WORLD_SIZE):
        found, wanted = results[case][rank], results[PAIRS[case]][rank]
        assert found.keys() == wanted.keys()
        for name, want in wanted.items():
            error = float((found[name] - want).abs().max())
            assert error <= atol, f"{name}: {error:.1e} off"


def test_every_parameter_was_trained_and_ranks_agree(results) -> None:
    start = network(form="kept").state_dict()
    for ranks in results.values():
        assert all(not torch.equal(ranks[0][name], start[name]) for name in ranks[0])
        assert all(torch.equal(ranks[0][name], ranks[1][name]) for name in ranks[0])

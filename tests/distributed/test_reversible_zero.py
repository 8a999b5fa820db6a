"""A rewired network under DeepSpeed ZeRO 0 to 3 with two ranks: forgetting activations changes no parameter."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from distributed.ranks import run_ranks
from torch import Tensor, nn

from re2tal.rewire import Branch, RewiringConfig, residual_branches, rewire

WORLD_SIZE, NUM_STEPS, ACCUMULATION, CHANNELS = 2, 2, 2, 16
STAGES = (0, 1, 2, 3)

pytestmark = pytest.mark.timeout(600)  # two minutes of two idle cores; they are often not idle


class Block(nn.Module):
    """Attention and MLP, each with its scale; the scales belong to the block itself."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.qkv, self.out = nn.Linear(CHANNELS, 3 * CHANNELS, bias=False), nn.Linear(CHANNELS, CHANNELS)
        self.up, self.down = nn.Linear(CHANNELS, 2 * CHANNELS), nn.Linear(2 * CHANNELS, CHANNELS)
        self.drop = nn.Dropout(dropout)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((CHANNELS,), 0.5)) for _ in range(2))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.scale1 * self.drop(self.out(mixed))

    def transform(self, x: Tensor) -> Tensor:
        return self.scale2 * self.drop(self.down(F.gelu(self.up(self.norm2(x)))))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x)
        return x + self.transform(x)


@residual_branches.register
def _(block: Block) -> tuple[Branch, ...]:
    return (
        Branch("attention", Block.attend, through_block=True),
        Branch("mlp", Block.transform, through_block=True),
    )


class Net(nn.Module):
    """A stem, a stage that a loop walks along, a narrowing layer and a stage that is called, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(5, CHANNELS)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.stage = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), Block(), Block())
        self.head = nn.Linear(CHANNELS, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.stage(x).mean(1))


def network(*, recompute: bool, frozen_stem: bool) -> Net:
    torch.manual_seed(0)
    net = Net()
    rewire(net, config=RewiringConfig(recompute=recompute))
    net.stem.requires_grad_(not frozen_stem)
    return net


def optimizer(net: nn.Module) -> torch.optim.Optimizer:
    """AdamW, with an eps that keeps it from blowing up the rounding of gradients near zero."""
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=1e-2, eps=1e-3)


def batches(rank: int) -> Iterable[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(100 + rank)
    for _ in range(NUM_STEPS * ACCUMULATION):
        yield torch.randn(2, 6, 5, generator=generator), torch.randn(2, 4, generator=generator)


def deepspeed_config(stage: int, precision: str) -> dict:
    autocast = {"enabled": True, "dtype": "bfloat16"} if precision == "autocast" else {"enabled": False}
    return {
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
        "torch_autocast": autocast,
        "zero_allow_untested_optimizer": True,
    }


def train(*, stage: int, precision: str, recompute: bool, frozen_stem: bool) -> dict[str, Tensor]:
    """All parameters after NUM_STEPS steps, and the losses, which differ between ranks."""
    import deepspeed

    rank = torch.distributed.get_rank()
    net = network(recompute=recompute, frozen_stem=frozen_stem)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer(net), config=deepspeed_config(stage, precision))
    torch.manual_seed(10 + rank)  # dropout differs between ranks
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    losses = []
    for x, target in batches(rank):
        loss = F.mse_loss(engine(x.to(dtype)).float(), target)
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    with deepspeed.zero.GatheredParameters(list(net.parameters()), enabled=stage == 3):
        found = {name: parameter.detach().float().clone() for name, parameter in net.named_parameters()}
    engine.destroy()
    return found | {"losses": torch.stack(losses), "next draw": torch.rand(2)}


def train_all(*, cases: list[dict]) -> list[dict]:
    """One start of the ranks for all cases: starting takes longer than training."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else the start compiles what nothing here uses
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    return [train(**case) for case in cases]


def assert_parameters_equal(found: dict[str, Tensor], wanted: dict[str, Tensor], *, atol: float) -> None:
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        assert (found[name] - want).abs().max() <= atol, f"{name}: {(found[name] - want).abs().max():.1e} off"


def cases() -> Iterable[dict]:
    """Every stage in float32; narrow numbers, and a frozen stem, where gradients are partitioned."""
    for stage, recompute in product(STAGES, (True, False)):
        yield {"stage": stage, "precision": "float32", "recompute": recompute, "frozen_stem": False}
    for stage, recompute in product((2, 3), (True, False)):
        yield {"stage": stage, "precision": "float32", "recompute": recompute, "frozen_stem": True}
        yield {"stage": stage, "precision": "bfloat16", "recompute": recompute, "frozen_stem": False}
        yield {"stage": stage, "precision": "autocast", "recompute": recompute, "frozen_stem": False}


CASES = list(cases())


@pytest.fixture(scope="module")
def results() -> dict[tuple, list[dict]]:
    """What every rank found, by case."""
    ranks = run_ranks(train_all, world_size=WORLD_SIZE, timeout_seconds=540, cases=CASES)
    return {tuple(case.values()): [rank[index] for rank in ranks] for index, case in enumerate(CASES)}


@pytest.mark.parametrize("case", [case for case in CASES if case["recompute"]], ids=lambda case: str([*case.values()]))
def test_parameters_after_training_are_those_of_plain_autograd(case, results) -> None:
    """Under bfloat16 to the last bit, losses and draws included: that is what the grid is for."""
    forgotten = results[tuple(case.values())]
    kept = results[tuple({**case, "recompute": False}.values())]
    for rank in range(WORLD_SIZE):
        assert_parameters_equal(forgotten[rank], kept[rank], atol=1e-6 if case["precision"] == "float32" else 0)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_every_zero_stage_gives_the_same_parameters(stage, results) -> None:
    plain = results[(0, "float32", False, False)]
    partitioned = results[(stage, "float32", True, False)]
    assert_parameters_equal(partitioned[0], plain[0], atol=1e-6)


def test_every_parameter_was_trained(results) -> None:
    start = network(recompute=True, frozen_stem=False).state_dict()
    for (_, _, _, frozen), ranks in results.items():
        moved = {name for name, value in start.items() if not torch.equal(ranks[0][name], value)}
        assert moved == {name for name in start if not (frozen and name.startswith("stem"))}


def test_ranks_agree_on_parameters_and_differ_in_their_data(results) -> None:
    for first, second in results.values():
        assert not torch.equal(first["losses"], second["losses"])
        assert all(torch.equal(first[name], second[name]) for name in first.keys() - {"losses", "next draw"})


def train_with_ddp() -> list[dict[str, Tensor]]:
    """All parameters, with and without forgetting activations."""
    torch.distributed.init_process_group("gloo")
    rank, found = torch.distributed.get_rank(), []
    for recompute in (True, False):
        net = nn.parallel.DistributedDataParallel(network(recompute=recompute, frozen_stem=False))
        adamw = optimizer(net)
        torch.manual_seed(10 + rank)
        for x, target in batches(rank):
            adamw.zero_grad()
            F.mse_loss(net(x), target).backward()
            adamw.step()
        found.append({name: parameter.detach() for name, parameter in net.module.named_parameters()})
    torch.distributed.destroy_process_group()
    return found


def test_under_torch_ddp_parameters_are_those_of_plain_autograd() -> None:
    for forgotten, kept in run_ranks(train_with_ddp, world_size=WORLD_SIZE):
        assert_parameters_equal(forgotten, kept, atol=1e-6)

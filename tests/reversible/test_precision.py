"""Narrow numbers: float32 states, the grid that makes rebuilding exact, and autocast replayed in backward."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from reversible.networks import CHANNELS, assert_close, assert_same_bits, chain, coupled, gradients, states
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from re2tal.reversible import run_reversibly
from re2tal.reversible.coupling import Coupling
from re2tal.reversible.precision import GRID_STEP, StateFormat


def autocast(run, dtype=torch.bfloat16):
    """`run` inside an autocast region; its backward is called outside."""

    def inside(x):
        with torch.autocast("cpu", dtype):
            return run(x)

    return inside


def on_grid(values: Tensor) -> Tensor:
    """Rounded by another route than the engine's; straight through for gradients."""
    values = values.float()
    return values + (torch.round(values / GRID_STEP) * GRID_STEP - values).detach()


@pytest.mark.parametrize("merge", ["mean", "extrapolate"])
@pytest.mark.parametrize("kind", ["transformer", "conv"])
@pytest.mark.parametrize("length", [1, 2, 3, 8, 48])
def test_under_bfloat16_gradients_are_the_bits_of_the_quantised_network(kind, length, merge) -> None:
    branches, x = chain(kind, length, dropout=0.2), states()

    def quantised(x):
        return coupled([lambda s, f=f: on_grid(f(s)) for f in branches], on_grid(x), merge=merge)

    wanted = gradients(autocast(quantised), x, branches)
    for recompute in (True, False):
        run = partial(run_reversibly, branches, merge=merge, recompute=recompute, owner=branches)
        assert_same_bits(gradients(autocast(run), x, branches), wanted)


def test_without_the_grid_errors_compound_in_deep_runs_under_bfloat16() -> None:
    """Why the grid is the default: float32 states alone do not rebuild what bfloat16 branches saw."""
    branches = chain("transformer", 48)
    x = torch.randn(64, 32, CHANNELS, generator=torch.Generator().manual_seed(0))

    def error(grid) -> float:
        kept, forgotten = (
            gradients(autocast(partial(run_reversibly, branches, grid=grid, recompute=recompute)), x, branches)
            for recompute in (False, True)
        )
        first = "0.qkv.weight"
        return float((kept[first] - forgotten[first]).norm() / kept[first].norm())

    assert error("auto") == 0
    # A thousand times float32's rounding. How much more depends on the processor's kernels: 6e-4, or above 1e-3.
    assert error(None) > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_narrow_numbers(dtype) -> None:
    """As under DeepSpeed's bf16 and fp16: branches get what the parameters are, states stay float32."""
    branches, x = chain("transformer", 12, dropout=0.2).to(dtype), states().to(dtype)
    kept, forgotten = (
        gradients(partial(run_reversibly, branches, recompute=recompute, owner=branches), x, branches)
        for recompute in (False, True)
    )
    assert forgotten["output"].dtype == forgotten["x"].dtype == dtype
    assert_same_bits(forgotten, kept)


def test_states_stay_float32_where_autocast_hands_in_narrow_ones() -> None:
    """A linear layer before a stage returns bfloat16 under autocast."""
    seen = []
    branches = [lambda x: seen.append(x.dtype) or x.bfloat16() for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        output = run_reversibly(branches, states().bfloat16())
    assert output.dtype == torch.float32
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("cache", [False, True])
def test_autocast_is_replayed_wherever_backward_is_called(outside, cache) -> None:
    branches, x = chain("transformer", 3), states()

    def grads(recompute: bool) -> list[Tensor]:
        branches.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            loss = run_reversibly(branches, x, recompute=recompute).square().sum()
            if not outside:
                loss.backward()
        if outside:
            loss.backward()
        return [parameter.grad for parameter in branches.parameters()]

    assert all(torch.equal(one, other) for one, other in zip(grads(True), grads(False), strict=True))


def test_a_branch_used_twice_under_autocast() -> None:
    """Autocast's cache of weights would hand the second use the graph of the first, which is gone by then.

    Without that cache the two gradients of a weight are added in float32 instead of bfloat16.
    """
    (mlp,) = chain("mlp", 1)
    kept, forgotten = (
        gradients(autocast(partial(run_reversibly, [mlp, mlp], recompute=recompute)), states(), mlp)
        for recompute in (False, True)
    )
    assert_close(forgotten, kept, relative=2e-2)


@pytest.mark.parametrize(
    ("x", "grid", "wanted"),
    [
        (
            torch.float32,
            "auto",
            StateFormat(torch.float32, torch.float32, torch.float32, None, torch.float32, torch.float32, False),
        ),
        (
            torch.float64,
            "auto",
            StateFormat(torch.float64, torch.float64, torch.float64, None, torch.float64, torch.float64, False),
        ),
        (
            torch.bfloat16,
            "auto",
            StateFormat(torch.float32, torch.bfloat16, torch.bfloat16, 2**-14, torch.bfloat16, torch.float32, True),
        ),
        (
            torch.float16,
            None,
            StateFormat(torch.float32, torch.float16, torch.float16, None, torch.float16, torch.float32, True),
        ),
        (
            torch.float32,
            2**-10,
            StateFormat(torch.float32, torch.float32, torch.float32, 2**-10, torch.float32, torch.float32, False),
        ),
    ],
)
def test_numbers_of_a_run(x, grid, wanted) -> None:
    assert StateFormat.of(torch.ones(1, dtype=x), grid) == wanted


def test_states_of_branches_with_kinks_are_on_a_finer_grid_in_float32_alone() -> None:
    def grid(dtype: torch.dtype, **options) -> float | None:
        return StateFormat.of(torch.ones(1, dtype=dtype), "auto", kinks=True, **options).grid

    assert (grid(torch.float32), grid(torch.float64), grid(torch.bfloat16)) == (2**-18, None, 2**-14)
    assert grid(torch.float32, states="int32") == 2**-16
    assert grid(torch.float32, coupling=Coupling(0.5, 0.5)) is None
    assert StateFormat.of(torch.ones(1), None, kinks=True).grid is None


def test_where_errors_jump_a_coupling_that_divides_has_no_room_for_them() -> None:
    half = Coupling(0.5, 0.5)
    rooms = {
        (dtype, kinks): StateFormat.of(torch.ones(1, dtype=dtype), "auto", half, kinks=kinks).room
        for dtype in (torch.float32, torch.float64, torch.bfloat16)
        for kinks in (False, True)
    }
    assert [key for key, room in rooms.items() if room == 0] == [
        (torch.float32, True),
        (torch.bfloat16, False),
        (torch.bfloat16, True),
    ]


def test_numbers_of_a_run_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        wanted = StateFormat(torch.float32, torch.float32, torch.float32, 2**-14, torch.bfloat16, torch.float32, True)
        assert StateFormat.of(torch.ones(1), "auto") == wanted
        assert StateFormat.of(torch.ones(1, dtype=torch.bfloat16), "auto") == wanted
        assert StateFormat.of(torch.ones(1, dtype=torch.float64), "auto").grid is None


def test_rounding_goes_to_the_nearest_multiple_and_ties_to_even() -> None:
    precision = StateFormat.of(torch.ones(1), 0.25)
    values = torch.tensor([0.0, 0.124, 0.125, 0.126, 0.375, -0.125, -0.3, 7.26])
    assert precision.round(values).tolist() == [0.0, 0.0, 0.0, 0.25, 0.5, -0.0, -0.25, 7.25]


def test_rounding_keeps_sums_exact_up_to_the_bounds_that_are_promised() -> None:
    generator = torch.Generator().manual_seed(0)
    precision = StateFormat.of(torch.ones(1), GRID_STEP)
    state = torch.zeros(10_000)
    for _ in range(4):
        update = precision.round(torch.rand(10_000, generator=generator) * 511 - 255.5)
        assert torch.equal(update.double() / GRID_STEP, (update.double() / GRID_STEP).round())
        assert torch.equal((state + update) - update, state)
        state += update
    assert state.abs().max() > 500


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_numbers_beyond_the_bound_lie_on_the_grid_by_themselves(dtype) -> None:
    values = torch.linspace(256, 60_000, 10_000).to(dtype)
    precision = StateFormat.of(values, GRID_STEP)
    for signed in (values, -values):
        assert torch.equal(precision.round(signed), signed.float())


@pytest.mark.parametrize("grid", [0, -1.0, float("nan"), 1, 14, float("inf")])
def test_a_grid_without_a_step_or_with_one_that_leaves_nothing_of_branches_is_refused(grid) -> None:
    with pytest.raises(ValueError, match=r"grid is .*; give a positive step below 1 such as 2\*\*-14"):
        run_reversibly([nn.Identity()], states(), grid=grid)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["transformer", "mlp", "conv"])
def test_kernels_of_a_device_repeat_bit_for_bit(kind) -> None:
    branches, x = chain(kind, 24, dropout=0.2).cuda(), states().cuda()

    def grads(recompute: bool) -> list[Tensor]:
        torch.cuda.manual_seed(0)
        branches.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            output = run_reversibly(branches, x, recompute=recompute, owner=branches)
        output.square().sum().backward()
        return [parameter.grad for parameter in branches.parameters()]

    assert all(torch.equal(one, other) for one, other in zip(grads(True), grads(False), strict=True))


def test_convolutions_are_not_chosen_by_what_was_fastest_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    class Convolution(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.backends.cudnn.benchmark)
            return super().forward(x)

    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    branches = nn.ModuleList([Convolution(4, 4, 3, padding=1)])
    run_reversibly(branches, torch.randn(2, 4, 8)).sum().backward()
    assert len(seen) > 1
    assert not any(seen)
    assert torch.backends.cudnn.benchmark


class FastInEvaluation(nn.Module):
    """torch's own attention; in evaluation mode, where no gradient is wanted, it has another kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(CHANNELS)
        self.attention = nn.MultiheadAttention(CHANNELS, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        return self.attention(normed, normed, normed, need_weights=False)[0]


def test_kernels_are_not_chosen_by_whether_a_gradient_is_wanted() -> None:
    torch.manual_seed(0)
    branches = nn.ModuleList(FastInEvaluation() for _ in range(6)).eval()
    with torch.no_grad():
        fast = branches[0](states())
    assert not torch.equal(fast, branches[0](states())), "this layer shows nothing: both its paths give the same bits"
    kept, rebuilt = (
        gradients(lambda x, on=on: run_reversibly(branches, x, recompute=on), states(), branches)
        for on in (False, True)
    )
    assert torch.equal(rebuilt["output"], kept["output"])  # forward: without gradients, and with them
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled()


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("saved", [0, 2])
def test_attention_is_replayed_by_a_kernel_that_forward_could_choose(saved) -> None:
    """`with sdpa_kernel(..): loss = model(x)`, and backward behind it."""
    torch.manual_seed(0)
    branches = nn.ModuleList(Attending() for _ in range(4))

    def plain(x: Tensor, *, recompute: bool) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return run_reversibly(branches, x, recompute=recompute, saved_attention=saved)

    kept, rebuilt = (gradients(autocast(partial(plain, recompute=on)), states(), branches) for on in (False, True))
    assert_same_bits(rebuilt, kept)
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.mem_efficient_sdp_enabled()


@pytest.mark.parametrize(("products", "grid"), [("highest", None), ("high", GRID_STEP), ("medium", GRID_STEP)])
def test_float32_whose_products_round_their_factors_has_the_grid_of_narrow_numbers(products, grid) -> None:
    """TF32 has ten bits, as float16 has."""
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(products)
    try:
        assert StateFormat.of(states(), "auto").grid == grid
        assert StateFormat.of(states(dtype=torch.float64), "auto").grid is None
    finally:
        torch.set_float32_matmul_precision(usual)


@pytest.fixture
def default_flags():
    """Puts back PyTorch's defaults: of the older interface first, because the two do not notice each other."""
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, False
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.rnn.fp32_precision = "tf32"
    torch.backends.cuda.matmul.fp32_precision = "none"


@pytest.mark.parametrize(
    ("convolutions", "products", "grid"),
    [
        (None, None, GRID_STEP),  # PyTorch's defaults
        ("ieee", None, None),
        ("ieee", "ieee", None),
        ("ieee", "tf32", GRID_STEP),
        ("tf32", "ieee", GRID_STEP),
        (False, None, None),
        (False, True, GRID_STEP),
        (True, False, GRID_STEP),
    ],
)
def test_on_cuda_float32_is_narrow_where_convolutions_or_products_may_use_tf32(
    convolutions, products, grid, default_flags
) -> None:
    """By PyTorch's newer flags, which are words, and the older ones, which are yes or no."""
    for flag, older, value in (
        (torch.backends.cudnn.conv, torch.backends.cudnn, convolutions),
        (torch.backends.cuda.matmul, torch.backends.cuda.matmul, products),
    ):
        if isinstance(value, bool):
            older.allow_tf32 = value
        elif value is not None:
            flag.fp32_precision = value
    with FakeTensorMode():
        on_cuda = {dtype: torch.ones(1, dtype=dtype, device="cuda") for dtype in (torch.float32, torch.float64)}
    assert StateFormat.of(on_cuda[torch.float32], "auto").grid == grid
    assert StateFormat.of(on_cuda[torch.float64], "auto").grid is None
    assert StateFormat.of(torch.ones(1), "auto").grid is None


@pytest.mark.parametrize(
    ("x", "dense"),
    [
        (torch.ones(2, 3, 4), True),
        (torch.ones(2, 4, 3).transpose(1, 2), False),
        (torch.ones(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d), True),
        (torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last), True),
        (torch.ones(2, 3, 4, 5, 6)[:, :, 1:], False),
    ],
)
def test_a_state_is_dense_where_a_runs_input_is_not(x, dense) -> None:
    state = StateFormat.of(x, None).state(x)
    assert (state is x) == dense
    assert torch.equal(state, x)
    assert dense or state.is_contiguous()

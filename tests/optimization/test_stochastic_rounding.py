"""bf16 weights that are rounded at random: right in the mean, repeatable, and as good as fp32 for small steps."""

import pytest
import torch

from optimization.stochastic_rounding import StochasticAdamW, round_into

SETTINGS = {"betas": (0.9, 0.999), "weight_decay": 0.01, "eps": 1e-8}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rounded(values: torch.Tensor, seed: int = 0) -> torch.Tensor:
    target = torch.empty_like(values, dtype=torch.bfloat16)
    round_into([target], [values], generator(seed))
    return target


@pytest.mark.parametrize("value", [1 + 1e-4, -1 - 1e-4, 3.3e-5, -7.77, 1e30])
def test_values_are_rounded_up_or_down_and_right_in_the_mean(value):
    found = rounded(torch.full((200_000,), value)).double()
    assert len(found.unique()) == 2
    step = found.max() - found.min()
    assert found.min() < value < found.max() and step <= abs(value) / 128
    assert found.mean().item() == pytest.approx(value, abs=0.01 * step.item())


def test_what_bf16_can_hold_stays_as_it_is():
    values = torch.randn(10_000, generator=generator()).bfloat16()
    values[:3] = torch.tensor([0.0, float("inf"), -float("inf")])
    assert torch.equal(rounded(values.float()), values)
    assert rounded(torch.tensor([float("nan")])).isnan().all()


def test_several_tensors_of_any_layout_each_get_their_own_values():
    values = [torch.arange(24.0).view(2, 3, 2, 2), torch.arange(5.0)]
    targets = [
        torch.zeros(2, 3, 2, 2, dtype=torch.bfloat16).to(memory_format=torch.channels_last),
        torch.zeros(5, dtype=torch.bfloat16),
    ]
    round_into(targets, values, generator())
    assert all(torch.equal(target.float(), value) for target, value in zip(targets, values, strict=True))


def test_without_a_generator_the_nearest_is_taken():
    values = torch.randn(1000, generator=generator())
    target = torch.empty(1000, dtype=torch.bfloat16)
    round_into([target], [values], None)
    assert torch.equal(target, values.bfloat16())


# --- AdamW ----------------------------------------------------------------------------------------------------------


def gradients(step: int, weight: torch.Tensor) -> torch.Tensor:
    return torch.randn(weight.shape, generator=generator(step)) + 0.5


def stepped(weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer, steps: range) -> torch.Tensor:
    for step in steps:
        weight.grad = gradients(step, weight).to(weight.dtype)
        optimizer.step()
    return weight.detach().float()


def test_many_small_steps_move_bf16_weights_as_far_as_fp32_ones():
    start = torch.ones(40, 50)
    full, half = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.bfloat16())
    there = stepped(full, torch.optim.AdamW([full], lr=1e-4, **SETTINGS), range(300))
    here = stepped(half, StochasticAdamW([half], lr=1e-4, **SETTINGS), range(300))
    assert half.dtype == torch.bfloat16
    assert (1 - here).mean().item() == pytest.approx((1 - there).mean().item(), rel=0.03)
    assert (1 - there).mean() > 0.01  # to the nearest they would not have moved at all: 1 - 1e-4 is 1


def test_both_averages_follow_fp32s_in_the_mean():
    full, half = (torch.nn.Parameter(torch.zeros(40, 50, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
    reference, ours = (
        torch.optim.AdamW([full], lr=1e-4, **SETTINGS),
        StochasticAdamW([half], lr=1e-4, **SETTINGS),
    )
    stepped(full, reference, range(500))
    stepped(half, ours, range(500))
    for name in ("exp_avg", "exp_avg_sq"):
        mean = ours.state[half][name].float().mean().item()
        assert mean == pytest.approx(reference.state[full][name].mean().item(), rel=0.01)


def test_the_same_seed_gives_the_same_bits_and_another_gives_others():
    def trained(seed: int) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
        return stepped(weight, StochasticAdamW([weight], lr=1e-3, seed=seed, **SETTINGS), range(5))

    assert torch.equal(trained(1), trained(1)) and not torch.equal(trained(1), trained(2))


def test_a_skipped_step_changes_neither_weights_nor_averages():
    weight = torch.nn.Parameter(torch.ones(100, dtype=torch.bfloat16))
    optimizer = StochasticAdamW([weight], lr=1e-3, **SETTINGS)
    stepped(weight, optimizer, range(3))
    before = [tensor.clone() for tensor in (weight.detach(), *optimizer.state[weight].values())]
    optimizer.found_inf = torch.ones(())
    weight.grad = torch.full_like(weight, float("nan"))
    optimizer.step()
    after = [weight.detach(), *optimizer.state[weight].values()]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))

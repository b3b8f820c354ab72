"""Adafactor: transformers' own on matrices and vectors, a small state for kernels, fp32 state for bf16 weights."""

import pytest
import torch
import transformers

from optimization.adafactor import Adafactor
from optimization.optimizers import load_optimizer_state

SHAPES = [(6, 5), (7,), (8, 4)]


def parameters(shapes, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def step(optimizer: torch.optim.Optimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for parameter in optimizer.param_groups[0]["params"]:
        gradient = torch.randn(parameter.shape, generator=generator) * 10 ** torch.randn((), generator=generator)
        parameter.grad = gradient.to(parameter.dtype)
    optimizer.step()


def tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    weights = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    return weights + [tensor.clone() for state in optimizer.state.values() for tensor in state.values()]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_matrices_and_vectors_are_changed_as_transformers_does_it(weight_decay):
    ours = Adafactor(parameters(SHAPES), lr=1e-2, weight_decay=weight_decay)
    theirs = transformers.Adafactor(
        parameters(SHAPES), lr=1e-2, weight_decay=weight_decay, scale_parameter=False, relative_step=False
    )
    for number in range(20):
        step(ours, number)
        step(theirs, number)
    pairs = zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True)
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in pairs)


def test_a_kernel_is_changed_as_the_matrix_it_is_and_its_state_is_small():
    kernel, matrix = parameters([(6, 4, 3, 3)])[0], parameters([(6, 36)])[0]
    assert torch.equal(kernel.flatten(1), matrix)
    with_kernel, with_matrix = (Adafactor([p], lr=1e-2, weight_decay=0) for p in (kernel, matrix))
    for number in range(5):
        step(with_kernel, number)
        step(with_matrix, number)
    assert torch.allclose(kernel.flatten(1), matrix, atol=1e-6)
    assert sum(tensor.numel() for tensor in with_kernel.state[kernel].values()) == 6 + 36


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_goes_on_from_its_saved_state_to_the_bit(dtype):
    shapes = [*SHAPES, (6, 4, 3, 3)]
    whole, first = (Adafactor(parameters(shapes, dtype), lr=1e-2, weight_decay=0.01, seed=3) for _ in range(2))
    for number in range(12):
        step(whole, number)
    for number in range(6):
        step(first, number)
    second = Adafactor([torch.nn.Parameter(p.detach()) for p in first.param_groups[0]["params"]], 1e-2, 0.01, seed=3)
    load_optimizer_state(second, first.state_dict())
    for number in range(6, 12):
        step(second, number)
    assert all(torch.equal(*pair) for pair in zip(tensors(whole), tensors(second), strict=True))
    assert all(tensor.dtype == torch.float32 for state in second.state.values() for tensor in state.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("after", [0, 3])
def test_a_skipped_step_changes_neither_weights_nor_state(after, dtype):
    optimizer = Adafactor(parameters([*SHAPES, (6, 4, 3, 3)], dtype), lr=1e-2, weight_decay=0.01)
    optimizer.found_inf = torch.zeros(())
    for number in range(after):
        step(optimizer, number)
    before = tensors(optimizer)
    optimizer.found_inf = torch.ones(())
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step()
    skipped = tensors(optimizer)
    assert all(torch.equal(*pair) for pair in zip(before, skipped[: len(before)], strict=True))
    assert not any(tensor.any() for tensor in skipped[len(before) :])  # a new state is still zeros
    optimizer.found_inf = torch.zeros(())
    step(optimizer, 9)
    assert all(tensor.isfinite().all() for tensor in tensors(optimizer))


def test_the_fp16_scaler_skips_a_step_that_overflows_and_takes_the_next():
    [weight] = parameters([(6, 5)])
    before, optimizer = weight.detach().clone(), Adafactor([weight], lr=1e-2, weight_decay=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor, moves in ((float("inf"), False), (1.0, True)):
        optimizer.zero_grad()
        scaler.scale((weight * factor).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(weight, before) is not moves
    assert scaler.get_scale() == 2.0 and weight.isfinite().all()

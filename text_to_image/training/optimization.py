"""The optimizer, and the learning rate at each step."""

import argparse
import functools
from collections.abc import Callable, Sequence

import torch
from diffusers.optimization import get_scheduler

from runtime.errors import UserError


def find_optimizer_class(use_8bit_adam: bool) -> Callable[..., torch.optim.Optimizer]:
    """AdamW, or bitsandbytes' with its state in 8 bits; UserError where that is not installed."""
    if not use_8bit_adam:
        return functools.partial(torch.optim.AdamW, fused=True)  # one kernel over all tensors
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError("--use_8bit_adam needs bitsandbytes: `pip install bitsandbytes`") from None
    return AdamW8bit


def make_optimizer(args: argparse.Namespace, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return find_optimizer_class(args.use_8bit_adam)(
        parameters,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Loads the state, and gives Adam's averages the memory layout of their weights, in which the fused AdamW reads
    them: a checkpoint may come from a device with another layout."""
    optimizer.load_state_dict(state)
    for parameter, own in optimizer.state.items():
        for name in own.keys() & {"exp_avg", "exp_avg_sq"}:  # AdamW's; other optimizers' state is left as it is
            if own[name].stride() != parameter.stride():
                own[name] = torch.empty_like(parameter).copy_(own[name])


def learning_rate_schedule(name: str, learning_rate: float, warmup: int, steps: int) -> Callable[[int], float]:
    """The rate as a function of the step (from 0), so that a resumed run needs no schedule state.

    The shape is diffusers' `get_scheduler`; only its factor is asked for, since a scheduler that accelerate has
    prepared steps once per process.
    """
    never_stepped = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=learning_rate)
    try:
        factor = get_scheduler(name, never_stepped, num_warmup_steps=warmup, num_training_steps=steps).lr_lambdas[0]
    except ValueError as error:  # polynomial ends at 1e-7 and must begin above it
        raise UserError(f"--lr_scheduler {name} with --learning_rate {learning_rate:g}: {error}") from None
    return lambda step: learning_rate * factor(step)

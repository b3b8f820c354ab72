"""The learning rate at each step."""

from collections.abc import Callable

import torch
from diffusers.optimization import get_scheduler

from runtime.errors import UserError


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

"""How many optimisation steps a run takes, and the learning rate at each."""

import math
from collections.abc import Callable

import torch
from diffusers.optimization import get_scheduler

from runtime.errors import UserError


def total_steps(pictures: int, repeats: int, epochs: int, global_batch: int, max_train_steps: int | None) -> int:
    """Steps of a run: enough that every picture is seen `epochs * repeats` times, the last batch filled up.

    Batches flow over the border between epochs, so a data set smaller than the batch still trains with whole batches.
    `max_train_steps` overrides the epochs, as in diffusers' script.
    """
    return max_train_steps or math.ceil(epochs * repeats * pictures / global_batch)


def warmup_steps(asked: int | None, steps: int) -> int:
    """`asked`, else a twentieth of the run and at most 500: a run of 75 steps must not spend them all warming up."""
    return min(500, steps // 20) if asked is None else asked


def learning_rate_schedule(name: str, learning_rate: float, warmup: int, steps: int) -> Callable[[int], float]:
    """The rate as a function of the step (from 0), so that a resumed run needs no schedule state.

    The shape is diffusers' `get_scheduler`; it is asked for its factor and never stepped, because a scheduler that
    accelerate has prepared steps once per process.
    """
    never_stepped = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=learning_rate)
    try:
        factor = get_scheduler(name, never_stepped, num_warmup_steps=warmup, num_training_steps=steps).lr_lambdas[0]
    except ValueError as error:  # polynomial ends at 1e-7 and wants to begin above it
        raise UserError(f"--lr_scheduler {name} with --learning_rate {learning_rate:g}: {error}") from None
    return lambda step: learning_rate * factor(step)

"""Losses and gradients that are no numbers: found before the weights are touched, skipped, and counted."""

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator

from errors import WorkError, harmless


class BadSteps:
    """Judges every step of a run by its loss and its gradient's norm, the same on all processes."""

    def __init__(self, accelerator: Accelerator, limit: int, pictures_of: Callable[[int], Sequence[str]]):
        self.accelerator, self.limit, self.pictures_of = accelerator, limit, pictures_of
        self.in_a_row = 0

    def is_good(self, step: int, loss: torch.Tensor, norm: torch.Tensor) -> bool:
        """Whether optimisation step `step` (from 0) may change the weights; what is wrong is told otherwise.

        Raises WorkError after `limit` bad ones in a row. With fp16 a norm that overflowed is the scaler's business.
        """
        counted = [loss] if self.accelerator.scaler else [loss, norm]
        if torch.stack(counted).isfinite().all().item():
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        said = f"step {step + 1}: the loss is {loss.item():g}, the gradient's norm {norm.item():g}"
        pictures = ", ".join(dict.fromkeys(self.pictures_of(step)))
        if self.in_a_row >= self.limit:
            raise WorkError(
                f"{said}, of {pictures}: bad steps, {self.in_a_row} of them in a row (--max_bad_steps); the weights "
                "are those before them. A lower --learning_rate or --mixed_precision no may help; the last checkpoint "
                "is good"
            )
        self.accelerator.print(harmless(f"{said}: skipped; its pictures: {pictures}"), flush=True)
        return False

"""Losses and gradients that are no numbers: found before the weights are touched, skipped, and counted."""

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator

from errors import WorkError, harmless

OVERFLOWS = 50  # in a row that the fp16 scaler may need to find its scale; it begins some 20 halvings too high


class BadSteps:
    """Judges every step of a run by its loss and its gradient's norm, the same on all processes."""

    def __init__(self, accelerator: Accelerator, limit: int, pictures_of: Callable[[int], Sequence[str]]):
        self.accelerator, self.limit, self.pictures_of = accelerator, limit, pictures_of
        self.in_a_row = self.overflows = 0

    @property
    def skipped(self) -> bool:
        """Whether the last step was."""
        return self.in_a_row > 0

    def is_good(self, step: int, loss: torch.Tensor, norm: torch.Tensor) -> bool:
        """Whether optimisation step `step` (from 0) may change the weights; what is wrong is told otherwise.

        Raises WorkError after `limit` bad ones in a row. With fp16 a norm that overflowed is the scaler's business,
        until it has found no scale for very long.
        """
        finite_loss, finite_norm = torch.stack([loss, norm]).isfinite().tolist()
        self.overflows = self.overflows + 1 if self.accelerator.scaler and not finite_norm else 0
        if finite_loss and (finite_norm or 0 < self.overflows < OVERFLOWS):
            self.in_a_row = 0
            return True
        self.in_a_row += 1
        said = f"step {step + 1}: the loss is {loss.item():g}, the gradient's norm {norm.item():g}"
        pictures = ", ".join(dict.fromkeys(self.pictures_of(step)))
        if self.in_a_row >= self.limit:
            raise WorkError(
                f"{said}, of {pictures}: bad steps, {self.in_a_row} of them in a row (--max_bad_steps). The weights "
                "were not touched by them; a lower --learning_rate or --mixed_precision no may help, and the run goes "
                "on from its last checkpoint, where there is one"
            )
        self.accelerator.print(harmless(f"{said}: skipped; its pictures: {pictures}"), flush=True)
        return False

    def skip(self, optimizer: torch.optim.Optimizer) -> None:
        """The weights stay; the fp16 scaler, which steps no optimiser when it sees such gradients, learns of them."""
        if self.accelerator.scaler:
            optimizer.step()

"""Losses and gradients that are no numbers: they change no weights, are skipped, named and counted."""

import math
from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator

from runtime.errors import WorkError, escape_control_chars

OVERFLOWS = 50  # in a row that the fp16 scaler may need to find its scale; it begins some 20 halvings too high


class NonFiniteSteps:
    """Judges every step of a run by its loss and its gradient's norm, the same on all processes."""

    def __init__(self, accelerator: Accelerator, limit: int, pictures_of: Callable[[int], Sequence[str]]):
        self.accelerator, self.limit, self.pictures_of = accelerator, limit, pictures_of
        self.in_a_row = self.overflows = 0

    def guard(self, optimizer, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Keeps a bad step's gradients from the weights: what follows changes nothing if loss or norm is no number.

        The fused optimiser learns of it on the device, as from the fp16 scaler (which has seen it itself), so that
        nothing waits for the GPU. Another one is left without gradients, which takes reading one value.
        """
        if self.accelerator.scaler:
            return
        bad = ~(loss + norm).isfinite()
        if optimizer.optimizer.defaults.get("fused"):
            optimizer.optimizer.found_inf = bad.float()
        elif bad:
            optimizer.zero_grad()

    def is_bad(self, step: int, loss: float, norm: float) -> bool:
        """Whether optimisation step `step` (from 1) was skipped; says why. Asked of every step, in order.

        Raises WorkError after `limit` bad ones in a row. With fp16 a norm that overflowed is the scaler's business,
        until it has found no scale for very long.
        """
        overflowed = self.accelerator.scaler and not math.isfinite(norm)
        self.overflows = self.overflows + 1 if overflowed else 0
        if math.isfinite(loss) and (math.isfinite(norm) or 0 < self.overflows < OVERFLOWS):
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        said = f"step {step}: the loss is {loss:g}, the gradient's norm {norm:g}"
        pictures = ", ".join(dict.fromkeys(self.pictures_of(step - 1)))
        if self.in_a_row >= self.limit:
            raise WorkError(
                f"{said}, of {pictures}: bad steps, {self.in_a_row} of them in a row (--max_bad_steps). The weights "
                "were not touched by them; a lower --learning_rate or --mixed_precision no may help, and the run goes "
                "on from its last checkpoint, where there is one"
            )
        self.accelerator.print(escape_control_chars(f"{said}: skipped; its pictures: {pictures}"), flush=True)
        return True

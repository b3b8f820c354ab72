"""Steps whose loss or gradient is non-finite: named, counted, and too many in a row end the run.

Their gradients never reach the weights: `training.state.TrainState` sees to that on the device.
"""

import math
from collections.abc import Callable, Sequence

from accelerate import Accelerator

from runtime.errors import WorkError, escape_control_chars
from training.metrics import MetricsRow

MAX_SCALER_OVERFLOWS = (
    50  # in a row that the fp16 scaler may need to find its scale; it begins some 20 halvings too high
)


class NonFiniteSteps:
    """Counts the steps whose loss or gradient norm is non-finite; both are the same on all processes.

    `limit` is how many in a row end the run; `pictures_of` names the pictures of a step (from 0).
    """

    def __init__(self, accelerator: Accelerator, limit: int, pictures_of: Callable[[int], Sequence[str]]):
        self.accelerator, self.limit, self.pictures_of = accelerator, limit, pictures_of
        self.in_a_row = self.overflows = 0

    def mark_or_raise(self, row: MetricsRow) -> None:
        """Marks the row of a skipped step and says why. Every step is to be checked, in order.

        Raises WorkError after `limit` non-finite steps in a row. With fp16 an overflowing norm is normal while the
        scaler adapts; after 50 in a row it counts as well.
        """
        if not self._is_non_finite(row.train_loss, row.grad_norm):
            self.in_a_row = 0
            return
        row.skipped = True
        self.in_a_row += 1
        found = f"step {row.step}: the loss is {row.train_loss:g}, the gradient's norm {row.grad_norm:g}"
        pictures = ", ".join(dict.fromkeys(self.pictures_of(row.step - 1)))
        if self.in_a_row >= self.limit:
            raise WorkError(
                f"{found}, of {pictures}: non-finite, {self.in_a_row} of them in a row (--max_bad_steps). They did "
                "not change the weights; a lower --learning_rate or --mixed_precision no may help, and the run goes "
                "on from its last checkpoint, where there is one"
            )
        self.accelerator.print(escape_control_chars(f"{found}: skipped; its pictures: {pictures}"), flush=True)

    def _is_non_finite(self, loss: float, norm: float) -> bool:
        overflowed = self.accelerator.scaler and not math.isfinite(norm)
        self.overflows = self.overflows + 1 if overflowed else 0
        return not (math.isfinite(loss) and (math.isfinite(norm) or 0 < self.overflows < MAX_SCALER_OVERFLOWS))

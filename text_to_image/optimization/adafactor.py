"""Adafactor (arXiv:1804.04235): of the squared gradients only the mean of each row and column is kept.

As `transformers.Adafactor` with scale_parameter=False and relative_step=False, but for two things. A convolution's
kernel (out, in, h, w) is factored as a matrix of out x (in * h * w): over its last two dimensions, as libraries do it,
SD 1.5's state takes 1.8 GB instead of 0.006. And a step is skipped without waiting for the GPU.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from optimization.stochastic_rounding import ChunkedOptimizer, round_into

DECAY_RATE = -0.8  # the averages of step t weigh what is new with t to this power
MOST_RMS = 1.0  # of a tensor's update, before the learning rate
SMALLEST = 1e-30  # mean square


class Adafactor(ChunkedOptimizer):
    """For fp32 weights, and for bf16 ones, which it rounds stochastically. Its state is fp32.

    The learning rate is absolute, as AdamW's; there is no first moment.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], lr: float, weight_decay: float, seed: int = 0):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay}, seed)

    def update_chunk(self, chunk: Sequence[torch.nn.Parameter], group: Mapping[str, Any]) -> None:
        weights = [parameter.float() for parameter in chunk]  # fp32 weights: themselves
        taken = 1.0 if self.found_inf is None else 1 - self.found_inf
        rate, share_of_new = taken * group["lr"], taken * group["calls"] ** DECAY_RATE
        kept = 1 - rate * group["weight_decay"]
        for parameter, weight in zip(chunk, weights, strict=True):
            weight.mul_(kept).sub_(self._normalized_gradient(parameter, share_of_new).mul_(rate))
        round_into(chunk, weights, self.generator)

    def _normalized_gradient(self, parameter: torch.nn.Parameter, share_of_new: float | torch.Tensor) -> torch.Tensor:
        """The gradient over the root of its mean square, with an RMS of at most 1. Updates the state."""
        assert parameter.grad is not None
        gradient = parameter.grad.float()  # of fp32 weights the gradient itself, which is used up
        if self.found_inf is not None:
            gradient.masked_fill_(self.found_inf.bool(), 0)  # NaN times 0 would still be NaN
        state = self.state[parameter] or self._new_state(parameter)
        squared = gradient.square()
        if gradient.ndim < 2:
            gradient.mul_(state["exp_avg_sq"].lerp_(squared, share_of_new).clamp(min=SMALLEST).rsqrt_())
        else:
            rows = state["rows"].lerp_(squared.mean(tuple(range(1, squared.ndim)), keepdim=True), share_of_new)
            columns = state["columns"].lerp_(squared.mean(0, keepdim=True), share_of_new)
            relative = rows.clamp(min=SMALLEST) / rows.mean().clamp_(min=SMALLEST)
            gradient.mul_(relative.rsqrt_()).mul_(columns.clamp(min=SMALLEST).rsqrt_())
        rms = torch.linalg.vector_norm(gradient) / gradient.numel() ** 0.5
        return gradient.div_((rms / MOST_RMS).clamp_(min=1))

    def _new_state(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        """Of a matrix or kernel the mean squares of rows (out, 1, ...) and columns (1, in, ...); of a vector each."""
        rows, columns = (parameter.shape[0], *[1] * (parameter.ndim - 1)), (1, *parameter.shape[1:])
        shapes = {"exp_avg_sq": parameter.shape} if parameter.ndim < 2 else {"rows": rows, "columns": columns}
        device = parameter.device
        self.state[parameter] = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
        return self.state[parameter]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the state in fp32: torch's own gives it the dtype of the weights."""
        super().load_state_dict(state_dict)
        for loaded, saved in zip(self.state.values(), state_dict["state"].values(), strict=True):
            for name, tensor in saved.items():
                loaded[name] = tensor.to(loaded[name].device, copy=True)

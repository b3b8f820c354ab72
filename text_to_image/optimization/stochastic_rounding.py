"""Optimizers that compute in fp32, one chunk of parameters at a time, and round the result to bf16 at random.

To the nearest, bf16's 8 bits would lose most updates of a fine-tuning: 1 + 1e-4 is 1. Rounded up or down with the
probability that makes the mean right, small updates add up (arXiv:2010.06192), and no fp32 copy is needed.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.optim.adamw import adamw

from optimization.parameters import split_into_chunks

# Parameters are computed together up to this many elements; of each there are up to five fp32 tensors at a time.
UPDATE_ELEMENTS = 1 << 23


@torch.no_grad()
def round_into(
    targets: Sequence[torch.Tensor], values: Sequence[torch.Tensor], generator: torch.Generator | None
) -> None:
    """Writes the fp32 `values` into the bf16 `targets`, stochastically rounded; what bf16 can hold stays as it is.

    Without a generator, rounded to the nearest. Values that are the targets themselves (fp32 weights) are left alone.
    """
    if values[0] is targets[0]:
        return
    flat = torch.cat([value.flatten() for value in values])
    if generator:  # bf16 is the upper half of fp32: noise in the lower half carries over as often as it should
        noise = torch.randint(1 << 16, flat.shape, generator=generator, dtype=torch.int32, device=flat.device)
        flat.view(torch.int32).add_(noise).bitwise_and_(-1 << 16)
    parts = flat.split([target.numel() for target in targets])
    views = [part.view(target.shape) for part, target in zip(parts, targets, strict=True)]
    torch._foreach_copy_(list(targets), views)


class ChunkedOptimizer(torch.optim.Optimizer):
    """The base of optimizers whose `update_chunk` computes in fp32 and ends with `round_into`.

    The rounding's randomness depends on `seed`, the step and the parameters' order alone, so that a resumed run has
    the same. `found_inf`, a scalar that is 1 for a step to be skipped, is read on the device, as the fused AdamW does.
    """

    found_inf: torch.Tensor | None = None
    _step_supports_amp_scaling = True  # the fp16 scaler then sets `found_inf` instead of waiting for the GPU

    def __init__(self, parameters: Sequence[torch.nn.Parameter], defaults: Mapping[str, Any], seed: int = 0):
        # With 'fused' torch keeps the state's `step` on the device; 'calls' counts steps, the skipped ones too.
        super().__init__(parameters, {**defaults, "fused": True, "calls": 0})
        self.seed = seed
        self.generator = torch.Generator(parameters[0].device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert getattr(self, "grad_scale", None) is None, "the scaler's gradients are unscaled before they are clipped"
        for group in self.param_groups:
            places = [place for place, parameter in enumerate(group["params"]) if parameter.grad is not None]
            if not places:
                continue
            if places[0] == 0:  # the trainer may hand over the gradients of a step in several calls
                group["calls"] += 1
            assert group["calls"], "a UNet's first weight has a gradient in every step"
            key = random.Random(f"{self.seed} {group['calls']} {places[0]}")
            self.generator.manual_seed(key.getrandbits(63))
            parameters = [group["params"][place] for place in places]
            for chunk in split_into_chunks(parameters, UPDATE_ELEMENTS):
                self.update_chunk(parameters[chunk], group)

    def update_chunk(self, chunk: Sequence[torch.nn.Parameter], group: Mapping[str, Any]) -> None:
        raise NotImplementedError


class StochasticAdamW(ChunkedOptimizer):
    """AdamW for bf16 weights; both of its averages are kept in bf16 too, rounded in the same way.

    Without that the second one would stand still: it moves by a thousandth at a time. 8 bytes a parameter in all.
    """

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], lr: float, betas: tuple[float, float], weight_decay: float,
        eps: float, seed: int = 0,
    ):  # fmt: skip
        super().__init__(parameters, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps}, seed)

    def update_chunk(self, chunk: Sequence[torch.nn.Parameter], group: Mapping[str, Any]) -> None:
        states = [self.state[parameter] or self._new_state(parameter) for parameter in chunk]
        averages, averages_of_squares = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        stored = (chunk, averages, averages_of_squares)
        weights, first, second = ([tensor.float() for tensor in tensors] for tensors in stored)
        gradients = [parameter.grad.float() for parameter in chunk if parameter.grad is not None]
        adamw(
            weights, gradients, first, second, [], [state["step"] for state in states],
            fused=True, found_inf=self.found_inf, amsgrad=False, maximize=False, lr=group["lr"],
            beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip
        del gradients  # before the rounding takes memory
        for targets, values in zip(stored, (weights, first, second), strict=True):
            round_into(targets, values, self.generator)

    def _new_state(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        self.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
        return self.state[parameter]

"""The exponential moving average (EMA) of the weights, or none: both are stepped, saved and copied in the same way."""

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel

from models.loading import load_unet
from optimization.parameters import OptimizedWeights, split_into_chunks
from runtime.devices import synchronize


class NoEMA:
    """EMA off: the trained weights are what is saved."""

    enabled = False

    def step(self, parameters: Iterable[torch.nn.Parameter]) -> None: ...

    def store(self, parameters: Iterable[torch.nn.Parameter]) -> None: ...

    def copy_to(self, parameters: Iterable[torch.nn.Parameter]) -> None: ...

    def restore(self, parameters: Iterable[torch.nn.Parameter]) -> None: ...

    def save_pretrained(self, path: Path) -> None: ...


class EMA(EMAModel):
    """diffusers' exponential moving average, updated in place: its own step takes a copy of the weights beside."""

    enabled = True

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], unet: UNet2DConditionModel, device: torch.device
    ) -> None:
        """In fp32 on `device`, whatever `parameters` are."""
        super().__init__([], model_cls=UNet2DConditionModel, model_config=unet.config, foreach=True)
        self.shadow_params = [parameter.detach().to(device, torch.float32, copy=True) for parameter in parameters]

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Writes the averages into `parameters`; chunk by chunk, since they may come from the CPU's memory."""
        parameters = list(parameters)
        for chunk in split_into_chunks(self.shadow_params):
            targets = [parameter.detach() for parameter in parameters[chunk]]
            averages = zip(self.shadow_params[chunk], targets, strict=True)
            torch._foreach_copy_(targets, [average.to(target.device) for average, target in averages])

    @torch.no_grad()
    def step(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        parameters = list(parameters)
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        for chunk in split_into_chunks(self.shadow_params):
            averages = self.shadow_params[chunk]
            current = [p.detach().to(a.dtype) for p, a in zip(parameters[chunk], averages, strict=True)]
            torch._foreach_lerp_(averages, current, 1 - self.cur_decay_value)


class OffloadedEMA(EMA):
    """The same in CPU memory; every step copies the weights over, from a GPU into page-locked memory, all at once."""

    copies: Sequence[torch.nn.Parameter] = ()

    @torch.no_grad()
    def step(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        parameters = list(parameters)
        self.copies = self.copies or [torch.nn.Parameter(_empty_on_cpu(p), p.requires_grad) for p in parameters]
        for copy, parameter in zip(self.copies, parameters, strict=True):
            copy.copy_(parameter, non_blocking=True)
        synchronize()
        super().step(self.copies)


def _empty_on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """Page-locked for what comes from a GPU."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)


def make_ema(
    args: argparse.Namespace, unet: UNet2DConditionModel, parameters: Sequence[torch.nn.Parameter],
    checkpoint: Path | None,
) -> EMA | NoEMA:  # fmt: skip
    """The average of the trained `parameters` as they begin, or as `checkpoint` has it.

    Its decay at step n is at most (1 + n) / (10 + n): a run of 300 steps ends with the average of about its last 30,
    where a fixed 0.9999 would still hold mostly the base.
    """
    if not args.use_ema:
        return NoEMA()
    initial = load_unet(checkpoint, subfolder="unet_ema").parameters() if checkpoint else parameters
    kind = OffloadedEMA if args.offload_ema else EMA
    ema = kind(initial, unet, torch.device("cpu") if args.offload_ema else unet.device)
    if checkpoint:  # its decay depends on this count
        config = json.loads((checkpoint / "unet_ema" / "config.json").read_text())
        ema.optimization_step = config["optimization_step"]
    return ema


@contextmanager
def averaged(ema: EMA | NoEMA, parameters: OptimizedWeights) -> Iterator[None]:
    """The UNet with its averaged weights, for the block."""
    ema.store(parameters.parameters)
    ema.copy_to(parameters.parameters)
    parameters.sync_to_model()
    try:
        yield
    finally:
        ema.restore(parameters.parameters)
        parameters.sync_to_model()

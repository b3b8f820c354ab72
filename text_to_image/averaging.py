"""The weights' moving average, or none: both are stepped, saved and copied in the same way."""

from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel

from models import load_unet


class NoAverage:
    """Stands where no average is wanted: the trained weights are what is saved."""

    def step(self, parameters: Iterable[torch.nn.Parameter]) -> None: ...

    def copy_to(self, parameters: Iterable[torch.nn.Parameter]) -> None: ...

    def save_pretrained(self, path: Path) -> None: ...


def make_average(
    unet: UNet2DConditionModel, use_ema: bool, foreach: bool, checkpoint: Path | None, first_step: int
) -> EMAModel | NoAverage:
    """The average of `unet`'s weights as it begins, or as `checkpoint` has it after `first_step` steps.

    Its decay at step n is at most (1 + n) / (10 + n): a run of 300 steps ends with the average of about its last 30,
    where a fixed 0.9999 would still hold mostly the base.
    """
    if not use_ema:
        return NoAverage()
    averaged = load_unet(checkpoint, subfolder="unet_ema") if checkpoint else unet
    average = EMAModel(
        averaged.parameters(), model_cls=UNet2DConditionModel, model_config=unet.config, foreach=foreach
    )
    average.optimization_step = first_step
    average.to(unet.device)
    return average

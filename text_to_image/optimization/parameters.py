"""What is trained: the whole UNet or a LoRA on it, in its own precision or as a bf16 copy of fp32 weights."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel

from models.folders import FolderLike
from models.loading import copy_license_and_defaults, load_unet, save_pipeline
from models.lora import lora_config, read_lora, write_lora


class FullUNet:
    """All weights are trained; the result is a pipeline."""

    kind = "UNet"

    def load(self, base: FolderLike, checkpoint: Path | None) -> UNet2DConditionModel:
        return load_unet(checkpoint or base)

    def save_checkpoint(self, unet: UNet2DConditionModel, folder: Path) -> None:
        unet.save_pretrained(folder / "unet", safe_serialization=True)

    def save_result(
        self, unet: UNet2DConditionModel, base: FolderLike, folder: Path, scheduler: DDPMScheduler
    ) -> None:
        save_pipeline(unet, base, folder, scheduler)


class LoraAdapter:
    """Low-rank matrices beside the attention's projections (arXiv:2106.09685); the result is one small file."""

    def __init__(self, rank: int, alpha: float | None, seed: int = 0):
        self.rank, self.alpha, self.seed = rank, alpha or rank, seed
        self.kind = f"LoRA of rank {rank}"
        self.config = lora_config(self.rank, self.alpha)

    def load(self, base: FolderLike, checkpoint: Path | None) -> UNet2DConditionModel:
        unet = load_unet(base).requires_grad_(False)
        with torch.random.fork_rng(devices=[]):  # random initial weights from the run's seed, on the CPU
            torch.manual_seed(self.seed)
            unet.add_adapter(self.config)
        if checkpoint:
            read_lora(unet, checkpoint)
        return unet

    def save_checkpoint(self, unet: UNet2DConditionModel, folder: Path) -> None:
        write_lora(unet, folder)

    def save_result(
        self, unet: UNet2DConditionModel, base: FolderLike, folder: Path, scheduler: DDPMScheduler
    ) -> None:
        write_lora(unet, folder)
        copy_license_and_defaults(base, folder)


def make_trainable(lora_rank: int | None, lora_alpha: float | None, seed: int) -> FullUNet | LoraAdapter:
    return LoraAdapter(lora_rank, lora_alpha, seed) if lora_rank else FullUNet()


# --- Precision ------------------------------------------------------------------------------------------------------


class ModelParameters:
    """The optimizer changes the UNet's weights themselves."""

    def __init__(self, unet: UNet2DConditionModel):
        self.parameters: list[torch.nn.Parameter] = [p for p in unet.parameters() if p.requires_grad]

    def collect_gradients(self, last: bool) -> None: ...

    def sync_to_model(self) -> None: ...

    def full_precision(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def widen(self) -> None:
        """Weights of pure bf16 become fp32, for an average that is to be saved; they cannot be trained after it."""
        for parameter in self.parameters:
            parameter.data = parameter.data.float()


class MasterWeights:
    """fp32 master weights that the optimizer changes, and the UNet as their bf16 copy, which computes.

    Autocast would cast all weights again at every step: at SD 1.5's size that is more than half of a step on a CPU.
    """

    def __init__(self, unet: UNet2DConditionModel, processes: int):
        self.unet = unet
        self.copies = [p for p in unet.parameters() if p.requires_grad]
        self.parameters: list[torch.nn.Parameter] = [
            torch.nn.Parameter(p.detach().float().clone()) for p in self.copies
        ]
        self.processes = processes
        unet.to(torch.bfloat16)

    @torch.no_grad()
    def collect_gradients(self, last: bool) -> None:
        """After each backward pass: adds the gradients of the copies to those of the master weights, in fp32.

        Several processes exchange their gradients in the `last` pass of a step alone, and add them up in bf16 before.
        """
        if not last and self.processes > 1:
            return
        for parameter, copy in zip(self.parameters, self.copies, strict=True):
            if copy.grad is not None:
                parameter.grad = copy.grad.float() if parameter.grad is None else parameter.grad.add_(copy.grad)
                copy.grad = None

    @torch.no_grad()
    def sync_to_model(self) -> None:
        """The copies take over what the optimizer has changed."""
        torch._foreach_copy_(tuple(self.copies), tuple(self.parameters))

    def widen(self) -> None: ...

    @contextlib.contextmanager
    def full_precision(self) -> Iterator[None]:
        """The UNet with the master weights in place of their copies, to be saved; nothing is copied for it.

        The parameters change places and not their data: one whose data change type no longer exchanges its gradient
        with the other processes.
        """
        self._replace(self.copies, self.parameters)
        try:
            yield
        finally:
            self._replace(self.parameters, self.copies)

    def _replace(self, old: Sequence[torch.nn.Parameter], new: Sequence[torch.nn.Parameter]) -> None:
        replacement = {id(parameter): other for parameter, other in zip(old, new, strict=True)}
        for module in self.unet.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, replacement.get(id(parameter), parameter))


OptimizedWeights = ModelParameters | MasterWeights


def make_parameters(unet: UNet2DConditionModel, precision: str, processes: int = 1) -> OptimizedWeights:
    if precision == "pure_bf16":  # the optimizer rounds: optimization/stochastic_rounding.py
        return ModelParameters(unet.to(torch.bfloat16))
    return MasterWeights(unet, processes) if precision == "bf16" else ModelParameters(unet)

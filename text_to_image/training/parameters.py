"""What is trained: the whole UNet or a LoRA on it, in its own precision or as a bf16 copy of fp32 weights."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

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

    def save_result(self, unet: UNet2DConditionModel, base: FolderLike, folder: Path, noise_scheduler) -> None:
        save_pipeline(unet, base, folder, noise_scheduler)


class Lora:
    """Low-rank matrices beside the attention's projections (arXiv:2106.09685); the result is one small file."""

    def __init__(self, rank: int, alpha: float | None, seed: int = 0):
        self.rank, self.alpha, self.seed = rank, alpha or rank, seed
        self.kind = f"LoRA of rank {rank}"
        self.config = lora_config(self.rank, self.alpha)

    def load(self, base: FolderLike, checkpoint: Path | None) -> UNet2DConditionModel:
        unet = load_unet(base).requires_grad_(False)
        with torch.random.fork_rng(devices=[]):  # it begins at random, by the run's seed, on the CPU
            torch.manual_seed(self.seed)
            unet.add_adapter(self.config)
        if checkpoint:
            read_lora(unet, checkpoint)
        return unet

    def save_checkpoint(self, unet: UNet2DConditionModel, folder: Path) -> None:
        write_lora(unet, folder)

    def save_result(self, unet: UNet2DConditionModel, base: FolderLike, folder: Path, noise_scheduler) -> None:
        write_lora(unet, folder)
        copy_license_and_defaults(base, folder)


def make_trainable(lora_rank: int | None, lora_alpha: float | None, seed: int) -> FullUNet | Lora:
    return Lora(lora_rank, lora_alpha, seed) if lora_rank else FullUNet()


# --- Precision ------------------------------------------------------------------------------------------------------


class ModelParameters:
    """The optimiser changes the UNet's weights themselves."""

    def __init__(self, unet: UNet2DConditionModel):
        self.parameters: Sequence[torch.nn.Parameter] = [p for p in unet.parameters() if p.requires_grad]

    def collect_gradients(self, last: bool) -> None: ...

    def sync_to_model(self) -> None: ...

    def full_precision(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


class MasterWeights:
    """fp32 weights that the optimiser changes, and the UNet as their bf16 copy, which computes.

    Autocast would cast all weights again at every step: at SD 1.5's size that costs more than half of one on a CPU.
    """

    def __init__(self, unet: UNet2DConditionModel, processes: int):
        self.unet = unet
        self.copies = [p for p in unet.parameters() if p.requires_grad]
        self.parameters = [torch.nn.Parameter(p.detach().float().clone()) for p in self.copies]
        self.processes = processes
        unet.to(torch.bfloat16)

    @torch.no_grad()
    def collect_gradients(self, last: bool) -> None:
        """After each backward pass: adds the copies' gradients to the weights' own, in fp32.

        Several processes add up in bf16 and exchange their gradients in the `last` pass of a step, so only then.
        """
        if not last and self.processes > 1:
            return
        for weight, copied in zip(self.parameters, self.copies, strict=True):
            if copied.grad is not None:
                weight.grad = copied.grad.float() if weight.grad is None else weight.grad.add_(copied.grad)
                copied.grad = None

    @torch.no_grad()
    def sync_to_model(self) -> None:
        """What the optimiser has changed goes into the copies."""
        torch._foreach_copy_(self.copies, self.parameters)

    @contextlib.contextmanager
    def full_precision(self) -> Iterator[None]:
        """The UNet with the fp32 weights in place of their copies, to be saved; nothing is copied for it.

        The parameters change places, not their data: one whose data change type forgets that it is to exchange its
        gradient with the other processes.
        """
        self._exchange(self.copies, self.parameters)
        try:
            yield
        finally:
            self._exchange(self.parameters, self.copies)

    def _exchange(self, these: Sequence[torch.nn.Parameter], for_those: Sequence[torch.nn.Parameter]) -> None:
        instead = {id(one): other for one, other in zip(these, for_those, strict=True)}
        for module in self.unet.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, instead.get(id(parameter), parameter))


def make_parameters(unet: UNet2DConditionModel, precision: str, processes: int = 1) -> ModelParameters | MasterWeights:
    return MasterWeights(unet, processes) if precision == "bf16" else ModelParameters(unet)

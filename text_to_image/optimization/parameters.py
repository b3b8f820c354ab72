"""What is trained: the whole UNet or a LoRA on it, in its own precision or as a bf16 copy of fp32 weights."""

import contextlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
from accelerate import Accelerator
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

CHUNK_ELEMENTS = 1 << 26  # of parameters that the optimizer changes at a time: 0.3 GB in fp32


def split_into_chunks(tensors: Sequence[torch.Tensor], elements: int = CHUNK_ELEMENTS) -> list[slice]:
    """Consecutive slices of `tensors`, each of at most that many elements or of a single tensor."""
    bounds, size = [0], 0
    for index, tensor in enumerate(tensors):
        if size and size + tensor.numel() > elements:
            bounds.append(index)
            size = 0
        size += tensor.numel()
    return [slice(*pair) for pair in pairwise([*bounds, len(tensors)])]


class ModelParameters:
    """The optimizer changes the UNet's own weights; in fp16 all at once, as its scaler looks at all gradients."""

    def __init__(self, unet: UNet2DConditionModel, precision: str = "no"):
        self.parameters: list[torch.nn.Parameter] = [p for p in unet.parameters() if p.requires_grad]
        self._chunks = [slice(None)] if precision == "fp16" else split_into_chunks(self.parameters)

    def collect_gradients(self, last: bool) -> None: ...

    def clip_gradients(self, accelerator: Accelerator, max_norm: float) -> torch.Tensor:
        """Scales the gradients to at most `max_norm` together; returns the norm that they had."""
        return accelerator.clip_grad_norm_(self.parameters, max_norm)

    def gradient_chunks(self) -> Iterator[Sequence[torch.nn.Parameter]]:
        """The parameters, chunk by chunk, of which only the present chunk has its gradients, for the optimizer."""
        for chunk in _hand_out_gradients(self.parameters, self._chunks):
            yield self.parameters[chunk]

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
        self.copies: list[torch.Tensor] = [p for p in unet.parameters() if p.requires_grad]
        masters = (p.detach().to(torch.float32, copy=True) for p in self.copies)
        self.parameters = [torch.nn.Parameter(master) for master in masters]
        self.processes = processes
        self._chunks = split_into_chunks(self.parameters)
        # Whether the gradients of a step are in the masters, in fp32, or still in the copies:
        self._accumulated = False
        self.scale = torch.ones(())  # of the clipped gradients
        unet.to(torch.bfloat16)

    @torch.no_grad()
    def collect_gradients(self, last: bool) -> None:
        """After each backward pass: adds the gradients of the copies to those of the master weights, in fp32.

        Those of a step's only pass stay where they are until they are needed. So do those of several processes, which
        exchange their gradients in the `last` pass alone, and add them up in bf16 before.
        """
        if self.processes > 1 or (last and not self._accumulated):
            return
        for chunk in self._chunks:
            self._move_gradients(chunk)
        self._accumulated = True

    @torch.no_grad()
    def clip_gradients(self, accelerator: Accelerator, max_norm: float) -> torch.Tensor:
        """Has the gradients scaled to at most `max_norm` together; returns the norm that they have."""
        holders: Sequence[torch.Tensor] = self.parameters if self._accumulated else self.copies
        # Each is summed in fp32 and rounded to bf16. Asking for fp32 copies the gradients first: ten times the time.
        norms = torch._foreach_norm(_gradients(holders), 2)
        norm = torch.linalg.vector_norm(torch.stack(norms), dtype=torch.float32)
        self.scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        return norm

    @torch.no_grad()
    def gradient_chunks(self) -> Iterator[Sequence[torch.nn.Parameter]]:
        """The master weights, chunk by chunk, with clipped gradients in fp32, for the optimizer.

        The copies take each chunk over. As the gradients of one chunk alone exist in fp32, a step takes 16 bytes a
        parameter instead of 18; not where several passes were added up in fp32 before.
        """
        for chunk in _hand_out_gradients(self.parameters, self._chunks):
            masters = self.parameters[chunk]
            self._move_gradients(chunk)
            torch._foreach_mul_(_gradients(masters), self.scale)
            yield masters
            torch._foreach_copy_(self.copies[chunk], list(masters))
        self._accumulated = False

    def _move_gradients(self, chunk: slice) -> None:
        """From the copies to the masters, where they are added up."""
        pairs = zip(self.parameters[chunk], self.copies[chunk], strict=True)
        masters, copies = [], []
        for master, copy in pairs:
            if copy.grad is not None:
                masters.append(master)
                copies.append(copy)
                master.grad = torch.empty_like(master) if master.grad is None else master.grad
        move = torch._foreach_add_ if self._accumulated else torch._foreach_copy_
        if masters:
            move(_gradients(masters), _gradients(copies))
        _drop_gradients(copies)

    @torch.no_grad()
    def sync_to_model(self) -> None:
        """The copies take over the master weights."""
        torch._foreach_copy_(self.copies, list(self.parameters))

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

    def _replace(self, old: Sequence[torch.Tensor], new: Sequence[torch.Tensor]) -> None:
        replacement = {id(parameter): other for parameter, other in zip(old, new, strict=True)}
        for module in self.unet.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, replacement.get(id(parameter), parameter))


def _hand_out_gradients(parameters: Sequence[torch.nn.Parameter], chunks: Sequence[slice]) -> Iterator[slice]:
    """Each chunk in turn, while its parameters alone have their gradients; after it they are gone."""
    gradients = [parameter.grad for parameter in parameters]
    _drop_gradients(parameters)
    for chunk in chunks:
        own, gradients[chunk] = gradients[chunk], [None] * len(parameters[chunk])
        for parameter, gradient in zip(parameters[chunk], own, strict=True):
            parameter.grad = gradient
        del own
        yield chunk
        _drop_gradients(parameters[chunk])


def _gradients(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Those that there are."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _drop_gradients(parameters: Sequence[torch.Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None


OptimizedWeights = ModelParameters | MasterWeights


def cast_weights(unet: UNet2DConditionModel, precision: str) -> None:
    """Casts what need not be in fp32: the weights that a LoRA leaves as they are, with pure_bf16 all of them.

    To be done before they move to the GPU, where both kinds might not fit.
    """
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "pure_bf16": torch.bfloat16}.get(precision, torch.float32)
    for parameter in unet.parameters():
        if precision == "pure_bf16" or not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def make_parameters(unet: UNet2DConditionModel, precision: str, processes: int = 1) -> OptimizedWeights:
    """For `unet` after `cast_weights`; with pure_bf16 the optimizer rounds (optimization/stochastic_rounding.py)."""
    return MasterWeights(unet, processes) if precision == "bf16" else ModelParameters(unet, precision)

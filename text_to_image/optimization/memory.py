"""Foretells the GPU memory of a training step from the UNet's config alone: no GPU, no weights, seconds.

One real step runs on tensors without data, with the classes that train. See `memory_tracking` for how it is counted.
"""

import functools
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch.utils.checkpoint import checkpoint

from models.lora import lora_config
from optimization.memory_tracking import GpuKernels, MemoryTracker
from optimization.parameters import MasterWeights, cast_weights, make_parameters
from optimization.stochastic_rounding import UPDATE_ELEMENTS

GB = 10**9
# What CUDA takes beside PyTorch's allocations (context, kernels, fragmentation), and what the forecast misses: 0.2 to
# 0.3 GB on an H100.
CONTEXT_BYTES = int(1.5 * GB)
CLIP_TOKENS = 77
TENSORS_OF_AN_UPDATE = 5  # weights, gradients, two averages, random bits
PROBES = 2, 3  # batches that are traced; 1 is special: some of its copies are views


@dataclass(frozen=True)
class MemorySettings:
    """What the memory of a training step depends on, but for the batch size."""

    unet_config: Mapping[str, Any] = field(hash=False)  # unet/config.json
    precision: str = "no"  # no, bf16 (a copy of fp32 weights), fp16 (autocast), pure_bf16 (no fp32 weights)
    optimizer: str = "adamw"  # adamw, adamw8bit, adafactor
    lora_rank: int | None = None
    ema: bool = False  # on the GPU
    gradient_checkpointing: bool = False
    accumulated: bool = False  # whether a step has several batches, whose gradients are kept
    processes: int = 1
    height: int = 512  # pixels
    width: int = 512
    vae_factor: int = 8  # pixels per latent cell
    text_tokens: int = CLIP_TOKENS


@dataclass(frozen=True)
class MemoryForecast:
    """Bytes that PyTorch will have allocated. CUDA's context comes on top."""

    weights: int
    optimizer: int
    ema: int
    gradients: int  # when the optimizer uses them
    activations: int  # after the forward pass
    step: int  # the peak of a step, less than the sum: activations are gone before the last gradients are there
    loading: int  # the peak before the first step: the weights come in fp32

    @property
    def total(self) -> int:
        return max(self.step, self.loading)

    @property
    def gradients_and_activations(self) -> int:
        """What they take together at the peak of a step."""
        return self.step - self.weights - self.optimizer - self.ema


@dataclass(frozen=True)
class StepMemory:
    """The memory of a step at any batch size: every moment of it is linear in the batch."""

    weights: int
    optimizer: int
    ema: int
    loading: int
    gradients: int
    update: int  # what the optimizer takes for a moment
    traces: tuple[list[int], list[int]]  # bytes after each allocation of a step, at the batches of PROBES
    forward_length: int  # how many of them are of the forward pass

    def forecast(self, batch: int) -> MemoryForecast:
        """With `batch` samples at once."""
        moments = self._moments(batch)
        activations = max(moments[: self.forward_length]) - moments[0]
        updating = self.weights + self.optimizer + self.ema + self.gradients + self.update
        step = max(*moments, updating)
        return MemoryForecast(self.weights, self.optimizer, self.ema, self.gradients, activations, step, self.loading)

    def largest_batch(self, gigabytes: float) -> int:
        """The largest batch that fits beside CUDA's context into that many GB (1e9 bytes); 0 if none does."""
        room, batch = gigabytes * GB - CONTEXT_BYTES, 1
        if self.forecast(1).total > room:
            return 0
        while self.forecast(2 * batch).total <= room:
            batch *= 2
        step = batch
        while step := step // 2:
            if self.forecast(batch + step).total <= room:
                batch += step
        return batch

    def _moments(self, batch: int) -> list[int]:
        first, second = PROBES
        return [
            low + (high - low) * (batch - first) // (second - first) for low, high in zip(*self.traces, strict=True)
        ]


def forecast_memory(settings: MemorySettings, batch: int) -> MemoryForecast:
    """The peak of a step with `batch` samples at once on each process."""
    return trace_step(settings).forecast(batch)


def largest_batch(settings: MemorySettings, gigabytes: float) -> int:
    """The largest batch that fits into a card of that many GB (1e9 bytes), 0 if none does."""
    return trace_step(settings).largest_batch(gigabytes)


@functools.lru_cache
def trace_step(settings: MemorySettings) -> StepMemory:
    """Traces a step at two batch sizes; takes seconds for Stable Diffusion's UNet, nothing when asked again."""
    kernels = GpuKernels(settings.precision == "fp16")
    with torch.device("meta"):
        unet = _make_unet(settings, kernels)
    with kernels, MemoryTracker() as tracker:
        model = _TracedModel(settings, unet, kernels, tracker)
        resting = tracker.live
        traces = []
        for batch in PROBES:
            earlier = model.add_earlier_gradients()
            tracker.restart()
            loss = model.forward(batch)
            forward_length = len(tracker.history)
            torch.autograd.backward(loss)
            del loss
            gradients = tracker.live - resting
            model.use_gradients()
            traces.append(list(tracker.history))
            del earlier
    return StepMemory(*model.sizes, gradients, model.update, (traces[0], traces[1]), forward_length)


class _TracedModel:
    """All that lives through a run, without data: the UNet, its parameters, the optimizer's state, the EMA."""

    def __init__(
        self, settings: MemorySettings, unet: UNet2DConditionModel, kernels: GpuKernels, tracker: MemoryTracker
    ):
        self.settings, self.unet, self.kernels = settings, unet, kernels
        with torch.device("meta"):
            for parameter in unet.parameters():
                parameter.data = torch.empty_like(parameter.data)  # moves to the GPU, where it is counted
            self.parameters = make_parameters(self.unet, settings.precision, settings.processes)
            weights = tracker.live
            self.state = [_optimizer_state(settings.optimizer, p) for p in self.parameters.parameters]
            optimizer = tracker.live - weights
            self.ema = [torch.zeros(p.shape) for p in self.parameters.parameters if settings.ema]
        ema = tracker.live - weights - optimizer
        self.sizes = weights, optimizer, ema, max(tracker.history)
        self.update = _update_bytes(settings, self.parameters.parameters)

    def forward(self, batch: int) -> torch.Tensor:
        """The loss, as `training.objective.diffusion_loss` has it."""
        with torch.device("meta"):
            inputs = _unet_inputs(self.settings, self.unet.config, batch)
            target = torch.zeros(inputs["sample"].shape)
        self.kernels.begin_forward()
        prediction = self.unet(**inputs).sample
        self.kernels.end_forward()
        return (prediction.float() - target).square().mean(dim=(1, 2, 3)).sum() / batch

    def add_earlier_gradients(self) -> list[torch.Tensor]:
        """Gradients that are there before a backward pass: those of the step's earlier batches; where several
        processes exchange them, the buffers in which they do."""
        parameters, settings = self.parameters, self.settings
        trained = parameters.copies if isinstance(parameters, MasterWeights) else parameters.parameters
        buckets = [torch.zeros_like(parameter) for parameter in trained if settings.processes > 1]
        if settings.accumulated:
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
            parameters.collect_gradients(last=False)
        elif buckets:  # of which the gradients are views
            for parameter, bucket in zip(trained, buckets, strict=True):
                parameter.grad = bucket
        return buckets

    def use_gradients(self) -> None:
        """As the optimizer's step does, chunk by chunk."""
        self.parameters.collect_gradients(last=True)
        if isinstance(self.parameters, MasterWeights):
            self.parameters.scale = torch.ones((), device="meta")
        for _ in self.parameters.gradient_chunks():
            pass


def _make_unet(settings: MemorySettings, kernels: GpuKernels) -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_config(dict(settings.unet_config)).train()
    if settings.lora_rank:
        unet.requires_grad_(False)
        unet.add_adapter(lora_config(settings.lora_rank, settings.lora_rank))
    if settings.gradient_checkpointing:
        _enable_checkpointing(unet, kernels)
    cast_weights(unet, settings.precision)
    return unet


def _enable_checkpointing(unet: UNet2DConditionModel, kernels: GpuKernels) -> None:
    """As diffusers does, but `kernels` also hold for what the backward pass computes again."""

    def run(module: torch.nn.Module, *inputs: Any) -> Any:
        return checkpoint(module.__call__, *inputs, use_reentrant=False, context_fn=lambda: (nullcontext(), kernels))

    unet.enable_gradient_checkpointing(run)


def _optimizer_state(optimizer: str, parameter: torch.Tensor) -> list[torch.Tensor]:
    """What the optimizer keeps for a parameter."""
    if optimizer == "adamw":
        return [torch.zeros_like(parameter) for _ in range(2)]
    if optimizer == "adamw8bit":
        return [torch.zeros_like(parameter, dtype=torch.uint8) for _ in range(2)]
    if optimizer == "adafactor":  # a mean for each row and each column
        rows = parameter.shape[0] if parameter.dim() > 1 else 1
        return [torch.zeros(rows), torch.zeros(parameter.numel() // rows)]
    raise ValueError(f"no such optimizer: {optimizer}")


def _update_bytes(settings: MemorySettings, parameters: Sequence[torch.Tensor]) -> int:
    """Optimizers that round bf16 weights, and Adafactor, compute a chunk of the parameters at a time in fp32."""
    if settings.precision != "pure_bf16" and settings.optimizer != "adafactor":
        return 0
    elements = sum(parameter.numel() for parameter in parameters)
    chunk = max(UPDATE_ELEMENTS, *(parameter.numel() for parameter in parameters))
    return TENSORS_OF_AN_UPDATE * 4 * min(chunk, elements)


def _unet_inputs(settings: MemorySettings, config: Any, batch: int) -> dict[str, Any]:
    """Zeros in the shapes that the UNet reads; a mask where captions of several lengths meet."""
    tokens = settings.text_tokens
    dtype = torch.bfloat16 if "bf16" in settings.precision else torch.float32
    size = settings.height // settings.vae_factor, settings.width // settings.vae_factor
    inputs: dict[str, Any] = {
        "sample": torch.zeros(batch, config.in_channels, *size, dtype=dtype),
        "timestep": torch.zeros(batch, dtype=torch.long),
        "encoder_hidden_states": torch.zeros(batch, tokens, config.cross_attention_dim, dtype=dtype),
        "encoder_attention_mask": torch.zeros(batch, tokens) if tokens > CLIP_TOKENS else None,
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": torch.zeros(batch, pooled, dtype=dtype), "time_ids": torch.zeros(batch, 6)}
        inputs["added_cond_kwargs"] = added
    return inputs

"""Whether a GPU computes what the CPU does in fp32, in every precision and with every length of captions."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpu.random_models import model_folder, picture_folder
from gpu.robustness import Robustness
from gpu.rows import Measurement
from gpu.settings import Settings, need_gpu
from gpu.training_runs import Trainer
from models.loading import load_unet
from runtime.paths import STARTER
from training.objective import diffusion_loss
from training.samples import Batch

# Of the loss, and of all gradients as one vector: the length of the difference by the length of the reference.
LIMITS = {"no": (1e-4, 1e-3), "bf16": (5e-3, 6e-2), "fp16": (2e-3, 3e-2)}
LOSS_SCALE = 2.0**10  # for fp16: small gradients would vanish
CHUNK = 77  # tokens
LENGTHS = {"77": CHUNK, "154": 2 * CHUNK, "231": 3 * CHUNK, "mixed, masked": None}
LONG_CAPTIONS = ("a pair of denim jeans", "a red t shirt", "denim jeans " * 50, "flat denim jeans " * 60)
ATTENTION_LIMIT = 2e-2
# Of SD 1.5's UNet at 512 px: heads, tokens of the picture, channels of a head.
ATTENTION_SIZES = ((4, 4096, 40), (8, 1024, 80), (8, 256, 160), (8, 64, 160))


def measurements(group: str, settings: Settings) -> list[Measurement]:
    same, robust = SameAsCpu(settings), Robustness(settings)
    precisions = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
    comparisons = [
        Measurement(f"loss and gradients in {name} against the CPU's fp32", lambda p=flag: same.compare(p), 6)
        for name, flag in precisions.items()
    ]
    attention = Measurement("attention in bf16 at SD 1.5's sizes, with masks, against fp32", same.attention, 4)
    return [*comparisons, attention, *robust.measurements()]


class SameAsCpu:
    """One batch of the starter model, or of a tiny one, read with captions of several lengths."""

    def __init__(self, settings: Settings):
        self.settings = settings

    @cached_property
    def trainer(self) -> Trainer:
        model = model_folder(self.settings) if self.settings.tiny else Path(STARTER)
        return Trainer(self.settings, model, picture_folder(self.settings, LONG_CAPTIONS, 4))

    def start(self, precision: str):
        return self.trainer.start(
            "--mixed_precision", precision, "--train_batch_size", 4, "--resolution", 64 if self.settings.tiny else 128,
            "--no_short_captions", "--caption_dropout", 0,
        )  # fmt: skip

    @cached_property
    def reference(self) -> dict[str, tuple[Batch, torch.Tensor, torch.Tensor]]:
        """For each length of captions the batch on the CPU, its loss and its gradients there in fp32."""
        started = self.start("no")
        (real, _), *_ = started.batches.for_step(0)
        assert real.conditions.attention_mask is not None, "the captions should be of several lengths"
        unet = load_unet(self.trainer.model).train()
        found = {}
        for name, length in LENGTHS.items():
            batch = moved(with_length(real, length), torch.device("cpu"), torch.float32)
            loss = diffusion_loss(unet, started.run.objective, batch).mean()
            found[name] = (batch, loss.detach(), take_gradients(unet, loss))
        return found

    def compare(self, precision: str) -> dict:
        if precision == "fp16":
            need_gpu()
        reference = self.reference
        started = self.start(precision)
        unet, run = started.state.unet, started.run
        errors = {}
        with exact_convolutions():
            for name, (batch, loss, gradients) in reference.items():
                own_batch = moved(batch, run.accelerator.device, run.compute_dtype)
                own_loss = diffusion_loss(unet, run.objective, own_batch).mean()
                own = take_gradients(unet, own_loss, LOSS_SCALE if precision == "fp16" else 1.0)
                errors[name] = relative(own_loss.detach(), loss), relative(own, gradients)
        limits = LIMITS[precision]
        wrong = {name: error for name, error in errors.items() if not within(error, limits)}
        assert not wrong, f"relative error of loss and gradients beyond {limits}, by tokens: {wrong}"
        return {f"{name} tokens": f"{loss:.1e}, {gradient:.1e}" for name, (loss, gradient) in errors.items()}

    def attention(self) -> dict:
        """Every kind of attention of a step, through PyTorch's own choice of kernel."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        sizes = ((2, 64, 40), (2, 16, 160)) if self.settings.tiny else ATTENTION_SIZES
        errors = {}
        for heads, tokens, channels in sizes:
            lengths = [(tokens, False), *((n * CHUNK, masked) for n in (1, 2, 3) for masked in (False, True))]
            errors[f"{tokens} x {channels}"] = max(
                attention_error(heads, tokens, channels, length, masked, device) for length, masked in lengths
            )
        wrong = {name: error for name, error in errors.items() if not error <= ATTENTION_LIMIT}
        assert not wrong, f"relative error beyond {ATTENTION_LIMIT}: {wrong}"
        return {name: f"{error:.1e}" for name, error in errors.items()}


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """PyTorch lets cuDNN use TF32 where fp32 is asked for."""
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = True


def with_length(batch: Batch, length: int | None) -> Batch:
    """The batch with captions of `length` tokens, none of them masked; None: as they are."""
    if length is None:
        return batch
    hidden_states = batch.conditions.hidden_states
    assert hidden_states.shape[1] >= length
    conditions = replace(batch.conditions, hidden_states=hidden_states[:, :length], attention_mask=None)
    return replace(batch, conditions=conditions)


def moved(batch: Batch, device: torch.device, text_dtype: torch.dtype) -> Batch:
    """On another device; text and mask in the dtype that the UNet reads."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    tensors = {name: value.to(device) for name, value in values.items() if isinstance(value, torch.Tensor)}
    return replace(batch, **tensors, conditions=batch.conditions.to(device, text_dtype))


def take_gradients(unet: torch.nn.Module, loss: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """All gradients in one fp32 vector on the CPU; the model keeps none."""
    (loss * scale).backward()
    parameters = [p for p in unet.parameters() if p.requires_grad]
    gradients = torch.cat([(p.grad.float() / scale).cpu().flatten() for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return gradients


def relative(found: torch.Tensor, reference: torch.Tensor) -> float:
    """The length of the difference by that of the reference; infinite where anything is not finite."""
    found, reference = found.float().cpu(), reference.float().cpu()
    error = ((found - reference).norm() / reference.norm()).item()
    return error if math.isfinite(error) else math.inf  # of NaN and 1 max() takes either


def within(errors: tuple[float, ...], limits: tuple[float, ...]) -> bool:
    return all(error <= limit for error, limit in zip(errors, limits, strict=True))


def attention_error(
    heads: int, tokens: int, channels: int, length: int, masked: bool, device: torch.device
) -> float:  # fmt: skip
    """The largest relative error of the output and of the three gradients."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, heads, count, channels) for count in (tokens, length, length, tokens)]
    query, key, value, upstream = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    bias = None
    if masked:  # as diffusers makes it: the second caption fills one chunk alone
        keep = torch.ones(2, length, device=device)
        keep[1, CHUNK:] = 0
        bias = ((1 - keep) * -10000.0)[:, None, None, :].repeat(1, heads, 1, 1)
    with sdpa_kernel(SDPBackend.MATH):
        exact = attention_and_gradients(query, key, value, bias, upstream)
    half = [None if t is None else t.bfloat16() for t in (query, key, value, bias, upstream)]
    return max(relative(own, right) for own, right in zip(attention_and_gradients(*half), exact, strict=True))


def attention_and_gradients(query, key, value, bias, upstream) -> list[torch.Tensor]:
    inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    output = F.scaled_dot_product_attention(*inputs, attn_mask=bias)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream)]

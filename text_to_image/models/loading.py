"""Loads the parts of a Stable Diffusion pipeline (1.x, 2.x, XL), and saves the pipeline with a trained UNet."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from models.defaults import GENERATION_DEFAULTS, TRAINING_DEFAULTS
from models.folders import (
    FolderLike,
    ModelShape,
    choose_variant,
    is_xl,
    kept_extras,
    list_parts,
    loading_errors,
    read_index,
    reads_zeros_for_empty,
    refuse_weights,
)
from models.text_encoding import PromptEncoder, TextEncoder
from runtime.devices import convolution_memory_format
from runtime.errors import UserError
from runtime.files import atomic_folder, set_aside

COPIED_FILES = ("LICENSE*", "LICENCE*", TRAINING_DEFAULTS, GENERATION_DEFAULTS)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}  # by the names that flags have
# What weights may be stored as, by safetensors' names.
STORED_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
PLAIN_ATTENTION_MAX_TOKENS = 2048

TextModel: TypeAlias = CLIPTextModel | CLIPTextModelWithProjection
Pipeline: TypeAlias = StableDiffusionPipeline | StableDiffusionXLPipeline


def quiet_libraries() -> None:
    """Silences the libraries' own progress bars and warnings. Errors and the bars of downloads still show."""
    hub_bars_disabled = are_progress_bars_disabled()
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    if not hub_bars_disabled:
        enable_progress_bars()  # transformers disabled the hub's bars too, and a download may take minutes


def load_unet(folder: FolderLike, dtype: torch.dtype = torch.float32, subfolder: str = "unet") -> UNet2DConditionModel:
    """The UNet, its convolution weights in the memory layout that suits the device."""
    unet = _load_weights(UNet2DConditionModel, folder, subfolder)
    # .to(): the libraries' versions name the dtype argument differently and differ in what they do without it.
    return unet.to(dtype, memory_format=convolution_memory_format())


def load_vae(folder: FolderLike, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    return _load_weights(AutoencoderKL, folder, "vae").to(dtype).eval()


def _load_weights(model_class: type[Any], folder: FolderLike, part: str) -> Any:
    """The part in the precision that the library chooses. UserError where a weight is NaN or infinite."""
    with loading_errors(folder, part):
        model = model_class.from_pretrained(
            Path(folder), subfolder=part, use_safetensors=True, variant=choose_variant(folder, part)
        )
    broken = [name for name, weight in model.named_parameters() if not is_finite(weight)]
    refuse_weights(f"{folder}: damaged: weights of its {part} are NaN or infinite", broken)
    return model


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite: in one pass, which takes a tenth of the time of `isfinite`."""
    return not tensor.numel() or bool(torch.stack(tensor.detach().aminmax()).isfinite().all())


def load_tokenizer(folder: FolderLike, part: str = "tokenizer") -> CLIPTokenizer:
    """The tokenizer; its model_max_length is what its text encoder really reads (77 for CLIP)."""
    text_encoder = part.replace("tokenizer", "text_encoder")
    with loading_errors(folder, part):
        tokenizer = CLIPTokenizer.from_pretrained(Path(folder), subfolder=part)
        positions = json.loads((folder / text_encoder / "config.json").read_text())["max_position_embeddings"]
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return tokenizer


def load_text_encoder(folder: FolderLike, part: str = "text_encoder") -> TextModel:
    """The text encoder in fp32; of XL's second one the projection, too, which gives the pooled output."""
    model_class = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
    return _load_weights(model_class, folder, part).to(torch.float32).eval()


def load_prompt_encoder(
    folder: FolderLike,
    max_chunks: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    load: Callable[[FolderLike, str], TextModel] = load_text_encoder,
) -> PromptEncoder:
    """The tokenizer and the text encoders, one or for XL two; `load` may change their weights."""
    endings = ("", "_2") if is_xl(folder) else ("",)
    tokenizers = [load_tokenizer(folder, f"tokenizer{ending}") for ending in endings]
    encoders = [
        TextEncoder(load(folder, f"text_encoder{ending}").to(device, dtype), tokenizer.pad_token_id, is_xl(folder))
        for ending, tokenizer in zip(endings, tokenizers, strict=True)
    ]
    return PromptEncoder(tokenizers[0], encoders, max_chunks, reads_zeros_for_empty(folder))


def load_safety_checker(folder: FolderLike) -> StableDiffusionSafetyChecker:
    return _load_weights(StableDiffusionSafetyChecker, folder, "safety_checker").to(torch.float32).eval()


def load_feature_extractor(folder: FolderLike) -> CLIPImageProcessor:
    """What makes the safety checker's input of pictures."""
    with loading_errors(folder, "feature_extractor"):
        return CLIPImageProcessor.from_pretrained(Path(folder), subfolder="feature_extractor")


def load_scheduler(folder: FolderLike) -> SchedulerMixin:
    """The model's own scheduler, of the class that model_index.json names."""
    with loading_errors(folder, "scheduler"):
        scheduler_class = getattr(diffusers, read_index(folder)["scheduler"][1])
        return scheduler_class.from_pretrained(Path(folder), subfolder="scheduler")


def load_noise_scheduler(
    folder: FolderLike, prediction_type: str | None = None, zero_snr: bool = False
) -> DDPMScheduler:
    """The model's noise schedule for training; `prediction_type` overrides the one in its config.

    `zero_snr` rescales the schedule to zero terminal SNR (arXiv:2305.08891). UserError for a prediction type that is
    not trained here.
    """
    overrides: dict[str, Any] = {"rescale_betas_zero_snr": True} if zero_snr else {}
    overrides |= {"prediction_type": prediction_type} if prediction_type else {}
    with loading_errors(folder, "scheduler"):
        scheduler = DDPMScheduler.from_pretrained(Path(folder), subfolder="scheduler", **overrides)
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction", "sample"):
        raise UserError(
            f"{folder}: the prediction type of its scheduler, {scheduler.config.prediction_type!r}, is not used here"
        )
    return scheduler


def set_attention(unet: UNet2DConditionModel, shape: ModelShape, height: int, width: int, device: str) -> None:
    """Plain attention for small images on a CPU; elsewhere diffusers' default, the fused kind, stays.

    On a CPU the fused backward pass is slow at small sizes: a step takes 1.3 times as long. At larger sizes the score
    matrices of plain attention would fill the memory. Sizes in pixels.
    """
    _, h, w = shape.latent_shape(height, width)
    tokens = max((h >> level) * (w >> level) for level in shape.attention_levels or (0,))
    if device == "cpu" and tokens <= PLAIN_ATTENTION_MAX_TOKENS:
        unet.set_attn_processor(AttnProcessor())


def save_pipeline(unet: UNet2DConditionModel, base: FolderLike, output: Path, noise_scheduler: DDPMScheduler) -> None:
    """Writes the pipeline of `base` with another UNet, all parts in fp32: plain diffusers cannot run mixed dtypes.

    The other parts of `base` stay as they are (SD 1.x's safety checker, the scheduler's class), and so do its licence
    and defaults. The UNet comes first and whole, whatever else fails.
    """
    with atomic_folder(output / "unet") as partial:
        unet.save_pretrained(partial, safe_serialization=True)
        earlier = set_aside(output / "unet")  # of an end of the run that failed later
    shutil.rmtree(earlier, ignore_errors=True)
    _save_other_parts(_load_pipeline(unet, base), base, output, noise_scheduler)


def _load_pipeline(unet: UNet2DConditionModel, base: FolderLike) -> Pipeline:
    kept = kept_extras(base)
    parts: dict[str, Any] = {"vae": load_vae(base), "unet": unet, "scheduler": load_scheduler(base)}
    parts |= {part: _tokenizer_as_it_is(base, part) for part in list_parts(base) if "tokenizer" in part}
    parts |= {part: load_text_encoder(base, part) for part in list_parts(base) if "text_encoder" in part}
    parts["feature_extractor"] = load_feature_extractor(base) if "feature_extractor" in kept else None
    if is_xl(base):
        zeros = reads_zeros_for_empty(base)
        return StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False)
    checker = load_safety_checker(base) if "safety_checker" in kept else None
    return StableDiffusionPipeline(**parts, safety_checker=checker, requires_safety_checker=checker is not None)


def _tokenizer_as_it_is(folder: FolderLike, part: str) -> CLIPTokenizer:
    with loading_errors(folder, part):
        return CLIPTokenizer.from_pretrained(Path(folder), subfolder=part)


def _save_other_parts(pipeline: Pipeline, base: FolderLike, output: Path, noise_scheduler: DDPMScheduler) -> None:
    """All but the UNet; model_index.json, which makes a pipeline of the folder, is the last of the parts."""
    pipeline.register_modules(scheduler=adapt_scheduler(pipeline.scheduler, noise_scheduler))
    for name, part in pipeline.components.items():
        if part is not None and name != "unet":
            part.save_pretrained(output / name)
        if isinstance(part, CLIPTokenizer):
            save_vocabulary(part, output / name)
    copy_license_and_defaults(base, output)
    pipeline.save_config(output)


def copy_license_and_defaults(base: FolderLike, output: Path) -> None:
    """Copies the base's licence and defaults to a model that was made from it."""
    for pattern in COPIED_FILES:
        for path in Path(base).glob(pattern):
            shutil.copyfile(path, output / path.name)


def adapt_scheduler(scheduler: SchedulerMixin, noise_scheduler: DDPMScheduler) -> SchedulerMixin:
    """The pipeline's scheduler with the prediction type that was trained.

    A schedule with zero terminal SNR has to be sampled from its last timestep on (arXiv:2305.08891, section 3.3).
    """
    scheduler.register_to_config(prediction_type=noise_scheduler.config.prediction_type)
    if not noise_scheduler.config.rescale_betas_zero_snr:
        return scheduler
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    if "rescale_betas_zero_snr" in scheduler.config:
        return scheduler.from_config(scheduler.config, **changes)
    return DDIMScheduler.from_config(scheduler.config, **changes)  # SD 1.x's own, PNDM, has no such schedule


def save_vocabulary(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes vocab.json and merges.txt beside tokenizer.json: transformers 5 writes only the latter."""
    vocabulary, merges = read_vocabulary(tokenizer)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def read_vocabulary(tokenizer: CLIPTokenizer) -> tuple[dict[str, int], list[str]]:
    """(the tokens' ids, the pairs that are merged), as vocab.json and merges.txt have them."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return model["vocab"], [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]

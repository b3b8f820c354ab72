"""Checks from configs and the headers of weights alone that a model can be loaded, run and saved again."""

import functools
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedModel

from models.conditions import Conditions
from models.folders import (
    EXTRAS,
    INDEX_FILE,
    PARTS,
    TIME_IDS,
    XL_PARTS,
    FolderLike,
    ModelShape,
    StoredTensor,
    is_xl,
    kept_extras,
    list_loaded_weights,
    list_parts,
    loading_errors,
    read_header,
    read_index,
    read_shape,
    refuse_weights,
)
from models.loading import (
    STORED_DTYPES,
    load_feature_extractor,
    load_noise_scheduler,
    load_scheduler,
    load_tokenizer,
    read_vocabulary,
)
from models.sampling import load_sampler
from models.text_encoding import TextEncoder, split_tokens
from runtime.errors import UserError

MODELS = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
    "safety_checker": StableDiffusionSafetyChecker,
}
# What model_index.json may name; schedulers are told by what they can do.
CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
# Names that the libraries still read, and what they are called now.
OLD_NAMES = (
    (re.compile(r"^text_model\."), ""),  # transformers before 5.6
    (re.compile(r"^vision_model\.vision_model\."), "vision_model."),
    (re.compile(r"(attentions\.\d+)\.query\."), r"\1.to_q."),  # diffusers before 0.15, in the VAE
    (re.compile(r"(attentions\.\d+)\.key\."), r"\1.to_k."),
    (re.compile(r"(attentions\.\d+)\.value\."), r"\1.to_v."),
    (re.compile(r"(attentions\.\d+)\.proj_attn\."), r"\1.to_out.0."),
)
POSITION_IDS = "position_ids"  # numbers 0, 1, 2, ..., which older files hold and newer ones do not
TOKENIZERS = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}  # whose tokens they make
SHORTEST_CHUNK = 3  # tokens: start, one word, end


def check_model(folder: FolderLike) -> None:
    """UserError that names the part, the file and the weights where the model is not whole or not one we train."""
    files = [file for part in (*PARTS, *XL_PARTS, *EXTRAS) for file in Path(folder, part).glob("*")] + [
        folder / INDEX_FILE
    ]
    states = frozenset((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # libraries say it again where the model is used
        _check_once(folder, states)


@functools.lru_cache(maxsize=8)
def _check_once(folder: FolderLike, states: frozenset[tuple[Path, int, int]]) -> None:
    """Not again while the files of the model stay as they are: a check takes up to two seconds."""
    _check_classes(folder)
    shape = read_shape(folder)
    parts = {part: _check_weights(folder, part) for part in list_parts(folder) if part in MODELS}
    _check_scaling(folder, parts["vae"])
    _check_tokenizers(folder, parts)
    _check_schedulers(folder, parts["unet"])
    _check_forward(folder, parts, shape)
    _check_extras(folder)


def _check_classes(folder: FolderLike) -> None:
    index = read_index(folder)
    for part in list_parts(folder):
        found = index[part][1] if part in index else None
        if found is None or found not in CLASSES.get(part, (found,)):
            wanted = f", where {CLASSES[part][0]} is needed" if part in CLASSES else ""
            raise UserError(f"{folder}: {INDEX_FILE} names {found or 'nothing'} as its {part}{wanted}")


def _check_extras(folder: FolderLike) -> None:
    """Those that a result will have; pictures are shown to that safety checker."""
    kept = kept_extras(folder)
    if "feature_extractor" in kept:
        extractor = load_feature_extractor(folder)
        with loading_errors(folder, "feature_extractor"):
            pixels = extractor([Image.new("RGB", (64, 64))], return_tensors="pt").pixel_values
    if "safety_checker" in kept:
        checker = _check_weights(folder, "safety_checker")
        with loading_errors(folder, "safety_checker, or its feature_extractor,"), torch.device("meta"):
            checker.visual_projection(checker.vision_model(pixels.to("meta"))[1])


# --- weights --------------------------------------------------------------------------------------------------------


def _check_weights(folder: FolderLike, part: str) -> Any:
    """The part without data (on the meta device). UserError if a weight of it is missing, unexpected or misshapen."""
    with loading_errors(folder, part), torch.device("meta"):
        model = _build(folder, part)
        files = list_loaded_weights(folder, part, by_transformers=isinstance(model, PreTrainedModel))
    wanted = {_current_name(name): tuple(weight.shape) for name, weight in model.state_dict().items()}
    found = {_current_name(name): tensor for file in files for name, tensor in read_header(file).items()}
    for weights in (wanted, found):
        for name in [name for name in weights if name.endswith(POSITION_IDS)]:
            del weights[name]
    _compare_weights(_display_files(folder, files), wanted, found)
    return model


def _build(folder: FolderLike, part: str) -> torch.nn.Module:
    model_class = MODELS[part]
    if issubclass(model_class, PreTrainedModel):
        config = model_class.config_class.from_pretrained(Path(folder), subfolder=part)
        if not isinstance(config.model_type, str):  # by which transformers looks up how weights are named
            raise ValueError(f"its model_type is {config.model_type!r}")
        return model_class(config)
    return model_class.from_config(model_class.load_config(Path(folder), subfolder=part))


def _compare_weights(where: str, wanted: dict[str, tuple[int, ...]], found: dict[str, StoredTensor]) -> None:
    shapes = {name: tensor.shape for name, tensor in found.items()}
    misshapen = [
        f"{name} {shapes[name]}, not {shape}" for name, shape in wanted.items() if shapes.get(name, shape) != shape
    ]
    stored = [f"{name} as {tensor.dtype}" for name, tensor in found.items() if tensor.dtype not in STORED_DTYPES]
    refuse_weights(f"{where}: weights are missing", wanted.keys() - found.keys())
    refuse_weights(f"{where}: it has weights that config.json does not ask for", found.keys() - wanted.keys())
    refuse_weights(f"{where}: weights have other sizes than config.json asks for", misshapen)
    refuse_weights(f"{where}: only fp16, bf16, fp32 and fp64 can be used, and it has", stored)


def _current_name(name: str) -> str:
    for old, new in OLD_NAMES:
        name = old.sub(new, name)
    return name


def _display_files(folder: FolderLike, files: list[Path]) -> str:
    more = f" and {len(files) - 1} more files" if len(files) > 1 else ""
    return f"{folder}: {files[0].relative_to(Path(folder))}{more}"


def _check_scaling(folder: FolderLike, vae: AutoencoderKL) -> None:
    """UserError unless latents can be multiplied with the VAE's factor, and divided by it again, in fp32."""
    factor, smallest = vae.config.scaling_factor, torch.finfo(torch.float32).tiny
    with loading_errors(folder, "vae"):
        if not isinstance(factor, int | float) or not smallest < factor < 1 / smallest:
            raise ValueError(f"its scaling_factor is {factor!r}, where a number above 0 belongs")


# --- tokenizer and schedulers ---------------------------------------------------------------------------------------


def _check_tokenizers(folder: FolderLike, parts: Mapping[str, Any]) -> None:
    """UserError unless each fits its text encoder, and XL's two read a prompt as the same tokens."""
    tokenizers = {part: load_tokenizer(folder, part) for part in list_parts(folder) if part in TOKENIZERS}
    for part, tokenizer in tokenizers.items():
        _check_tokenizer(folder, part, tokenizer, parts[TOKENIZERS[part]].config.vocab_size)
    first, *others = tokenizers.values()
    if any(other.get_vocab() != first.get_vocab() for other in others):
        raise UserError(f"{folder}: its tokenizer_2 has other tokens than its tokenizer; XL's are the same")


def _check_tokenizer(folder: FolderLike, part: str, tokenizer: CLIPTokenizer, vocab_size: int) -> None:
    """UserError unless the text encoder has an embedding of each of its tokens, and none of these is missing."""
    with loading_errors(folder, part):
        if not isinstance(tokenizer.model_max_length, int) or tokenizer.model_max_length < SHORTEST_CHUNK:
            raise ValueError(f"it reads {tokenizer.model_max_length!r} tokens at once")
        split_tokens(tokenizer, "a picture", 1)
        _check_merges(tokenizer)
        ids = set(tokenizer.get_vocab().values())
        if missing := set(range(max(ids))) - ids:
            raise ValueError(f"its vocabulary lacks token {min(missing)}, or has another twice")
        if len(ids) > vocab_size:
            raise ValueError(f"it has {len(ids)} tokens, and the text encoder {vocab_size}; both must be of one model")


def _check_merges(tokenizer: CLIPTokenizer) -> None:
    """ValueError if words that the vocabulary knows would be read letter by letter, as their merges are missing."""
    vocabulary, merges = read_vocabulary(tokenizer)
    others = vocabulary.keys() - {merge.replace(" ", "", 1) for merge in merges} - set(tokenizer.all_special_tokens)
    words = {token for token in others if len(token.removesuffix("</w>")) > 1} - set(tokenizer.get_added_vocab())
    if words:
        raise ValueError(f"its merges do not make {len(words)} of its tokens, such as {min(words)}")


def _check_schedulers(folder: FolderLike, unet: UNet2DConditionModel) -> None:
    """The model's own scheduler, which the pipeline looks at together with the UNet; that of training; and the sampler
    that pictures are generated with by default."""
    own = load_scheduler(folder)
    noise_scheduler = load_noise_scheduler(folder)
    with loading_errors(folder, "scheduler"):
        if not hasattr(own, "alphas_cumprod"):
            raise ValueError(f"{type(own).__name__} has no noise schedule of Stable Diffusion")
        kept, last = noise_scheduler.alphas_cumprod[:-1], noise_scheduler.alphas_cumprod[-1:]
        zero_snr = noise_scheduler.config.rescale_betas_zero_snr
        if not len(last) or not ((kept > 0) & (kept <= 1)).all() or not (0 < last <= 1 or (zero_snr and last == 0)):
            raise ValueError("its betas make no noise schedule")
        own.set_timesteps(1)
        _take_steps(load_sampler(folder))
    with loading_errors(folder, "unet or scheduler"):
        if is_xl(folder):
            StableDiffusionXLPipeline(None, None, None, None, None, unet, own, add_watermarker=False)
        else:
            StableDiffusionPipeline(None, None, None, unet, own, None, None, requires_safety_checker=False)


def _take_steps(sampler: SchedulerMixin) -> None:
    """Two, of a single latent; ValueError if they do not lead to a finite one."""
    sampler.set_timesteps(2)
    latents = torch.ones(1, 1, 1, 1)
    for t in sampler.timesteps:
        latents = sampler.step(latents, t, latents).prev_sample
    if not latents.isfinite().all():
        raise ValueError("sampling with it overflows")


# --- a step without data --------------------------------------------------------------------------------------------


@torch.no_grad()
def _check_forward(folder: FolderLike, parts: Mapping[str, Any], shape: ModelShape) -> None:
    """UserError if one of the parts, which have no data, cannot run, or if they do not fit together."""
    unet, vae = parts["unet"], parts["vae"]
    side, tokens = shape.size_multiple, load_tokenizer(folder).model_max_length
    pixels, latents = (1, 3, side, side), (1, *shape.latent_shape(side, side))
    text = (1, tokens, unet.config.cross_attention_dim)
    with loading_errors(folder, "unet"), torch.device("meta"):
        pooled = torch.zeros(1, _pooled_size(folder, unet))
        conditions = Conditions(torch.zeros(text), None, pooled, torch.zeros(1, TIME_IDS))
    steps: tuple[tuple[str, Callable[[], torch.Tensor], tuple[int, ...]], ...] = (
        ("text_encoder", lambda: _read_text(folder, parts, tokens)[0], text),
        ("text_encoder_2", lambda: _read_text(folder, parts, tokens)[1], tuple(pooled.shape)),
        ("vae", lambda: vae.encode(torch.zeros(pixels)).latent_dist.mode() * vae.config.scaling_factor, latents),
        ("unet", lambda: unet(torch.zeros(latents), torch.zeros(1), **conditions.unet_inputs()).sample, latents),
        ("vae", lambda: vae.decode(torch.zeros(latents) / vae.config.scaling_factor).sample, pixels),
    )
    for part, run, wanted in steps:
        with loading_errors(folder, part), torch.device("meta"):
            if (found := tuple(run().shape)) != wanted:
                raise ValueError(f"it gives a tensor {found}, and the other parts need {wanted}")


def _read_text(folder: FolderLike, parts: Mapping[str, Any], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and pooled output of one chunk."""
    ids, xl = torch.zeros(1, tokens, dtype=torch.long), is_xl(folder)
    read = [TextEncoder(parts[part], 0, penultimate=xl)(ids) for part in TOKENIZERS.values() if part in parts]
    hidden_states, pooled = (torch.cat(outputs, dim=-1) for outputs in zip(*read, strict=True))
    return hidden_states, pooled


def _pooled_size(folder: FolderLike, unet: UNet2DConditionModel) -> int:
    """What XL's UNet reads of the pooled text beside the embeddings of its sizes; 0 for other models."""
    if not is_xl(folder):
        return 0
    config = unet.config
    return config.projection_class_embeddings_input_dim - TIME_IDS * config.addition_time_embed_dim

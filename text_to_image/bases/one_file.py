"""Makes a diffusers folder of a one-file checkpoint, as half of the world's Stable Diffusion models are; once, and
without a change to any weight.
"""

import functools
import hashlib
import json
import math
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from bases.checkpoint_files import EMA_PREFIX, CheckpointFile, Sampling, Shape, check_kind, read_sampling
from bases.families import Family
from bases.ldm_keys import VAE_PREFIX, StateDict, turn_round, unet_key_map, vae_key_map
from bases.one_file_configs import make_configs
from bases.pickles import PICKLE_SUFFIXES
from bases.text_encoder_keys import PROJECTION, TextEncoderFormat, is_transposed, names_in_file, plain_key
from bases.tokenizer_files import (
    check_vocabulary,
    find_tokenizer,
    hash_tokenizer,
    locate_tokenizer_files,
    write_tokenizer,
)
from models.folders import refuse_weights
from models.loading import STORED_DTYPES
from runtime.errors import UserError, WorkError, advice_for, first_line
from runtime.files import atomic_folder, set_mode, write_text_atomically
from runtime.paths import display_path

SUFFIX = ".safetensors"
FORMAT = 2  # of converted folders; raise it when another folder is made of the same file
SOURCE_FILE = "source.json"  # in a converted folder: the file that it was made of
# What files hold beside the weights that are used: the noise schedule, the parts of CLIP that only compare texts with
# images, and the EMA where there are other weights.
NOT_USED = re.compile(
    r"betas|(\w+_)?alphas_cumprod(_prev)?|posterior_(variance|log_variance_clipped|mean_coef[12])|lvlb_weights|logvar|"
    r"scale_factor|v_pred|ztsnr|denoiser\.(log_)?sigmas|model_ema\..+|"
    r"(cond_stage_model|conditioner\.embedders\.[01])\.((transformer|model)\.)*"
    r"((text_model\.)?embeddings\.position_ids|logit_scale|text_projection(\.weight)?|attn_mask)|"
    r"cond_stage_model\.model\.transformer\.resblocks\.23\..+"  # the last layer of OpenCLIP's ViT-H
)


@dataclass(frozen=True)
class Conversion:
    """What is made of a file: configs, and for each part the weights in the file that it is made of."""

    kind: str  # in words: version, prediction type, which of two sets of weights
    configs: dict[str, dict[str, Any]]
    parts: dict[str, dict[str, list[str]]]  # {part: {name in the file: its diffusers keys}}
    shapes: dict[str, dict[str, Shape]]  # {part: {diffusers key: shape}}
    dtypes: dict[str, torch.dtype]  # {part: of its weights in the folder}

    @property
    def size(self) -> int:
        """Bytes of the weights in the folder."""
        weights = ((part, shape) for part, shapes in self.shapes.items() for shape in shapes.values())
        return sum(math.prod(shape) * self.dtypes[part].itemsize for part, shape in weights)


def is_one_file(path: Path) -> bool:
    """Whether `path` names one file, which may be gone, and no folder or hub id."""
    return path.is_file() or path.suffix in (SUFFIX, *PICKLE_SUFFIXES) and not path.is_dir()


def convert_one_file(
    path: Path, asked: str, to: Path, tokenizer: Path | None, allow_pickle: bool, cache_dir: Path | None
) -> Path:
    """The diffusers folder below `to` that holds the weights of `path`; made only once, as its name follows from the
    content of the file, of the .yaml beside it and of `tokenizer` (None: CLIP's, from the hub).

    Once it is made, `path` and `tokenizer` may be gone. UserError that begins with `asked` if the file is not a whole
    Stable Diffusion 1.x, 2.x or XL, or cannot be read.
    """
    _check_suffix(path, asked, allow_pickle)
    source = describe_source(path, tokenizer)
    if found := _find_converted(source, to):
        _print_gone(source, found)
        return found
    if not path.is_file():
        raise UserError(
            f"{asked}: no such file, and {display_path(to)} has nothing that was made of it with this --tokenizer; "
            "name the file where it is now"
        )
    tokenizer = find_tokenizer(tokenizer) if tokenizer else None
    converted = to / f"{path.stem}-{_hash_content(path, source['tokenizer_hash'])[:8]}"
    if not converted.is_dir():
        _convert(path, asked, converted, tokenizer, cache_dir)
    with suppress(OSError):  # it only saves reading the file again
        write_text_atomically(converted / SOURCE_FILE, json.dumps(source, indent=2) + "\n")
    return converted


def _convert(path: Path, asked: str, converted: Path, tokenizer: Path | None, cache_dir: Path | None) -> None:
    with open_checkpoint(path, asked) as file:
        conversion = plan_conversion(file, asked)
        tokenizer_files = locate_tokenizer_files(tokenizer, asked, cache_dir)
        _check_disk_space(path, conversion.size, converted.parent)
        print(f"converting {display_path(path)} ({conversion.kind}) into {display_path(converted)}", flush=True)
        with atomic_folder(converted) as partial:
            for number, encoder in enumerate(file.family.text_encoders):
                write_tokenizer(tokenizer_files, encoder.padding, partial / encoder.tokenizer, is_second=number > 0)
                check_vocabulary(partial, encoder.tokenizer, conversion.configs[encoder.part]["vocab_size"], asked)
            write_folder(file, conversion, partial)


def _check_suffix(path: Path, asked: str, allow_pickle: bool) -> None:
    if path.suffix in PICKLE_SUFFIXES and not allow_pickle:
        raise UserError(
            f"{asked}: a pickle, which can run code when it is read; use a .safetensors file, or, if you trust its "
            "maker, add --allow_pickle, which converts it"
        )
    if path.suffix not in (SUFFIX, *PICKLE_SUFFIXES):
        raise UserError(f"{asked}: not a model; name a folder in diffusers' format, a hub id or a {SUFFIX} file")


def _hash_content(path: Path, tokenizer_hash: str | None) -> str:
    digest = hashlib.sha256(bytes([FORMAT]))
    for part in (path, path.with_suffix(".yaml")):
        if part.is_file():
            with open(part, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    digest.update((tokenizer_hash or "").encode())
    return digest.hexdigest()


def _check_disk_space(path: Path, needed: int, to: Path) -> None:
    existing = next(folder for folder in (to, *to.parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise WorkError(
            f"{to}: {path.name} as a folder takes {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free; make room"
        )


# --- what was converted before --------------------------------------------------------------------------------------


def describe_source(path: Path, tokenizer: Path | None) -> dict[str, Any]:
    """What shows without reading it that a file, the .yaml beside it and a tokenizer are those of an earlier start."""
    return {
        "format": FORMAT,
        "file": str(path.resolve()),
        "state": _state(path),
        "yaml_state": _state(path.with_suffix(".yaml")),
        "tokenizer": str(tokenizer) if tokenizer else None,
        "tokenizer_hash": hash_tokenizer(tokenizer) if tokenizer else None,
    }


def _state(path: Path) -> list[int] | None:
    """Size and times of a file; None where there is none."""
    if not path.is_file():
        return None
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def _find_converted(source: dict[str, Any], to: Path) -> Path | None:
    """The folder that was made of `source`, the last one that was used; what is gone counts by its name alone."""
    names = ["file"]
    names += ["format", "state", "yaml_state"] if source["state"] else []
    names += ["tokenizer_hash"] if source["tokenizer_hash"] else ["tokenizer"]
    for record in sorted(to.glob(f"*/{SOURCE_FILE}"), key=lambda record: -record.stat().st_mtime_ns):
        with suppress(OSError, ValueError, AttributeError):  # not ours, or damaged
            found = json.loads(record.read_text(encoding="utf-8"))
            if all(found.get(name) == source[name] for name in names):
                return record.parent
    return None


def _print_gone(source: dict[str, Any], converted: Path) -> None:
    gone = [source["file"]] if not source["state"] else []
    gone += [source["tokenizer"]] if source["tokenizer"] and not source["tokenizer_hash"] else []
    if gone and os.environ.get("RANK", "0") == "0":
        print(f"gone: {', '.join(gone)}; what was made of it is used: {display_path(converted)}", flush=True)


# --- reading --------------------------------------------------------------------------------------------------------


@contextmanager
def open_checkpoint(path: Path, asked: str) -> Iterator[CheckpointFile]:
    """The file, of which only the header is read. A pickle is read as a whole, and no code in it is run."""
    if path.suffix != SUFFIX:
        weights = _load_pickle(path, asked)
        shapes = {key: tuple(weight.shape) for key, weight in weights.items()}
        names = {dtype: name for name, dtype in STORED_DTYPES.items()}
        dtypes = {key: names.get(weight.dtype, str(weight.dtype)) for key, weight in weights.items()}
        yield CheckpointFile(path, shapes, dtypes, {}, weights.__getitem__)
        return
    try:
        file = safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        if advice_for(error) or isinstance(error, PermissionError):
            raise
        raise UserError(f"{asked}: {_why_not_safetensors(path)} ({first_line(error)})") from None
    with file as opened:
        slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118 (no dict)
        shapes = {key: tuple(found.get_shape()) for key, found in slices.items()}
        dtypes = {key: str(found.get_dtype()) for key, found in slices.items()}
        yield CheckpointFile(path, shapes, dtypes, opened.metadata() or {}, opened.get_tensor)


def _why_not_safetensors(path: Path) -> str:
    with open(path, "rb") as file:
        head = file.read(64)
    if zipfile.is_zipfile(path) or head[:1] == b"\x80":
        return "a pickle, though it is named as a safetensors file; rename it to .ckpt if you trust its maker"
    if head.startswith(b"version https://git-lfs"):
        return "a note of Git LFS in place of the file; `git lfs pull` fetches it"
    return "not a whole safetensors file; download it again"


def _load_pickle(path: Path, asked: str) -> StateDict:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling arbitrary bytes raises almost anything
        if advice_for(error) or isinstance(error, PermissionError):
            raise
        raise UserError(f"{asked}: cannot be read as weights alone: {first_line(error)}") from None
    weights = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    items = weights.items() if isinstance(weights, dict) else ()
    return {key: weight.detach() for key, weight in items if isinstance(key, str) and _is_plain_tensor(weight)}


def _is_plain_tensor(weight: object) -> bool:
    return isinstance(weight, torch.Tensor) and weight.layout == torch.strided and weight.device.type == "cpu"


# --- names ----------------------------------------------------------------------------------------------------------


def plan_conversion(file: CheckpointFile, asked: str) -> Conversion:
    """UserError for a file of another kind, and one that names the weights that are missing, too many or misshapen."""
    check_kind(file, asked)
    sampling = read_sampling(file, asked)
    configs = make_configs(file, sampling, asked)
    shapes = _shapes_of_model(configs, file.family)
    parts = {
        "unet": {file.unet_name(name): keys for name, keys in turn_round(unet_key_map(shapes["unet"])).items()},
        "vae": {VAE_PREFIX + name: keys for name, keys in turn_round(vae_key_map(shapes["vae"])).items()},
        **{
            encoder.part: _text_encoder_names(file, encoder, shapes[encoder.part])
            for encoder in file.family.text_encoders
        },
    }
    wanted = {name for names in parts.values() for name in names}
    extra = [name for name in file.shapes if name not in wanted and not NOT_USED.fullmatch(name)]
    refuse_weights(f"{asked}: weights are missing", wanted - file.shapes.keys())
    refuse_weights(f"{asked}: it has weights that {file.family.name} does not have", extra)
    dtypes = {part: _common_dtype(file, part, names, asked) for part, names in parts.items()}
    conversion = Conversion(_describe(file, sampling), configs, parts, shapes, dtypes)
    refuse_weights(
        f"{asked}: weights have other sizes than the rest of the file asks for", _misshapen(file, conversion)
    )
    return conversion


def _describe(file: CheckpointFile, sampling: Sampling) -> str:
    zero_snr = ", zero terminal SNR" if sampling.zero_snr else ""
    ema = ""
    if file.has_ema and file.has_unet:
        ema = f"; its weights are taken, as other programs do, and those of their EMA ({EMA_PREFIX}*) left out"
    elif file.has_ema:
        ema = f"; the weights of the EMA ({EMA_PREFIX}*) are taken, as it has no others"
    return f"{file.family.name}, {sampling.prediction_type}{zero_snr}{ema}"


def _shapes_of_model(configs: Mapping[str, dict[str, Any]], family: Family) -> dict[str, dict[str, Shape]]:
    """{part: {key of its state dict: shape}}, of models without data."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers of size 0, where weights are missing
        models: dict[str, torch.nn.Module] = {
            "unet": UNet2DConditionModel.from_config(configs["unet"]),
            "vae": AutoencoderKL.from_config(configs["vae"]),
        }
        for encoder in family.text_encoders:
            model_class = CLIPTextModelWithProjection if encoder.has_projection else CLIPTextModel
            models[encoder.part] = model_class(CLIPTextConfig(**configs[encoder.part]))
    return {
        part: {
            plain_key(key): tuple(weight.shape)
            for key, weight in model.state_dict().items()
            if not key.endswith("position_ids")
        }
        for part, model in models.items()
    }


def _text_encoder_names(file: CheckpointFile, encoder: TextEncoderFormat, keys: Iterable[str]) -> dict[str, list[str]]:
    prefix = file.text_prefix(encoder)
    return {
        file.projection_name(encoder) if name == PROJECTION else f"{prefix}{name}": joined
        for name, joined in names_in_file(encoder, keys).items()
    }


def _common_dtype(file: CheckpointFile, part: str, names: Iterable[str], asked: str) -> torch.dtype:
    """The precision of a part's weights in the file; fp32 where that is not one for all."""
    found = {file.dtypes[name] for name in names}
    if unknown := sorted(found.difference(STORED_DTYPES)):
        known = "fp16, bf16, fp32 and fp64"
        raise UserError(f"{asked}: its {part} is stored as {', '.join(unknown)}; {known} can be used")
    return functools.reduce(torch.promote_types, (STORED_DTYPES[name] for name in found))


def _misshapen(file: CheckpointFile, conversion: Conversion) -> list[str]:
    """The names in the file whose weights cannot become those of the model."""
    found = []
    for part, names in conversion.parts.items():
        for name, keys in names.items():
            first, *rest = conversion.shapes[part][keys[0]]
            wanted, shape = (first * len(keys), *rest), file.shapes[name]
            wanted = wanted[::-1] if is_transposed(name) else wanted
            if shape != wanted and shape != (*wanted, 1, 1):  # the VAE's attention: a 1x1 convolution in the file
                found.append(f"{name} {shape}")
    return found


# --- writing --------------------------------------------------------------------------------------------------------


def write_folder(file: CheckpointFile, conversion: Conversion, folder: Path) -> None:
    """Writes all but the tokenizers, one part after the other."""
    for part in conversion.parts:
        stem = "diffusion_pytorch_model" if part in ("unet", "vae") else "model"
        path = folder / part / f"{stem}{SUFFIX}"
        _write_json(folder / part / "config.json", conversion.configs[part])
        save_file(read_part(file, conversion, part), path, {"format": "pt"})
        set_mode(
            path, (folder / part / "config.json").stat().st_mode
        )  # save_file makes it readable for its owner only
    _write_json(folder / "scheduler" / "scheduler_config.json", conversion.configs["scheduler"])
    _write_json(folder / "model_index.json", _model_index(file.family, conversion.configs["scheduler"]))


def _model_index(family: Family, scheduler: Mapping[str, Any]) -> dict[str, Any]:
    index: dict[str, Any] = {
        "_class_name": family.pipeline,
        "feature_extractor": [None, None],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        **family.settings,
    }
    for encoder in family.text_encoders:
        index[encoder.part] = ["transformers", f"CLIPTextModel{'WithProjection' * encoder.has_projection}"]
        index[encoder.tokenizer] = ["transformers", "CLIPTokenizer"]
    return index


def read_part(file: CheckpointFile, conversion: Conversion, part: str) -> StateDict:
    """A part's weights under diffusers' names, all in one precision."""
    shapes, dtype = conversion.shapes[part], conversion.dtypes[part]
    return {
        _name_in_folder(part, key): weight.reshape(shapes[key]).to(
            dtype, copy=True, memory_format=torch.contiguous_format
        )
        for name, keys in conversion.parts[part].items()
        for key, weight in zip(keys, _read_weight(file, name).chunk(len(keys)), strict=True)
    }


def _read_weight(file: CheckpointFile, name: str) -> torch.Tensor:
    weight = file.read(name)
    return weight.T if is_transposed(name) else weight


def _name_in_folder(part: str, key: str) -> str:
    """The layout of a text encoder that every version of transformers reads."""
    is_wrapped = part not in ("unet", "vae") and not key.startswith(PROJECTION)
    return f"text_model.{key}" if is_wrapped else key


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

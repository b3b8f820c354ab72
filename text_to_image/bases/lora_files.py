"""LoRAs, LoHas and LoKrs from files, whoever named their layers: read, checked against a base, added to its weights.

A layer of a base has one name in diffusers and others in kohya's scripts, peft and the original Stable Diffusion code.
With `_` for each dot and without prefixes they are looked up in one table, which is made from the base itself.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from bases.ldm_keys import unet_key_map
from models.folders import FolderLike, loading_errors, not_whole, read_index, read_weight_shapes
from models.loading import TEXT_ENCODERS, is_finite
from runtime.errors import UserError
from runtime.text_files import read_utf8

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PEFT_PREFIX = "base_model.model."
PEFT_KINDS = ("LORA", "LOHA", "LOKR")
PREFIXES = re.compile(
    r"(?:base_model\.model\.|unet\.|text_encoder(?:_2)?\.|lora_(?:unet|te[12]?)_|(?:model\.)?diffusion_model\."
    r"|text_model[._])*"
)
SECOND_ENCODER = "text_encoder_2."  # before the names of its layers, which the first of XL has too
OF_SECOND_ENCODER = re.compile(r"(?:base_model\.model\.)?(?:text_encoder_2\.|lora_te2_)")
# What one tensor is of a layer. peft's own state dicts have the adapter's name before `.weight`, or at the end.
TENSOR = re.compile(
    r"(?P<layer>.+?)(?:[._]lora(?:_linear_layer)?[._](?P<lora>A|B|down|up|mid)(?:\.\w+)?\.weight"
    r"|\.(?P<other>(?:hada|lokr)_[wt][12](?:_[ab])?)(?:\.\w+)?"
    r"|\.(?P<alpha>alpha))"
)
ROLES = {"A": "down", "B": "up"}
OTHER_ADAPTERS = {
    "dora_scale": "a DoRA", "lora_magnitude_vector": "a DoRA", "oft_": "an OFT", "boft_": "a BOFT",
    "ia3_": "an (IA)3", ".diff": "a full-difference", ".a1.": "a GLoRA", ".w_norm": "a norm", ".on_input": "an (IA)3",
}  # fmt: skip
# The attention's projections in diffusers' files of 2023.
OLD_ENDINGS = {
    "_to_out_0": "_to_out", "_q_proj": "_to_q", "_k_proj": "_to_k", "_v_proj": "_to_v", "_out_proj": "_to_out",
}  # fmt: skip

Matrices = dict[str, torch.Tensor]  # of one layer: down and up, hada_w1_a, …, and perhaps its alpha
Shapes = Mapping[str, tuple[int, ...]]  # {name of a weight or layer of the base: its shape}


class LoraFile(NamedTuple):
    """An adapter's file, and the settings that peft or diffusers keep beside its tensors."""

    path: Path
    layers: dict[str, Matrices]  # by the layer's name in the file, without prefixes
    config: dict[str, Any]  # as in peft's adapter_config.json; diffusers' begin with 'unet.' or 'text_encoder.'


def files_of_lora(path: Path) -> list[Path]:
    """All files that the adapter in `path` consists of: peft keeps alpha in a second one."""
    config = path.parent / PEFT_CONFIG
    return [path, config] if path.name == PEFT_FILE and config.is_file() else [path]


def read_lora_file(path: Path, device: str = "cpu") -> LoraFile:
    """Every layer in the file; on the device 'meta' only the shapes are read.

    UserError for a file that is damaged, of another kind of adapter, or whose settings are of other types than peft's.
    """
    layers: dict[str, Matrices] = {}
    with loading_errors(path.parent, path.name), _open(path) as opened:
        metadata = opened.metadata() or {}
        names = list(opened.keys())
        for name in names:
            layer, role = _split_name(path, name)
            is_small = role == "alpha" or device != "meta"
            tensor = opened.get_tensor(name) if is_small else _meta_tensor(opened.get_slice(name).get_shape())
            layers.setdefault(layer, {})[role] = tensor.float()
        config = _read_config(path, metadata, names)
    if not layers:
        raise UserError(f"{path}: not a LoRA: there is no weight in it")
    for layer, matrices in layers.items():
        if fault := _layer_fault(layer, matrices):
            raise UserError(f"{path}: damaged: {fault}")
    return LoraFile(path, layers, config)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise not_whole(path, error) from None


def _meta_tensor(shape: list[int]) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def _split_name(path: Path, name: str) -> tuple[str, str]:
    """(the layer, which of its tensors). UserError for one that LoRA, LoHa and LoKr do not have."""
    match = TENSOR.fullmatch(name)
    if match and (layer := PREFIXES.sub("", match["layer"].replace(".processor.", "."), count=1)):
        role = match["lora"] or match["other"] or match["alpha"]
        return SECOND_ENCODER * bool(OF_SECOND_ENCODER.match(name)) + layer, ROLES.get(role, role)
    kind = next((kind for part, kind in OTHER_ADAPTERS.items() if part in name), None)
    if kind:
        raise UserError(f"{path}: {kind} adapter ({name}); LoRA, LoHa and LoKr can be used")
    raise UserError(f"{path}: not a LoRA for Stable Diffusion 1.x, 2.x or XL: it has {name}")


def _layer_fault(layer: str, matrices: Matrices) -> str | None:
    """What is wrong with the tensors of a layer, whatever the base; None where nothing is."""
    if not _is_complete(matrices):
        return f"of {layer} it has only {', '.join(sorted(matrices))}"
    for role, tensor in matrices.items():
        fits, wanted = (tensor.numel() == 1, "number") if role == "alpha" else (tensor.dim() >= 2, "matrix")
        if not fits:
            return f"{role} of {layer} has the shape {tuple(tensor.shape)}, where a {wanted} belongs"
    if "alpha" in matrices and not is_finite(matrices["alpha"]):
        return f"alpha of {layer} is {matrices['alpha'].item()}, where a finite number belongs"
    return None


def _read_config(path: Path, metadata: Mapping[str, str], names: Iterable[str]) -> dict[str, Any]:
    """UserError where peft's file is alone, as nothing else says its strength."""
    if not any(name.startswith(PEFT_PREFIX) for name in names):
        return _parse_config(f"{path}: lora_adapter_metadata", metadata.get("lora_adapter_metadata", "{}"))
    file = path.parent / PEFT_CONFIG
    if not file.is_file():
        raise UserError(f"{path}: peft keeps the strength of such a file in {PEFT_CONFIG}; put that beside it")
    config = _parse_config(str(file), read_utf8(file))
    if (kind := config.get("peft_type")) not in PEFT_KINDS:
        raise UserError(f"{file}: an adapter of the kind {kind}; {', '.join(PEFT_KINDS)} can be used")
    return config


def _parse_config(where: str, text: str) -> dict[str, Any]:
    """UserError that begins with `where` unless the text is a JSON object whose settings have peft's types."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: not JSON") from None
    if not isinstance(config, dict):
        raise UserError(f"{where}: not a JSON object")
    for key, value in config.items():
        name = key.removeprefix("unet.").removeprefix("text_encoder.").removeprefix(SECOND_ENCODER)
        if name in SETTINGS and value is not None and not SETTINGS[name].check(value):
            raise UserError(f"{where}: its {key} is {json.dumps(value)[:80]}, where {SETTINGS[name].wanted} belongs")
    return config


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_rank(value: Any) -> bool:
    return _is_finite_number(value) and value > 0


def _is_alpha_pattern(value: Any) -> bool:
    """{regular expression for the end of a layer's name: alpha}"""
    try:
        return all(_is_finite_number(alpha) and _layers_ending(end) for end, alpha in value.items())
    except (AttributeError, re.error, OverflowError, RecursionError):
        return False


def _layers_ending(end: str) -> re.Pattern[str]:
    """Matches the names of layers as peft does with a key of alpha_pattern."""
    return re.compile(rf"(^|\.)({end.removeprefix('text_model.')})$")


class Setting(NamedTuple):
    check: Callable[[Any], bool]
    wanted: str


# What is read of a config, and must be there or null.
SETTINGS = {
    "r": Setting(_is_rank, "a number above 0"),
    "lora_alpha": Setting(_is_finite_number, "a number"),
    "alpha": Setting(_is_finite_number, "a number"),
    "alpha_pattern": Setting(_is_alpha_pattern, "{the end of a layer's name: a number}"),
    "use_rslora": Setting(lambda value: isinstance(value, bool), "true or false"),
}


# --- its place in a base --------------------------------------------------------------------------------------------


def check_lora_fits(path: Path, unet: FolderLike, unet_part: str, base: FolderLike) -> None:
    """UserError with the counts where not every layer has its place and its size in the base. Reads no weight."""
    shapes: dict[str, tuple[int, ...]] = {}  # by a layer's name
    for part in [part for part in TEXT_ENCODERS if part in read_index(base)]:
        shapes |= _layer_shapes(part, read_weight_shapes(base, part))
    shapes |= _layer_shapes("unet", read_weight_shapes(unet, unet_part))
    lora = read_lora_file(path, "meta")
    faults = [
        fault
        for layer, matrices in lora.layers.items()
        if (fault := _misfit(layer, matrices, shapes.get(_flat(layer))))
    ]
    if faults:
        fitting, all_layers = len(lora.layers) - len(faults), len(lora.layers)
        raise UserError(f"{path}: for another base: {fitting} of {all_layers} layers fit; {faults[0]}")


def _layer_shapes(part: str, weights: Shapes) -> Shapes:
    return {place: weights[name] for place, name in _places(part, weights).items()}


def _misfit(layer: str, matrices: Matrices, shape: tuple[int, ...] | None) -> str | None:
    """Why the layer cannot be added to a weight of this shape; None where it can."""
    if shape is None:
        return f"this model has no {layer}"
    try:
        delta = tuple(_delta_weight(matrices).shape)
    except (RuntimeError, IndexError):  # of sizes, or of numbers of dimensions
        return f"the matrices of {layer} do not fit each other"
    if delta[0] == shape[0] and math.prod(delta) == math.prod(shape):
        return None
    return f"{layer} is {_times(delta)}, in this model {_times(shape)}"


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _places(part: str, weights: Iterable[str]) -> dict[str, str]:
    """{a layer's name with _ for each dot: its weight in this part of a model}."""
    if part == "unet":
        return _unet_places(weights)
    prefix = SECOND_ENCODER if part == "text_encoder_2" else ""
    # Older versions of transformers wrap the model in 'text_model'.
    names = {prefix + name.removeprefix("text_model.").removesuffix(".weight"): name for name in weights}
    return _with_old_names({_flat(place): name for place, name in names.items()})


def _unet_places(weights: Iterable[str]) -> dict[str, str]:
    """In diffusers' and the original code's way."""
    weights = list(weights)
    try:
        ldm_keys = unet_key_map(weights)
    except UserError:
        ldm_keys = {}  # a UNet that the original code does not know
    names = {key: name for name, key in ldm_keys.items()} | {name: name for name in weights}
    return _with_old_names({_flat(key.removesuffix(".weight")): name for key, name in names.items()})


def _with_old_names(places: dict[str, str]) -> dict[str, str]:
    old = {
        place.removesuffix(new) + ending: name
        for place, name in places.items()
        for new, ending in OLD_ENDINGS.items()
        if place.endswith(new)
    }
    return old | places


# --- what it adds ---------------------------------------------------------------------------------------------------


def fuse_lora(lora: LoraFile, model: torch.nn.Module, part: str, scale: float) -> None:
    """Adds the layers that are for `part` ('unet' or a text encoder), times `scale`, to the weights of `model`.

    The file has passed `check_lora_fits`. UserError where what a layer adds is not finite.
    """
    weights = dict(model.named_parameters())
    places = _places(part, weights)
    with torch.no_grad():
        for layer, matrices in lora.layers.items():
            if name := places.get(_flat(layer)):
                delta = _delta_weight(matrices) * (_strength(matrices, part, name, lora.config) * scale)
                if not is_finite(delta):
                    raise UserError(f"{lora.path}: damaged: what {layer} adds is not finite (NaN or infinite)")
                weights[name].add_(delta.reshape(weights[name].shape))


def _is_complete(matrices: Matrices) -> bool:
    roles = matrices.keys() - {"alpha"}
    if roles <= {"down", "up", "mid"}:
        return {"down", "up"} <= roles
    loha = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
    if roles <= loha | {"hada_t1", "hada_t2"}:
        return loha <= roles and ("hada_t1" in roles) == ("hada_t2" in roles)
    return all(f"lokr_w{i}" in roles or {f"lokr_w{i}_a", f"lokr_w{i}_b"} <= roles for i in (1, 2))


def _delta_weight(matrices: Matrices) -> torch.Tensor:
    """(out, in, …) what a layer adds to its weight, at strength 1; the last sides may be in one.

    LoRA is up @ down (arXiv:2106.09685), LoHa the Hadamard product of two such (arXiv:2108.06098), LoKr a Kronecker
    product; as in LyCORIS (arXiv:2309.14859), with whose Tucker decomposition convolutions have one matrix more.
    """
    if "up" in matrices:
        up, down = matrices["up"].flatten(1), matrices["down"].flatten(1)
        return _tucker(matrices["mid"], up.T, down) if "mid" in matrices else up @ down
    if "hada_w1_a" in matrices:
        return _factor(matrices, "hada_", "1") * _factor(matrices, "hada_", "2")
    one, two = _factor(matrices, "lokr_", "1"), _factor(matrices, "lokr_", "2")
    return torch.kron(one[..., None, None] if two.dim() == 4 else one, two.contiguous())


def _factor(matrices: Matrices, kind: str, number: str) -> torch.Tensor:
    if (whole := matrices.get(f"{kind}w{number}")) is not None:
        return whole
    a, b, core = (matrices.get(kind + name) for name in (f"w{number}_a", f"w{number}_b", f"t{number}"))
    assert a is not None and b is not None
    return a @ b if core is None else _tucker(core, a, b)


def _tucker(core: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(out, in, h, w) from (r, s, h, w), (r, out) and (s, in)."""
    return torch.einsum("rshw,ro,si->oihw", core, a, b)


def _strength(matrices: Matrices, part: str, weight: str, config: Mapping[str, Any]) -> float:
    """alpha / rank. The layer's own alpha wins over the config's; without any it is the rank."""

    def setting(name: str) -> Any:
        return config.get(f"{part}.{name}", config.get(name))

    if not (rank := _rank(matrices) or setting("r")):
        return 1.0  # a LoKr of two whole matrices, whose alpha LyCORIS does not count
    layer = weight.removeprefix("text_model.").removesuffix(".weight")
    patterns = setting("alpha_pattern") or {}
    alphas = [matrices["alpha"].item()] if "alpha" in matrices else []
    alphas += [patterns[end] for end in patterns if _layers_ending(end).search(layer)]
    alphas += [alpha for name in ("lora_alpha", "alpha") if (alpha := setting(name)) is not None]
    return (alphas or [rank])[0] / (math.sqrt(rank) if setting("use_rslora") else rank)


def _rank(matrices: Matrices) -> int | None:
    names = ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
    return next((len(matrices[name]) for name in names if name in matrices), None)

"""Writes the LoRA of a run as a file for other programs; `export_lora(args)` does it all.

AUTOMATIC1111, ComfyUI and InvokeAI read the names that kohya's scripts gave such files (networks/lora.py in
github.com/kohya-ss/sd-scripts): `lora_unet_` and the layer's name with _ for each dot, then `.lora_down.weight`,
`.lora_up.weight` and `.alpha`. The name is diffusers', and of XL that in its own code. A file without alpha would act
as if alpha were the rank.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import diffusers
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors.torch import load_file

from bases.ldm_keys import StateDict, unet_key_map
from exporting.export import check_finite, check_output_path, write_file
from exporting.file_metadata import CheckpointFormat, lora_metadata, read_checkpoint_format
from generation.loras import run_of_lora
from generation.weights import find_weights
from models.folders import read_weight_shapes
from models.loading import DTYPES, quiet_libraries
from models.lora import LORA_FILE, LoraLayer, read_lora_layers
from runs.records import is_lora
from runtime.errors import UserError, WorkError, advice_for, first_line
from runtime.files import atomic_write, remove_stale_partial_files
from runtime.paths import display_path

KOHYA_PREFIX = "lora_unet_"


def export_lora(args: argparse.Namespace) -> None:
    """Writes the verified file `args.to`, or leaves no trace of it.

    The LoRA is that of the run `args.model`, or the only one of `args.lora`, where `args.model` is its base. UserError
    if it was not trained here or `args.to` must not be written; WorkError if the file does not read back as it was.
    """
    check_output_path(args.to, args.overwrite, with_config=False)
    _check_is_lora(args.lora[0] if args.lora else args.model)
    remove_stale_partial_files(args.to.absolute().parent)
    quiet_libraries()
    source = find_weights(
        args.model, args.checkpoint, args.lora, tokenizer=args.tokenizer, allow_pickle=args.allow_pickle
    )
    file, layers = source.loras[-1].file, read_lora_layers(source.loras[-1].file)
    run = run_of_lora(file)
    print(f"exporting {display_path(file)}, in {args.dtype}", flush=True)
    if source.schedule_note:
        print(source.schedule_note)

    model, first = read_checkpoint_format(source.base, run["arguments"]), next(iter(layers.values()))
    unet_weights = read_weight_shapes(source.unet_folder, source.unet_part)
    named = ldm_names(layers, unet_weights) if model.published.kohya_uses_ldm_names else layers
    weights = to_kohya(named, DTYPES[args.dtype])
    check_finite(weights)
    metadata = {"format": "pt", **lora_metadata(model, run, args.title or args.to.stem, first)}
    with atomic_write(args.to) as temporary:
        write_file(temporary, weights, metadata)
        verified = verify_lora(temporary, layers, DTYPES[args.dtype], model) if args.verify else "not verified"
    size, architecture = args.to.stat().st_size / 1e6, metadata["modelspec.architecture"]
    print(f"{display_path(args.to)}: {size:.3g} MB, {architecture}; {verified}")
    _print_usage_notes(metadata, model.has_standard_sizes)


def _check_is_lora(model: str) -> None:
    """UserError where `model` is no LoRA's run, before a whole model is fetched or converted for nothing."""
    if not is_lora(run_of_lora(Path(model).expanduser() / LORA_FILE)):
        raise UserError(f"--lora_only: {model} is no LoRA's run; leave --lora_only out to write a whole model")


def ldm_names(layers: dict[str, LoraLayer], unet_weights: Iterable[str]) -> dict[str, LoraLayer]:
    """The layers under the names that they have in Stable Diffusion's own code."""
    ldm_keys = unet_key_map(unet_weights)
    return {ldm_keys[f"{name}.weight"].removesuffix(".weight"): layer for name, layer in layers.items()}


def to_kohya(layers: dict[str, LoraLayer], dtype: torch.dtype) -> StateDict:
    """The layers under kohya's names; alpha stays fp32."""
    weights: StateDict = {}
    for name, layer in layers.items():
        kohya_name = KOHYA_PREFIX + name.replace(".", "_")
        weights[f"{kohya_name}.lora_down.weight"] = layer.down.to(dtype).contiguous()
        weights[f"{kohya_name}.lora_up.weight"] = layer.up.to(dtype).contiguous()
        weights[f"{kohya_name}.alpha"] = torch.tensor(float(layer.alpha))
    return weights


def verify_lora(file: Path, layers: dict[str, LoraLayer], dtype: torch.dtype, model: CheckpointFormat) -> str:
    """Reads the file back with diffusers and compares each layer's place, matrices and alpha.

    Returns the result in words; WorkError where anything differs.
    """
    found = read_back_lora(file, model)
    differing = layers.keys() ^ found.keys()
    differing |= {name for name in layers.keys() & found.keys() if not _are_equal(layers[name], found[name], dtype)}
    if differing:
        raise WorkError(f"the file is not kept: read back, {len(differing)} layers differ ({min(differing)})")
    return f"verified: diffusers reads back all {len(layers)} layers as they are"


def _are_equal(layer: LoraLayer, found: LoraLayer, dtype: torch.dtype) -> bool:
    same_matrices = torch.equal(layer.down.to(dtype), found.down) and torch.equal(layer.up.to(dtype), found.up)
    return same_matrices and torch.tensor(layer.alpha).item() == found.alpha


def read_back_lora(file: Path, model: CheckpointFormat) -> dict[str, LoraLayer]:
    """{layer of the UNet: its matrices and alpha}, as diffusers converts them from the file."""
    try:
        pipeline, unet_config = getattr(diffusers, model.family.pipeline), FrozenDict(model.configs["unet"])
        state, alphas = pipeline.lora_state_dict(load_file(file), unet_config=unet_config)
        state = convert_unet_state_dict_to_peft(state)
        # Its name is that of the matrix before it was converted, with a suffix.
        alphas = {name.split(".lora_A.")[0]: a for name, a in convert_unet_state_dict_to_peft(alphas).items()}
        names = {name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")}
        return {
            name.removeprefix("unet."): LoraLayer(
                state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"], alphas[name]
            )
            for name in names
        }
    except Exception as error:  # the errors for unreadable files have no common class
        if advice_for(error):
            raise
        raise WorkError(
            f"the file is not kept: diffusers cannot read it back ({first_line(error)}); --no_verify would keep it"
        ) from error


def _print_usage_notes(metadata: dict[str, str], has_standard_sizes: bool) -> None:
    print(f"for {metadata['ss_sd_model_name']}; in AUTOMATIC1111 it goes to models/Lora, in ComfyUI to models/loras")
    if trigger := metadata.get("modelspec.trigger_phrase"):
        print(f"trigger phrase: {trigger}")
    if not has_standard_sizes:
        print("its base is not of Stable Diffusion's sizes, so only diffusers loads it: pipeline.load_lora_weights")

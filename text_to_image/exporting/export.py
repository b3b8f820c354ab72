"""Writes a diffusers model as a one-file checkpoint for other programs; `export_checkpoint(args)` does it all."""

import argparse
import hashlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors.torch import save_file

from bases.ldm_keys import StateDict, text_encoder_to_ldm, unet_to_ldm, vae_to_ldm
from bases.one_file import SUFFIX
from exporting.file_metadata import CheckpointFormat, ldm_config_yaml, modelspec_metadata, read_checkpoint_format
from generation.weights import GenerationWeights, find_weights, load_generation_text_encoder, load_generation_unet
from models.folders import FolderLike, ModelShape, count_parameters
from models.loading import DTYPES, load_vae, quiet_libraries
from runtime.devices import choose_device
from runtime.errors import UserError, WorkError, advice_for, first_line
from runtime.files import atomic_write, remove_stale_partial_files, set_mode, write_text_atomically
from runtime.paths import display_path

HASH_PLACEHOLDER = "0x" + "0" * 64  # as long as the real hash, which is written over it
SIZE_MARGIN = 1.05  # file size relative to the weights: the header, and the layer that only OpenCLIP's layout has
HASH_BLOCK = 1 << 24  # bytes
TEST_IMAGE_SIDE, TEST_IMAGE_STEPS = 256, 2  # px at most; sampling steps
PIXEL_TOLERANCE = 1.5 / 255  # rounding


def export_checkpoint(args: argparse.Namespace) -> None:
    """Writes the verified file `args.to`, or leaves no trace of it.

    UserError if the model cannot be exported or `args.to` must not be written; WorkError if there is no room for the
    file or it does not read back as it was.
    """
    check_output_path(args.to, args.overwrite)
    remove_stale_partial_files(args.to.absolute().parent)
    quiet_libraries()
    source = find_weights(args.model, args.checkpoint, args.lora, args.lora_scale, args.tokenizer, args.allow_pickle)
    dtype = DTYPES[args.dtype]
    model = read_checkpoint_format(source.base, source.scheduler_overrides)
    config = ldm_config_yaml(model)
    check_disk_space(args.to, source.base, dtype)
    print(
        "\n".join(filter(None, [f"exporting {source.describe()}, in {args.dtype}", source.schedule_note])), flush=True
    )

    metadata = {"format": "pt", **modelspec_metadata(model, source.run, args.title or args.to.stem)}
    if source.triggers:
        metadata["modelspec.trigger_phrase"] = ", ".join(source.triggers)
    with atomic_write(args.to) as temporary:
        write_file(temporary, collect_weights(source, model.version, dtype) | _schedule_keys(model), metadata)
        verified = verify_file(temporary, source, dtype, model.shape) if args.verify else "not verified"
        _write_config(args.to.with_suffix(".yaml"), config)
    size, architecture = args.to.stat().st_size / 1e9, metadata["modelspec.architecture"]
    print(f"{display_path(args.to)}: {size:.3g} GB, {architecture}; {verified}")
    if config and model.has_standard_sizes:
        print(f"{display_path(args.to.with_suffix('.yaml'))}: AUTOMATIC1111 needs it beside the file")
    _print_usage_notes(model, metadata, source.base)


def check_output_path(path: Path, overwrite: bool, with_config: bool = True) -> None:
    """UserError if the file, or the .yaml that may go with it, cannot or must not be written."""
    if path.suffix != SUFFIX or path.is_dir():
        raise UserError(f"--to {path}: name a file that ends in {SUFFIX}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--to {path}: there is no folder {path.parent}")
    # AUTOMATIC1111 would read a .yaml left over from another model together with the new file.
    files = (path, path.with_suffix(".yaml")) if with_config else (path,)
    existing = [str(file) for file in files if file.exists()]
    if existing and not overwrite:
        raise UserError(f"--to {path}: {' and '.join(existing)} exists; choose another name, or add --overwrite")


def check_disk_space(path: Path, folder: FolderLike, dtype: torch.dtype) -> None:
    """WorkError if the disk has no room for the file beside the one that it replaces."""
    parameters = sum(count_parameters(folder, part) for part in ("unet", "vae", "text_encoder"))
    needed, free = SIZE_MARGIN * parameters * dtype.itemsize, shutil.disk_usage(path.absolute().parent).free
    if needed > free:
        raise WorkError(
            f"--to {path}: the file takes {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free; free some space or "
            "choose another folder"
        )


# --- weights --------------------------------------------------------------------------------------------------------


def part_loaders(source: GenerationWeights) -> dict[str, Callable[[torch.dtype], Any]]:
    """{part: function that loads it in a dtype}, for each part of the model that has weights."""
    return {
        "unet": lambda dtype: load_generation_unet(source, dtype),
        "vae": lambda dtype: load_vae(source.base, dtype),
        "text_encoder": lambda dtype: load_generation_text_encoder(source).to(dtype),
    }


def collect_weights(source: GenerationWeights, version: int, dtype: torch.dtype) -> StateDict:
    """All weights under their LDM keys, loaded one part after the other. UserError where `dtype` cannot hold one."""
    to_ldm: dict[str, Callable[[StateDict], StateDict]] = {
        "unet": unet_to_ldm,
        "vae": vae_to_ldm,
        "text_encoder": lambda state_dict: text_encoder_to_ldm(state_dict, open_clip=version == 2),
    }
    weights: StateDict = {}
    for part, load in part_loaders(source).items():
        weights |= {key: weight.contiguous() for key, weight in to_ldm[part](load(dtype).state_dict()).items()}
    check_finite(weights)
    return weights


def check_finite(weights: StateDict) -> None:
    """UserError that names a weight which the precision of the file cannot hold."""
    if non_finite := next((key for key, weight in weights.items() if not weight.isfinite().all()), None):
        raise UserError(f"{non_finite} is infinite or NaN in this precision; try --dtype bf16 or fp32")


def _schedule_keys(model: CheckpointFormat) -> StateDict:
    """The empty tensor by which programs know zero terminal SNR, which neither ModelSpec nor the .yaml can say."""
    return {"ztsnr": torch.zeros(0)} if model.zero_snr else {}


def write_file(path: Path, weights: StateDict, metadata: dict[str, str]) -> None:
    """Writes a safetensors file. As ModelSpec asks, its metadata hold the SHA-256 of everything after the header."""
    path.touch()
    mode = path.stat().st_mode
    save_file(weights, path, {**metadata, "modelspec.hash_sha256": HASH_PLACEHOLDER})
    set_mode(path, mode)  # save_file makes the file readable for its owner only
    with open(path, "r+b") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        digest = hashlib.sha256()
        while block := file.read(HASH_BLOCK):
            digest.update(block)
        file.seek(8 + header.index(HASH_PLACEHOLDER.encode()))
        file.write(f"0x{digest.hexdigest()}".encode())


def _write_config(path: Path, config: str | None) -> None:
    if config:
        write_text_atomically(path, config)
    else:
        path.unlink(missing_ok=True)  # one of the file that is replaced


# --- verification ---------------------------------------------------------------------------------------------------


def verify_file(file: Path, source: GenerationWeights, dtype: torch.dtype, shape: ModelShape) -> str:
    """Reads the file back with diffusers, compares every weight, and generates a test image with it and with `source`.

    Returns the result in words; WorkError where anything differs.
    """
    pipeline = read_back(file, source.base)
    prompt = (source.run.get("example_prompts") or [""])[0]
    image, compared = generate_test_image(pipeline, prompt, shape), 0
    pipeline.to(dtype)  # no rounding, as the file has this dtype; makes room for the weights to compare with
    for part, load in part_loaders(source).items():
        expected = load(dtype)
        compared += compare_weights(part, expected.state_dict(), getattr(pipeline, part).state_dict())
        setattr(pipeline, part, expected)  # frees the part that was read back
    difference = np.abs(generate_test_image(pipeline, prompt, shape) - image).max()
    if difference > PIXEL_TOLERANCE:
        raise WorkError(
            f"the file is not kept: read back, it generates another image (pixels differ by {255 * difference:.0f})"
        )
    return f"verified: {compared} weights read back are equal, and so is an image generated with them"


def read_back(file: Path, configs: FolderLike) -> StableDiffusionPipeline:
    """The pipeline that `from_single_file` makes of the file, in fp32; only configs are read from folder `configs`."""
    with tempfile.TemporaryDirectory() as temporary:
        link = Path(temporary, f"model{SUFFIX}")
        link.symlink_to(file.resolve())  # diffusers goes by the suffix, which the unfinished file does not have yet
        try:
            return StableDiffusionPipeline.from_single_file(
                str(link), config=str(configs), dtype=torch.float32, local_files_only=True,
                safety_checker=None, feature_extractor=None,  # which the file does not hold, and the folder may lack
            )  # fmt: skip
        except Exception as error:  # the errors for unreadable files have no common class
            if advice_for(error):
                raise
            raise WorkError(
                f"the file is not kept: from_single_file cannot read it back ({first_line(error)}); "
                "--no_verify would keep it"
            ) from error


def compare_weights(part: str, expected: StateDict, found: StateDict) -> int:
    """The number of weights compared; WorkError where one differs or is missing."""
    differing = expected.keys() ^ found.keys()
    differing |= {
        key for key in expected.keys() & found.keys() if not torch.equal(expected[key].cpu(), found[key].cpu())
    }
    if differing:
        raise WorkError(
            f"the file is not kept: read back, {len(differing)} weights of the {part} differ ({min(differing)})"
        )
    return len(expected)


@torch.no_grad()
def generate_test_image(pipeline: StableDiffusionPipeline, prompt: str, shape: ModelShape) -> np.ndarray:
    """A small image (height, width, 3) in [0, 1], generated in fp32 from a fixed seed."""
    pipeline.to(choose_device(), torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    multiple = shape.size_multiple
    side = max(multiple, min(shape.native_size, TEST_IMAGE_SIDE) // multiple * multiple)
    settings = {"height": side, "width": side, "num_inference_steps": TEST_IMAGE_STEPS, "guidance_scale": 1.0}
    generator = torch.Generator().manual_seed(0)
    return pipeline(prompt, generator=generator, output_type="np", **settings).images[0]


def _print_usage_notes(model: CheckpointFormat, metadata: dict[str, str], folder: FolderLike) -> None:
    if trigger := metadata.get("modelspec.trigger_phrase"):
        print(f"trigger phrase: {trigger}")
    if not model.has_standard_sizes:
        print(
            "its layers are not of Stable Diffusion's sizes, so AUTOMATIC1111, ComfyUI and InvokeAI will not load it; "
            f"diffusers does: StableDiffusionPipeline.from_single_file(FILE, config={str(folder)!r})"
        )
    elif model.version == 1 and model.prediction_type != "epsilon":
        print("it predicts velocity, not noise: in ComfyUI add ModelSamplingDiscrete set to v_prediction")
    if model.zero_snr:
        print("it was trained with zero terminal SNR: turn on 'Zero Terminal SNR' in AUTOMATIC1111, zsnr in ComfyUI")

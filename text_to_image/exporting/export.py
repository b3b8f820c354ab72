"""A diffusers folder → the one-file checkpoint that other programs load: `export(args)` is the whole of it."""

import argparse
import hashlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from exporting.file_metadata import Kind, kind_of, ldm_config, modelspec
from exporting.ldm_keys import Weights, text_weights, unet_weights, vae_weights
from generation.weights import GenerationWeights, find_weights, load_generation_text_encoder, load_generation_unet
from models.folders import ModelShape, count_parameters
from models.loading import DTYPES, load_vae, quiet_libraries
from runtime.devices import choose_device
from runtime.errors import UserError, WorkError, advice_for, first_line
from runtime.files import atomic_write, remove_stale_partial_files, write_text_atomically
from runtime.paths import display_path

SUFFIX = ".safetensors"
PENDING_HASH = "0x" + "0" * 64  # as long as the real one, which takes its place when the file is there
ROOM = 1.05  # times the weights: the header, and a layer that only OpenCLIP's layout has
READ_AT_ONCE = 1 << 24  # bytes
DRAWN_SIDE, DRAWN_STEPS = 256, 2
SAME = 1.5 / 255  # a rounding apart


def export(args: argparse.Namespace) -> None:
    """Writes `args.to`, whole and verified, or leaves no trace. UserError where model or target is not usable."""
    check_target(args.to, args.overwrite)
    remove_stale_partial_files(args.to.absolute().parent)
    quiet_libraries()
    source = find_weights(args.model, args.checkpoint)
    kind, dtype = kind_of(source.base, source.scheduler_overrides), DTYPES[args.dtype]
    config = ldm_config(kind)
    check_room(args.to, source.base, dtype)
    print(f"exporting {source.describe()}, in {args.dtype}", flush=True)

    with atomic_write(args.to) as beside:
        metadata = {"format": "pt", **modelspec(kind, source.run, args.title or args.to.stem)}
        write_file(beside, gather(source, kind.version, dtype), metadata)
        verdict = verify(beside, source, dtype, kind.shape) if args.verify else "not verified"
        _place_config(args.to.with_suffix(".yaml"), config)
    print(
        f"{display_path(args.to)}: {args.to.stat().st_size / 1e9:.3g} GB, "
        f"{metadata['modelspec.architecture']}; {verdict}"
    )
    _say_more(args, kind, config, metadata, source.base)


def check_target(path: Path, overwrite: bool) -> None:
    """UserError where the file cannot or must not be written."""
    if path.suffix != SUFFIX or path.is_dir():
        raise UserError(f"--to {path}: name a file that ends in {SUFFIX}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--to {path}: there is no folder {path.parent}")
    # A .yaml of that name would be read with the new file, whatever it tells of.
    there = [str(file) for file in (path, path.with_suffix(".yaml")) if file.exists()]
    if there and not overwrite:
        raise UserError(f"--to {path}: {' and '.join(there)} exists; another name, or --overwrite")


def check_room(path: Path, folder: Path, dtype: torch.dtype) -> None:
    """WorkError where the disk has no room for the file; one that is replaced goes only afterwards."""
    numbers = sum(count_parameters(folder, part) for part in ("unet", "vae", "text_encoder"))
    needed, free = ROOM * numbers * dtype.itemsize, shutil.disk_usage(path.absolute().parent).free
    if needed > free:
        raise WorkError(
            f"--to {path}: the file takes {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free; make room or name "
            "another place"
        )


# --- weights --------------------------------------------------------------------------------------------------------


def parts_of(source: GenerationWeights) -> dict[str, Callable[[torch.dtype], torch.nn.Module]]:
    """What loads each part that has weights, in the precision asked for."""
    return {
        "unet": lambda dtype: load_generation_unet(source, dtype),
        "vae": lambda dtype: load_vae(source.base, dtype),
        "text_encoder": lambda dtype: load_generation_text_encoder(source, dtype),
    }


def gather(source: GenerationWeights, version: int, dtype: torch.dtype) -> Weights:
    """All weights under their original names, one part loaded after the other."""
    rename = {
        "unet": unet_weights,
        "vae": vae_weights,
        "text_encoder": lambda weights: text_weights(weights, open_clip=version == 2),
    }
    gathered: Weights = {}
    for part, load in parts_of(source).items():
        gathered |= {name: weight.contiguous() for name, weight in rename[part](load(dtype).state_dict()).items()}
    if unfit := next((name for name, weight in gathered.items() if not weight.isfinite().all()), None):
        raise UserError(f"{unfit} is infinite or no number in this precision; --dtype bf16 or fp32 may hold it")
    return gathered


def write_file(path: Path, weights: Weights, metadata: dict[str, str]) -> None:
    """A safetensors file whose metadata hold the SHA-256 of what follows its header, as ModelSpec wants it."""
    path.touch()
    mode = path.stat().st_mode
    save_file(weights, path, {**metadata, "modelspec.hash_sha256": PENDING_HASH})
    path.chmod(mode)  # safetensors leaves a file that its owner alone may read
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
        digest = hashlib.sha256()
        while block := file.read(READ_AT_ONCE):
            digest.update(block)
        file.seek(8 + header.index(PENDING_HASH.encode()))
        file.write(f"0x{digest.hexdigest()}".encode())


def _place_config(path: Path, config: str | None) -> None:
    if config:
        write_text_atomically(path, config)
    else:
        path.unlink(missing_ok=True)


# --- verification ---------------------------------------------------------------------------------------------------


def verify(file: Path, source: GenerationWeights, dtype: torch.dtype, shape: ModelShape) -> str:
    """Reads the file back with diffusers, compares every weight and draws a picture with it and with the source.

    Returns what to say of it; WorkError where anything differs.
    """
    pipeline = read_back(file, source.base)
    prompt = (source.run.get("example_prompts") or [""])[0]
    drawn, compared = draw(pipeline, prompt, shape), 0
    pipeline.to(dtype)  # which rounds nothing away, and makes room for the weights to compare with
    for part, load in parts_of(source).items():
        own = load(dtype)
        compared += compare(part, own.state_dict(), getattr(pipeline, part).state_dict())
        setattr(pipeline, part, own)  # lets go of the one that was read
    if (apart := np.abs(draw(pipeline, prompt, shape) - drawn).max()) > SAME:
        raise WorkError(f"read back it draws another picture ({255 * apart:.0f} of 255 apart), so it is not kept")
    return f"verified: {compared} weights read back are equal, and so is a picture drawn with them"


def read_back(file: Path, folder: Path) -> StableDiffusionPipeline:
    """The file as `from_single_file` loads it, in fp32, with the configs of `folder`; no weight comes from there."""
    with tempfile.TemporaryDirectory() as temporary:
        named = Path(temporary, f"model{SUFFIX}")
        named.symlink_to(file.resolve())  # what has not taken its name yet has not its suffix
        try:
            return StableDiffusionPipeline.from_single_file(
                str(named), config=str(folder), dtype=torch.float32, local_files_only=True
            )
        except Exception as error:  # whatever the libraries raise for a file that they cannot read
            if advice_for(error):
                raise
            raise WorkError(
                f"from_single_file cannot read it back ({first_line(error)}), so it is not kept; --no_verify keeps it"
            ) from error


def compare(part: str, own: Weights, read: Weights) -> int:
    """How many weights were compared; WorkError where one differs or is missing."""
    differing = own.keys() ^ read.keys()
    differing |= {name for name in own.keys() & read.keys() if not torch.equal(own[name].cpu(), read[name].cpu())}
    if differing:
        raise WorkError(
            f"read back {len(differing)} weights of the {part} differ ({min(differing)}), so it is not kept"
        )
    return len(own)


@torch.no_grad()
def draw(pipeline: StableDiffusionPipeline, prompt: str, shape: ModelShape) -> np.ndarray:
    """A small picture (height, width, 3) in [0, 1], from always the same noise."""
    pipeline.to(choose_device(), torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    side = max(shape.size_multiple, min(shape.native_size, DRAWN_SIDE) // shape.size_multiple * shape.size_multiple)
    settings = {"height": side, "width": side, "num_inference_steps": DRAWN_STEPS, "guidance_scale": 1.0}
    noise = torch.Generator().manual_seed(0)
    return pipeline(prompt, generator=noise, output_type="np", **settings).images[0]


def _say_more(args: argparse.Namespace, kind: Kind, config: str | None, metadata: dict, folder: Path) -> None:
    """What one needs to know to use the file."""
    if config and kind.has_own_sizes:
        print(f"{display_path(args.to.with_suffix('.yaml'))}: AUTOMATIC1111 wants it beside the file")
    if trigger := metadata.get("modelspec.trigger_phrase"):
        print(f"trigger phrase: {trigger}")
    if not kind.has_own_sizes:
        print(
            "not of Stable Diffusion's own sizes, so AUTOMATIC1111, ComfyUI and InvokeAI will not load it; diffusers "
            f"does: StableDiffusionPipeline.from_single_file(FILE, config={str(folder)!r})"
        )
    elif kind.version == 1 and kind.prediction_type != "epsilon":
        print("it predicts velocity, not noise: in ComfyUI it needs ModelSamplingDiscrete set to v_prediction")
    if kind.zero_snr:
        print("its noise ends at zero signal: choose 'Zero Terminal SNR' in AUTOMATIC1111, zsnr in ComfyUI")

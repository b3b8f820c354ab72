"""Prompts and seeds → picture files, images.jsonl and a contact sheet: `generate(args)` is the whole of it."""

import argparse
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from contact_sheet import make_contact_sheet
from devices import choose_device
from errors import UserError, WorkError, first_line, harmless
from files import replace_text, replacing
from model_defaults import REAL_MODEL
from model_folders import ModelShape, find_model, fingerprint_file, fingerprint_model, read_shape
from models import choose_attention, load_text_encoder, load_tokenizer, load_vae, quiet_libraries
from prompts import count_tokens, encode_prompt
from reporting import progress
from runs import RUN_FILE, read_run, shown
from sampling import SAMPLER, decode_latents, draw_latents, initial_noise, load_sampler
from trainable import LORA_FILE, load_with_lora

IMAGES_FILE, SHEET_FILE = "images.jsonl", "contact_sheet.jpg"
MAX_TOKEN_CHUNKS = 3


@dataclass(frozen=True)
class Drawing:
    """A picture to draw; `settings` are the fields of its row in images.jsonl that come after the seed."""

    prompt: str
    seed: int
    settings: dict

    def file_name(self, model_hash: str) -> str:
        """The same picture has the same name, another never has it."""
        words = "-".join(re.findall(r"\w+", self.prompt.lower())[:6])[:48] or "picture"
        identity = json.dumps([self.prompt, model_hash, {**self.settings, "model": None}])
        return f"{words}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}-{self.seed:06d}.png"


def generate(args: argparse.Namespace) -> None:
    """Draws `args.num_images` pictures of every prompt. UserError where model or size is not usable."""
    quiet_libraries()
    folder, lora = find_base(args.model)
    run = read_run(lora or folder) or {}
    drawings = plan_drawings(args, read_shape(folder), run)
    print(f"{len(drawings)} pictures with {shown(args.model)} (another: --model {REAL_MODEL})", flush=True)
    prepare_folder(args.output_dir)

    paths: list[Path] = []
    model_hash = fingerprint_model(folder) + (fingerprint_file(lora / LORA_FILE) if lora else "")
    for batch, images in draw(args, folder, lora, run, drawings):
        for drawing, image in zip(batch, images, strict=True):
            paths.append(save_image(image, args.output_dir / drawing.file_name(model_hash)))
        write_rows(args.output_dir / IMAGES_FILE, zip(paths, drawings, strict=False))
    captions = [(drawing.prompt, drawing.seed) for drawing in drawings]
    sheet = save_image(make_contact_sheet(paths, captions, model_name(args.model)), args.output_dir / SHEET_FILE)
    print(f"{len(paths)} pictures in {shown(args.output_dir)}, all of them in {shown(sheet)}")


def plan_drawings(args: argparse.Namespace, shape: ModelShape, run: dict) -> list[Drawing]:
    """Every prompt with every seed; `run` is what the model's run.json says, if it has one."""
    height, width = picture_size(args.height, args.width, run, shape)
    settings = {
        "steps": args.steps,
        "scheduler": SAMPLER,
        "guidance": args.guidance_scale,
        "negative_prompt": args.negative_prompt,
        "height": height,
        "width": width,
        "token_chunks": run.get("max_token_chunks", MAX_TOKEN_CHUNKS),
        "model": model_name(args.model),
    }
    prompts = dict.fromkeys(args.prompt)
    return [Drawing(prompt, args.seed + i, settings) for prompt in prompts for i in range(args.num_images)]


def model_name(name: str) -> str:
    """How a model is recorded: a folder of this repository without the place where the repository happens to be."""
    path, root = Path(name).expanduser().resolve(), Path(__file__).resolve().parents[1]
    return path.relative_to(root).as_posix() if path.is_dir() and path.is_relative_to(root) else name


def find_base(name: str) -> tuple[Path, Path | None]:
    """The pipeline's folder, and that of a LoRA on it where `name` is the output of a run that trained one."""
    folder = Path(name).expanduser()
    if not (folder / LORA_FILE).is_file() or (folder / "model_index.json").is_file():
        return find_model(name, "--model"), None
    if not (run := read_run(folder)):
        raise UserError(f"--model {name}: a LoRA without {RUN_FILE}, so its base is not known; name the run's folder")
    told = run["arguments"]
    where = (told.get("revision"), told.get("variant"), told.get("cache_dir"))
    return find_model(run["base_model"], f"the base of --model {name},", *where), folder


def sampler_of(folder: Path, lora: Path | None, run: dict) -> DPMSolverMultistepScheduler:
    """A pipeline says itself how it is sampled; a LoRA's base does not know what the LoRA was trained for."""
    told = run["arguments"] if lora else {}
    return load_sampler(folder, told.get("prediction_type"), told.get("rescale_betas_zero_snr", False))


def draw(
    args: argparse.Namespace, folder: Path, lora: Path | None, run: dict, drawings: Sequence[Drawing]
) -> Iterator[tuple[Sequence[Drawing], list[Image.Image]]]:
    """Draws them batch by batch, on the GPU in fp16 where there is one."""
    device = choose_device()
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    shape, settings = read_shape(folder), drawings[0].settings
    height, width = settings["height"], settings["width"]
    text = encode_prompts(folder, [args.negative_prompt, *args.prompt], settings["token_chunks"], device, dtype)
    unet, sampler = load_with_lora(folder, lora, dtype).to(device).eval(), sampler_of(folder, lora, run)
    choose_attention(unet, shape, height, width, device.type)
    vae = load_vae(folder).to(device)  # fp32 also on a GPU: half precision shows in the pictures and saves little
    with progress(total=len(drawings), desc="drawing", unit="picture") as bar:
        for batch in batched(drawings, args.batch_size):
            noise = torch.stack([initial_noise(drawing.seed, shape.latent_shape(height, width)) for drawing in batch])
            prompts, negative = [text[drawing.prompt] for drawing in batch], text[args.negative_prompt]
            latents = draw_latents(unet, sampler, noise, prompts, negative, args.guidance_scale, args.steps)
            yield batch, decode_latents(vae, latents)
            bar.update(len(batch))


def picture_size(height: int | None, width: int | None, run: dict, shape: ModelShape) -> tuple[int, int]:
    """(height, width): as asked, else the size most trained on, else the model's own; says where it rounds."""
    sizes = run.get("sizes") or [{"height": shape.native_size, "width": shape.native_size, "pictures": 0}]
    usual = max(sizes, key=lambda size: size["pictures"])
    asked = height or usual["height"], width or usual["width"]
    rounded = tuple(max(1, round(side / shape.size_multiple)) * shape.size_multiple for side in asked)
    if rounded != asked:
        print(
            f"{asked[1]} x {asked[0]} px becomes {rounded[1]} x {rounded[0]}: "
            f"this model's sides are multiples of {shape.size_multiple}"
        )
    return rounded


def encode_prompts(
    folder: Path, prompts: Sequence[str], chunks: int, device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The embedding of each prompt, as training read its captions; the text encoder is gone when this returns."""
    tokenizer, text_encoder = load_tokenizer(folder), load_text_encoder(folder, dtype).to(device)
    room = chunks * (tokenizer.model_max_length - 2)
    for prompt in prompts:
        if (tokens := count_tokens(tokenizer, prompt)) > room:
            print(harmless(f"only the first {room} of {tokens} tokens are read of: {prompt}"))
    return {prompt: encode_prompt(tokenizer, text_encoder, prompt, chunks) for prompt in prompts}


def batched(drawings: Sequence[Drawing], size: int) -> Iterator[Sequence[Drawing]]:
    for start in range(0, len(drawings), size):
        yield drawings[start : start + size]


def prepare_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be made ({error.strerror})") from None
    read_rows(folder / IMAGES_FILE)  # to be refused now, not after the first pictures


def save_image(image: Image.Image, path: Path) -> Path:
    """Written beside and renamed: whoever watches the folder never opens half a picture."""
    try:
        with replacing(path) as beside:
            image.save(beside, **({"format": "JPEG", "quality": 92} if path.suffix == ".jpg" else {"format": "PNG"}))
    except OSError as error:
        raise WorkError(f"{path}: cannot be written ({error.strerror or error})") from None
    return path


def write_rows(path: Path, drawn: Iterable[tuple[Path, Drawing]]) -> None:
    """One row for each picture of the folder; a picture that is drawn again keeps one row."""
    rows = read_rows(path)
    for image, drawing in drawn:
        rows[image.name] = {
            "file_name": image.name, "prompt": drawing.prompt, "seed": drawing.seed, **drawing.settings
        }  # fmt: skip
    replace_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()))


def read_rows(path: Path) -> dict[str, dict]:
    """The rows of images.jsonl by the name of their picture."""
    try:
        # Only \n ends a row: str.splitlines() would also cut a prompt at U+2028.
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        return {row["file_name"]: row for row in map(json.loads, filter(None, lines))}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not readable ({first_line(error)}); move it away") from None

"""Prompts and seeds → picture files, images.jsonl and a contact sheet: `generate(args)` is the whole of it."""

import argparse
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from contact_sheet import make_contact_sheet
from errors import UserError, WorkError
from models import (
    ModelShape,
    choose_attention,
    find_model,
    fingerprint_model,
    load_text_encoder,
    load_tokenizer,
    load_unet,
    load_vae,
    quiet_libraries,
    read_shape,
)
from prompts import count_tokens, encode_prompt
from reporting import progress
from runs import read_run, replace_text
from sampling import SAMPLER, decode_latents, draw_latents, initial_noise, load_sampler

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


@torch.no_grad()
def generate(args: argparse.Namespace) -> None:
    """Draws `args.num_images` pictures of every prompt. UserError where model or size is not usable."""
    quiet_libraries()
    folder = find_model(args.model, "--model")
    shape, run = read_shape(folder), read_run(folder) or {}
    height, width = picture_size(args.height, args.width, run, shape)
    chunks = run.get("max_token_chunks", MAX_TOKEN_CHUNKS)
    settings = {
        "steps": args.steps,
        "scheduler": SAMPLER,
        "guidance": args.guidance_scale,
        "negative_prompt": args.negative_prompt,
        "height": height,
        "width": width,
        "token_chunks": chunks,
        "model": args.model,
    }
    drawings = [Drawing(prompt, args.seed + i, settings) for prompt in args.prompt for i in range(args.num_images)]
    print(f"{len(drawings)} pictures of {width} x {height} px with {folder}, {args.steps} steps", flush=True)
    prepare_folder(args.output_dir)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    text = encode_prompts(folder, [args.negative_prompt, *args.prompt], chunks, device, dtype)
    unet = load_unet(folder, dtype).to(device).eval()
    choose_attention(unet, shape, height, width, device.type)
    vae = load_vae(folder).to(device)  # fp32 also on a GPU: half precision shows in the pictures and saves little
    sampler = load_sampler(folder)
    model_hash = fingerprint_model(folder)

    paths: list[Path] = []
    with progress(total=len(drawings), desc="drawing", unit="picture") as bar:
        for batch in batched(drawings, args.batch_size):
            noise = torch.stack([initial_noise(drawing.seed, shape.latent_shape(height, width)) for drawing in batch])
            embeddings = [text[drawing.prompt] for drawing in batch]
            latents = draw_latents(
                unet, sampler, noise, embeddings, text[args.negative_prompt], args.guidance_scale, args.steps
            )
            for drawing, image in zip(batch, decode_latents(vae, latents), strict=True):
                paths.append(save_image(image, args.output_dir / drawing.file_name(model_hash)))
                bar.update()
            write_rows(args.output_dir / IMAGES_FILE, zip(paths, drawings, strict=False))
    sheet = make_contact_sheet(paths, [(drawing.prompt, drawing.seed) for drawing in drawings], args.model)
    save_image(sheet, args.output_dir / SHEET_FILE)
    print(f"{len(paths)} pictures in {args.output_dir}, all of them in {args.output_dir / SHEET_FILE}")


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
            print(f"only the first {room} of {tokens} tokens are read of: {prompt}")
    return {prompt: encode_prompt(tokenizer, text_encoder, prompt, chunks) for prompt in prompts}


def batched(drawings: Sequence[Drawing], size: int) -> Iterator[Sequence[Drawing]]:
    for start in range(0, len(drawings), size):
        yield drawings[start : start + size]


def prepare_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: cannot be made ({error.strerror})") from None


def save_image(image: Image.Image, path: Path) -> Path:
    """Written beside and renamed: whoever watches the folder never opens half a picture."""
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        image.save(part, **({"quality": 92} if path.suffix == ".jpg" else {}))
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise WorkError(f"{path}: cannot be written ({error.strerror or error})") from None
    return path


def write_rows(path: Path, drawn: Iterable[tuple[Path, Drawing]]) -> None:
    """One row for each picture of the folder; a picture that is drawn again keeps one row."""
    rows = {row["file_name"]: row for row in read_rows(path)}
    for image, drawing in drawn:
        rows[image.name] = {
            "file_name": image.name, "prompt": drawing.prompt, "seed": drawing.seed, **drawing.settings
        }  # fmt: skip
    replace_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()))


def read_rows(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise UserError(f"{path}: not readable ({error}); move it away") from None

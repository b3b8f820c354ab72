"""Is a word heard that stands far behind in a caption? Two squares, whose last sentence names the colour, red or blue.

python tests/benchmarks/far_words.py --sentences 0
python tests/benchmarks/far_words.py --sentences 8 --save samples --flags "--resolution 128 --prior_images 0"

Each caption is N equal sentences and --last. The training script fine-tunes the base on the two
pictures. Then pictures are generated, half of them for each caption, and their colour is the mean of the inner pixels.
The loss on fixed noise is measured with each picture's own caption and with the other's: a word that is not heard
leaves both equal. A run takes two minutes on two quiet cores at 128 px, six beside other work.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[2]
sys.path[1:1] = [str(ROOT / "text_to_image"), str(ROOT / "text_to_image" / "starter")]

from data.images import load_pixel_values  # noqa: E402
from data.random_numbers import keyed_generator  # noqa: E402
from generation.contact_sheet import make_contact_sheet  # noqa: E402
from measure_base import generate_samples  # noqa: E402
from models.conditions import Conditions, whole_picture  # noqa: E402
from models.loading import (  # noqa: E402
    load_noise_scheduler,
    load_prompt_encoder,
    load_unet,
    load_vae,
    quiet_libraries,
)
from models.text_encoding import PromptEncoder, TextEmbedding, count_tokens  # noqa: E402
from runtime.paths import STARTER  # noqa: E402
from training.objective import Objective, diffusion_loss  # noqa: E402
from training.samples import Batch  # noqa: E402

TRAIN = ROOT / "text_to_image" / "train_text_to_image.py"
COLOURS = {"red": (200, 30, 30), "blue": (30, 60, 200)}
SIDE = 128  # pixels of the pictures
SENTENCE = "A square lies in the middle of a white background."
NOISES = 16  # of the loss on fixed noise, at as many timesteps


def captions(sentence: str, number: int, last: str) -> dict[str, str]:
    return {colour: " ".join([sentence] * number + [last.format(colour)]) for colour in COLOURS}


def write_dataset(folder: Path, texts: dict[str, str]) -> None:
    folder.mkdir(parents=True)
    rows = []
    for colour, caption in texts.items():
        image = Image.new("RGB", (SIDE, SIDE), "white")
        ImageDraw.Draw(image).rectangle((SIDE // 4, SIDE // 4, 3 * SIDE // 4, 3 * SIDE // 4), fill=COLOURS[colour])
        image.save(folder / f"{colour}.png")
        rows.append(json.dumps({"file_name": f"{colour}.png", "text": caption}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows), encoding="utf-8")


def train(base: Path, dataset: Path, output: Path, flags: list[str]) -> None:
    """`flags` come last: they win over what is set here."""
    command = [
        TRAIN, "--pretrained_model_name_or_path", base, "--dataset", dataset, "--output_dir", output, "--seed", 0,
        "--train_batch_size", 2, "--max_train_steps", 600, "--no_validation_pictures", "--no_report",
        "--checkpointing_steps", 10**6, *flags,
    ]  # fmt: skip
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"training failed:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")


def colour_of(image: Image.Image) -> str:
    """'red', 'blue', or the RGB mean of the inner quarter where it is neither."""
    inner = np.asarray(image.convert("RGB").resize((8, 8), Image.Resampling.BOX), dtype=float)[3:5, 3:5]
    red, green, blue = inner.mean((0, 1))
    if max(red, blue) > max(green, min(red, blue)) + 60:
        return "red" if red > blue else "blue"
    return f"{red:.0f} {green:.0f} {blue:.0f}"


def difference(encoder: PromptEncoder, texts: dict[str, str]) -> float:
    """Of what the UNet reads of the two captions, as a share of it."""
    one, other = (encoder(text).hidden_states for text in texts.values())
    return ((one - other).norm() / one.norm()).item()


@torch.no_grad()
def losses(model: Path, dataset: Path, texts: dict[str, str], size: int, chunks: int) -> dict[str, float]:
    """The mean loss on fixed noise with each picture's own caption, and with the other's, at `size` pixels."""
    vae, unet, scheduler = load_vae(model), load_unet(model).eval(), load_noise_scheduler(model)
    encoder = load_prompt_encoder(model, chunks)
    embeddings = {colour: encoder(text) for colour, text in texts.items()}
    sums = {"own caption": 0.0, "the other's": 0.0}
    for colour in COLOURS:
        pixels = load_pixel_values(dataset / f"{colour}.png", size, size)[None]
        latents = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
        other = next(name for name in COLOURS if name != colour)
        for name, caption in zip(sums, (colour, other), strict=True):
            batch = fixed_batch(latents, embeddings[caption], len(scheduler))
            sums[name] += diffusion_loss(unet, Objective(scheduler), batch).mean().item() / len(COLOURS)
    return {name: round(value, 5) for name, value in sums.items()}


def fixed_batch(latents: torch.Tensor, text: TextEmbedding, timesteps: int) -> Batch:
    """The latents (1, C, h, w) NOISES times, each with noise of its own, at evenly spread timesteps."""
    noise = torch.randn(NOISES, *latents.shape[1:], generator=keyed_generator(0, "far words"))
    conditions = Conditions.join([text] * NOISES, [whole_picture(SIDE, SIDE)] * NOISES)  # of XL alone
    spread = (2 * torch.arange(NOISES) + 1) * timesteps // (2 * NOISES)
    return Batch(latents.repeat(NOISES, 1, 1, 1), noise, noise, spread, conditions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=STARTER, help="pipeline folder")
    parser.add_argument("--sentences", type=int, default=8, help="equal sentences before the one with the colour")
    parser.add_argument("--sentence", default=SENTENCE, help="the sentence that is repeated")
    parser.add_argument("--last", default="The square is {}.", help="the sentence with the colour")
    parser.add_argument("--flags", default="", help="further flags of the training script, in quotes")
    parser.add_argument("--pictures", type=int, default=8, help="number of generated pictures, half for each caption")
    parser.add_argument("--size", type=int, default=SIDE, help="pixels of the generated pictures")
    parser.add_argument("--guidance_scale", type=float, nargs="+", default=[1, 2.5, 4, 7])
    parser.add_argument("--chunks", type=int, default=3, help="chunks of 75 tokens that are read")
    parser.add_argument("--save", type=Path, help="folder for the sheets")
    args = parser.parse_args()
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(args, Path(folder))))


def measure(args: argparse.Namespace, folder: Path) -> dict:
    dataset, model, texts = folder / "squares", folder / "model", captions(args.sentence, args.sentences, args.last)
    write_dataset(dataset, texts)
    train(args.base, dataset, model, shlex.split(args.flags))
    encoder = load_prompt_encoder(args.base, args.chunks)
    report = {
        "flags": args.flags,
        "tokens": count_tokens(encoder.tokenizer, texts["red"]),
        "text states differ by": round(difference(encoder, texts), 3),
        "loss of the base": losses(args.base, dataset, texts, args.size, args.chunks),
        "loss": losses(model, dataset, texts, args.size, args.chunks),
    }
    for scale in args.guidance_scale:
        report[f"guidance {scale:g}"] = generate(args, model, list(texts.items()), scale)
    return report


def generate(args: argparse.Namespace, model: Path, texts: list[tuple[str, str]], scale: float) -> str:
    """'7 of 8', and what colours came for each caption."""
    asked = [texts[i % len(texts)] for i in range(args.pictures)]
    size = (args.size, args.size)
    images = generate_samples(model, [text for _, text in asked], [size] * len(asked), 25, scale)
    found = [colour_of(image) for image in images]
    right = sum(colour == name for colour, (name, _) in zip(found, asked, strict=True))
    if args.save:
        save_sheet(images, asked, args.save / f"guidance-{scale:g}")
    return f"{right} of {len(asked)} ({', '.join(found)})"


def save_sheet(images: list[Image.Image], asked: list[tuple[str, str]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}-{colour}.png" for number, (colour, _) in enumerate(asked)]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    rows = [(colour, number) for number, (colour, _) in enumerate(asked)]
    make_contact_sheet(paths, rows, str(folder.parent)).save(folder / "sheet.jpg", quality=92)


if __name__ == "__main__":
    main()

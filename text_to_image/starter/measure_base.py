"""Measures a starter model: do its pictures show what unseen captions ask for, and how exact is its VAE?

python measure_base.py                          the shipped model, 200 captions, inference.py's default settings
python measure_base.py --model ../../output/run --captions 50 --save samples
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from classifier import accuracy, classify, load_classifier
from describe import ABOUT, PLURAL_KINDS, caption_of
from pictures import HELD_OUT, SHARES, SIZES
from render_garments import Spec, sample_spec

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE.parent))  # the folders of the entry points

from data.images import open_image  # noqa: E402
from generation.contact_sheet import make_contact_sheet  # noqa: E402
from generation.generate import MAX_TOKEN_CHUNKS  # noqa: E402
from generation.image_generator import encode_all_prompts  # noqa: E402
from generation.weights import find_weights  # noqa: E402
from models.folders import read_shape  # noqa: E402
from models.loading import load_unet, load_vae, quiet_libraries, set_attention  # noqa: E402
from models.samplers import SamplingSettings  # noqa: E402
from models.sampling import (  # noqa: E402
    decode_latents,
    generate_latents,
    guidance_scale_of,
    initial_noise,
    load_sampler,
    sampling_conditions,
)
from runtime.devices import choose_device  # noqa: E402

SENTENCES = (1, 2, 5, 9)  # where an attribute is named in captions of nine sentences
NAMED_ALONE = ("colour", "kind", "marker")  # the attributes that are named so
GOALS = {"kind": 0.97, "colour": 0.97, "marker": 0.95, "pattern": 0.90, "view": 0.90}


def held_out_captions(count: int) -> list[tuple[Spec, str]]:
    """(spec, caption) for seeds that were never trained on; the captions have one to three chunks."""
    cases = []
    for i in range(count):
        spec = sample_spec(HELD_OUT + 1_000_000 + i)
        words = (12, 12, 30, 50, 90)[i % 5]
        cases.append((spec, caption_of(spec, np.random.default_rng([spec.seed, 7]), words)))
    return cases


def sentence_about(spec: Spec, attribute: str) -> str:
    """'The garment is red.', 'It is a pair of shorts.', 'There is a black square in the upper left corner.'"""
    if attribute == "colour":
        return f"The garment is {spec.colour}."
    if attribute == "kind":
        return f"It is a {'pair of ' if spec.kind in PLURAL_KINDS else ''}{spec.kind}."
    return f"There is a black square in the {spec.marker} corner."


def in_sentence(position: int, attribute: str, count: int) -> list[tuple[Spec, str]]:
    """(spec, caption) with nine sentences, of which this one alone tells what the picture shows."""
    specs = (sample_spec(seed) for seed in itertools.count(HELD_OUT + 2_000_000))
    cases = []
    for spec in itertools.islice((s for s in specs if getattr(s, attribute)), count):
        sentences = [str(s) for s in np.random.default_rng([spec.seed, 7]).permutation(ABOUT)[:8]]
        sentences.insert(position - 1, sentence_about(spec, attribute))
        cases.append((spec, " ".join(sentences)))
    return cases


def measure_sentences(folder: Path, classifier, count: int, steps: int, guidance: float) -> dict[str, dict[str, str]]:
    """How often each attribute is right, by the sentence that names it."""
    shares = {attribute: {} for attribute in NAMED_ALONE}
    for attribute, position in itertools.product(NAMED_ALONE, SENTENCES):
        cases = in_sentence(position, attribute, count)
        images = generate_samples(folder, [text for _, text in cases], [SIZES[0]] * count, steps, guidance)
        found = [picture[attribute] for picture in classify(classifier, images)]
        right = [value == getattr(spec, attribute) for (spec, _), value in zip(cases, found, strict=True)]
        shares[attribute][f"sentence {position}"] = f"{np.mean(right):.1%} of {count}"
    return shares


def named_attributes(spec: Spec, caption: str) -> set[str]:
    """The attributes of GOALS that a caption names; only those count."""
    text = caption.lower()
    names = {"kind", "colour"}
    if spec.marker and "square" in text:
        names.add("marker")
    if "no reference marker" in text or "no marker" in text:
        names.add("marker")
    if spec.pattern != "plain" or "plain " + spec.colour in text:
        names.add("pattern")
    words = ("view", "facing up", f"the {spec.view} of", f"from the {spec.view}")
    if spec.fold != "half" and any(word in text for word in words):
        names.add("view")
    return names


@torch.no_grad()
def generate_samples(
    folder: Path, prompts: list[str], sizes: list[tuple[int, int]], steps: int, guidance: float, seed: int = 0
) -> list[Image.Image]:
    """One picture for each prompt, as inference.py generates it with seed + i; `sizes` are (width, height)."""
    device = choose_device()
    shape, source = read_shape(folder), find_weights(str(folder))
    text = encode_all_prompts(source, ["", *prompts], MAX_TOKEN_CHUNKS, device, torch.float32)
    unet, vae = load_unet(folder).to(device).eval(), load_vae(folder).to(device)
    set_attention(unet, shape, 256, 256, device.type)
    sampler, images = load_sampler(folder), {}
    for size in sorted(set(sizes)):
        indices = [i for i, s in enumerate(sizes) if s == size]
        for start in range(0, len(indices), 8):
            part = indices[start : start + 8]
            noise = torch.stack([initial_noise(seed + i, shape.latent_shape(size[1], size[0])) for i in part])
            settings = SamplingSettings(steps, guidance)
            pairs = [(text[prompts[i]], text[""]) for i in part]
            conditions = sampling_conditions(pairs, (size[1], size[0]), settings)
            latents = generate_latents(unet, sampler, noise, conditions, settings)
            images.update(zip(part, decode_latents(vae, latents), strict=True))
            print(f"generated {len(images)} of {len(prompts)}", file=sys.stderr, flush=True)
    return [images[i] for i in range(len(prompts))]


@torch.no_grad()
def psnr_on(folder: Path, dataset: Path, size: tuple[int, int] = (224, 288)) -> tuple[float, float]:
    """PSNR in dB of the VAE's reconstructions of pictures in `dataset` at `size`: of all pixels, of garment pixels."""
    vae, whole, garment = load_vae(folder), [], []
    for path in sorted(p for p in dataset.iterdir() if p.suffix.lower() in (".jpg", ".png")):
        pixels = np.asarray(open_image(path).resize(size, Image.Resampling.LANCZOS))
        x = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        error = ((vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1) - x) / 2) ** 2
        cloth = (torch.from_numpy(pixels.copy()).float().amin(-1) < 225)[None, None].expand_as(error)
        whole.append(error.mean().item())
        garment.append(error[cloth].mean().item())
    return tuple(float(-10 * np.log10(np.mean(errors))) for errors in (whole, garment))


def save_samples(images: list[Image.Image], cases: list[tuple[Spec, str]], folder: Path, title: str) -> None:
    """Writes the pictures, and a sheet of the first 40 with their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:03d}.png" for i in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        image.save(path)
    captions = [(caption, i) for i, (_, caption) in enumerate(cases)]
    make_contact_sheet(paths[:40], captions[:40], title).save(folder / "sheet.jpg", quality=92)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "base", help="pipeline folder")
    parser.add_argument("--captions", type=int, default=200, help="number of captions, with one picture each; 0: none")
    parser.add_argument(
        "--sentences", type=int, default=0, help="captions for each attribute and each sentence that names it; 0: none"
    )
    parser.add_argument("--steps", type=int, default=25, help="sampling steps, as inference.py's default")
    parser.add_argument("--guidance_scale", type=float, help="default: the model's, as in inference.py")
    parser.add_argument(
        "--renders", type=int, default=400, help="number of renders to measure the classifier itself on"
    )
    parser.add_argument("--dataset", type=Path, default=HERE.parent.parent / "dataset", help="for the VAE's PSNR")
    parser.add_argument("--save", type=Path, help="folder for the pictures and a sheet of the first 40")
    args = parser.parse_args()
    quiet_libraries()
    guidance = args.guidance_scale if args.guidance_scale is not None else guidance_scale_of(args.model)
    cases, classifier, started = held_out_captions(args.captions), load_classifier(), time.time()
    sizes = [SIZES[k] for k in np.random.default_rng(0).choice(len(SIZES), len(cases), p=SHARES)]
    images = generate_samples(args.model, [caption for _, caption in cases], sizes, args.steps, guidance)
    seconds = time.time() - started
    result = {name: [] for name in GOALS}
    misses = []
    for (spec, caption), found in zip(cases, classify(classifier, images), strict=True):
        for name in named_attributes(spec, caption) & set(GOALS):
            result[name].append(found[name] == getattr(spec, name))
            if not result[name][-1]:
                misses.append(f"{name}: asked {getattr(spec, name)}, found {found[name]}: {caption[:100]}")
    whole, garment = psnr_on(args.model, args.dataset)
    report = {
        "captions": len(cases), "steps": args.steps, "guidance_scale": guidance,
        "right": {name: f"{np.mean(right):.1%} of {len(right)}" for name, right in result.items() if right},
        "reached": {name: bool(np.mean(right) >= GOALS[name]) for name, right in result.items() if right},
        "named_alone_in": measure_sentences(args.model, classifier, args.sentences, args.steps, guidance)
        if args.sentences else None,
        "classifier": {k: f"{v:.1%}" for k, v in accuracy(classifier, args.renders).items()} if args.renders else None,
        "vae_psnr_db": {"whole": round(whole, 1), "garment": round(garment, 1)},
        "seconds_per_picture": round(seconds / max(len(cases), 1), 2),
    }  # fmt: skip
    if args.save:
        save_samples(images, cases, args.save, f"{args.model.name}, {args.steps} steps, guidance {guidance}")
    print("\n".join(misses))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

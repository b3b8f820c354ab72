"""Measures the starter captioner on renders with seeds that were never trained on, and on the pictures in dataset/.

python measure_captioner.py                      the shipped model, 500 renders, every ninth one jeans
python measure_captioner.py --model FOLDER --renders 90
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from transformers import BlipForConditionalGeneration, BlipProcessor
from transformers.utils import logging

from captioner_words import ATTRIBUTES, read_caption
from make_dataset import PICTURES
from pictures import HELD_OUT, SIZES
from render_garments import Spec, render, sample_spec

HERE = Path(__file__).resolve().parent
sys.path.insert(1, str(HERE.parent))  # the folders of the entry points

from data.images import open_image  # noqa: E402

GOAL = 0.95


def load_captioner(folder: Path) -> tuple[BlipForConditionalGeneration, BlipProcessor]:
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = BlipForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return model.to(device).eval(), BlipProcessor.from_pretrained(folder)


@torch.inference_mode()
def captions_of(
    model: BlipForConditionalGeneration, processor: BlipProcessor, images: list[Image.Image], batch: int = 25
) -> list[str]:
    """One caption a picture, by greedy search, as img_captioning.py writes it."""
    texts = []
    for start in range(0, len(images), batch):
        inputs = processor(images=images[start : start + batch], return_tensors="pt").to(model.device)
        tokens = model.generate(**inputs, max_new_tokens=60, num_beams=1, do_sample=False)
        texts += [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
    return texts


def held_out_specs(count: int) -> tuple[list[Spec], list[tuple[int, int]]]:
    """Specs with seeds that were never trained on, every ninth one jeans, and their sizes (width, height)."""
    specs = [sample_spec(HELD_OUT + i, "jeans" if i % 9 == 8 else None) for i in range(count)]
    return specs, [SIZES[i // 9 % len(SIZES)] for i in range(count)]


def render_all(specs: list[Spec], sizes: list[tuple[int, int]]) -> list[Image.Image]:
    """The pictures of these specs at these sizes, rendered in parallel."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(render, specs, *zip(*sizes, strict=True), chunksize=10))


def check_caption(spec: Spec, caption: str) -> dict[str, bool]:
    """Whether a caption is right about each attribute that it should name; one that cannot be parsed is wrong in all.

    'marker' is whether there is one; 'corner' is where, and is only there for a spec with a marker.
    """
    named = read_caption(caption) or dict.fromkeys(ATTRIBUTES, "unreadable")
    right = {name: named[name] == getattr(spec, name) for name in ATTRIBUTES}
    right["marker"] = named["marker"] != "unreadable" and bool(named["marker"]) == bool(spec.marker)
    if spec.marker:
        right["corner"] = named["marker"] == spec.marker
    if spec.fold == "half":
        del right["view"]
    if spec.pattern == "plain":
        del right["second"]
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE / "captioner", help="BLIP folder")
    parser.add_argument("--renders", type=int, default=500, help="how many pictures to render")
    parser.add_argument(
        "--dataset", type=Path, default=HERE.parent.parent / "dataset", help="make_dataset.py's folder"
    )
    args = parser.parse_args()
    model, processor = load_captioner(args.model)
    specs, sizes = held_out_specs(args.renders)
    images, started = render_all(specs, sizes), time.time()
    captions = captions_of(model, processor, images)
    seconds, right = time.time() - started, {}
    for spec, size, caption in zip(specs, sizes, captions, strict=True):
        for name, value in check_caption(spec, caption).items():
            right.setdefault(name, []).append(value)
            if not value:
                asked = spec.marker if name == "corner" else getattr(spec, name)
                print(f"{name}: {asked} on {spec.kind} {spec.seed} at {size}: {caption}", file=sys.stderr)
    reference = captions_of(model, processor, [open_image(args.dataset / name) for name in PICTURES])
    report = {
        "renders": len(specs),
        "right": {name: f"{sum(v) / len(v):.1%} of {len(v)}" for name, v in right.items()},
        "reached": all(sum(v) / len(v) >= GOAL for v in right.values()),
        "dataset": dict(zip(PICTURES, reference, strict=True)),
        "dataset_wrong": {
            name: [k for k, v in check_caption(spec, caption).items() if not v]
            for (name, (spec, _)), caption in zip(PICTURES.items(), reference, strict=True)
        },
        "seconds_per_picture": round(seconds / len(specs), 3),
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

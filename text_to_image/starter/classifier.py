"""A small classifier of garments, with which measure_base.py checks samples. It is trained on renders alone.

python classifier.py --work /scratch/starter      trains it on the pictures that pretrain_base.py rendered there
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from pictures import HELD_OUT, SHARES, SIZES, load_pairs, load_pictures, pair_specs, picture_specs
from render_garments import COLOURS, CORNERS, KINDS, PATTERNS, Spec, mirrored_spec, render, sample_spec

WEIGHTS = Path(__file__).resolve().parent / "classifier.safetensors"
SIDE = 128  # px of the padded square
CLASSES = {
    "kind": KINDS,
    "colour": tuple(COLOURS),
    "pattern": PATTERNS,
    "view": ("front", "back"),
    "fold": ("flat", "half", "knee", "cuffs"),
    "marker": (None, *CORNERS),
}


class GarmentClassifier(torch.nn.Module):
    """Pictures (B, 3, SIDE, SIDE) in 0..1 -> {attribute: logits (B, number of its CLASSES)}."""

    def __init__(self, widths=(16, 32, 64, 128, 160)):
        super().__init__()
        layers, before = [], 3
        for width in widths:
            layers += [torch.nn.Conv2d(before, width, 3, 2, 1), torch.nn.BatchNorm2d(width), torch.nn.ReLU()]
            layers += [torch.nn.Conv2d(width, width, 3, 1, 1), torch.nn.BatchNorm2d(width), torch.nn.ReLU()]
            before = width
        self.features = torch.nn.Sequential(
            *layers, torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Dropout(0.2)
        )
        self.heads = torch.nn.ModuleDict({k: torch.nn.Linear(before * 16, len(v)) for k, v in CLASSES.items()})

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.features(images * 2 - 1)
        return {name: head(features) for name, head in self.heads.items()}


def to_square(image: Image.Image | np.ndarray) -> torch.Tensor:
    """A picture of any size as (3, SIDE, SIDE) in 0..1, padded with white."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    h, w = pixels.shape[2:]
    side = max(h, w)
    top, left = (side - h) // 2, (side - w) // 2
    square = F.pad(pixels, (left, side - w - left, top, side - h - top), value=1.0)
    return F.interpolate(square, (SIDE, SIDE), mode="bilinear", antialias=True)[0].clamp(0, 1)


def load_classifier() -> GarmentClassifier:
    model = GarmentClassifier()
    model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in load_file(WEIGHTS).items()})
    return model.eval()


@torch.no_grad()
def classify(model: GarmentClassifier, images: list[Image.Image]) -> list[dict]:
    """The attributes of each picture: [{'kind': 'shirt', 'colour': 'red', …}, …]."""
    found = []
    for start in range(0, len(images), 32):
        logits = model(torch.stack([to_square(i) for i in images[start : start + 32]]))
        classes = {name: values.argmax(1).tolist() for name, values in logits.items()}
        found += [{k: CLASSES[k][v[i]] for k, v in classes.items()} for i in range(len(images[start : start + 32]))]
    return found


def class_indices(spec: Spec) -> list[int]:
    """The index of each attribute's value in CLASSES."""
    return [CLASSES[name].index(getattr(spec, name)) for name in CLASSES]


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Adds noise, blur and changes of exposure: samples are not as clean as renders."""
    if torch.rand((), generator=generator) < 0.5:
        small = F.interpolate(
            images,
            scale_factor=float(torch.rand((), generator=generator) * 0.3 + 0.7),
            mode="bilinear",
            antialias=True,
        )
        images = F.interpolate(small, images.shape[-2:], mode="bilinear")
    shape = (len(images), 3, 1, 1)
    images = images * (1 + 0.04 * torch.randn(shape, generator=generator)) + 0.02 * torch.randn(
        shape, generator=generator
    )
    return (images + 0.03 * torch.rand(()) * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def classification_loss(logits: dict[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    """The sum of the cross entropies of all attributes; `target` (B, attributes) are class indices.

    The view of a garment folded in half does not count.
    """
    unfolded = target[:, list(CLASSES).index("fold")] != CLASSES["fold"].index("half")
    counted, everything = {"view": unfolded}, torch.ones_like(unfolded)
    return sum(
        F.cross_entropy(values[counted.get(name, everything)], target[:, i][counted.get(name, everything)])
        for i, (name, values) in enumerate(logits.items())
    )


def train(model: GarmentClassifier, work: Path, steps: int, batch: int = 48) -> GarmentClassifier:
    """Trains on single pictures and pairs, half of them mirrored, all augmented; returns the model in eval mode."""
    model.train()
    images = torch.stack([to_square(p) for size in range(3) for p in tqdm(_all_pictures(work, size), mininterval=10)])
    images = images.half()
    count = round(len(load_pictures(work, 0)) / SHARES[0])
    specs = [spec for size in range(len(SIZES)) for spec in _all_specs(size, count)]
    labels = torch.tensor([[class_indices(s), class_indices(mirrored_spec(s))] for s in specs])  # (N, 2, attributes)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.02)
    for step in tqdm(range(steps), mininterval=10):
        optimizer.param_groups[0]["lr"] = 1.5e-3 * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        picked = torch.randint(len(images), (batch,), generator=generator)
        flipped = torch.randint(2, (batch,), generator=generator)
        pixels = images[picked].float()
        pixels = torch.where(flipped.view(-1, 1, 1, 1) == 1, pixels.flip(-1), pixels)
        target = labels[picked, flipped]
        logits = model(augment(pixels, generator))
        loss = classification_loss(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def _all_pictures(work: Path, size: int) -> list[np.ndarray]:
    """The single pictures, then the pairs, which show what distinguishes front from back."""
    return [*load_pictures(work, size), *(picture for pair in load_pairs(work, size) for picture in pair)]


def _all_specs(size: int, count: int) -> list[Spec]:
    """The specs of _all_pictures."""
    pairs = [replace(spec, view=view) for spec in pair_specs(size, count) for view in ("front", "back")]
    return [*picture_specs(size, count), *pairs]


def accuracy(model: GarmentClassifier, count: int) -> dict[str, float]:
    """The share of right classes for each attribute, on renders with seeds that were never trained on."""
    specs = [sample_spec(HELD_OUT + i) for i in range(count)]
    found = classify(model, [render(s, *SIZES[i % 3]) for i, s in enumerate(specs)])
    right = {name: [f[name] == getattr(s, name) for f, s in zip(found, specs, strict=True)] for name in CLASSES}
    right["view"] = [r for r, s in zip(right["view"], specs, strict=True) if s.fold != "half"]
    return {name: float(np.mean(values)) for name, values in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="the --work folder of pretrain_base.py")
    parser.add_argument("--steps", type=int, default=1500, help="optimisation steps")
    parser.add_argument("--go_on", action="store_true", help="start with the weights in classifier.safetensors")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = train(load_classifier() if args.go_on else GarmentClassifier(), args.work, args.steps)
    save_file({k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}, WEIGHTS)
    print({name: f"{value:.1%}" for name, value in accuracy(load_classifier(), 600).items()})


if __name__ == "__main__":
    main()

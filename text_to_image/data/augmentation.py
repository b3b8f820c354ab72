"""Augmentations of a picture: mirrored or not, scaled down, rotated and translated.

Trained on few pictures, a model also learns where in the frame they lie, and every result repeats that. Augmentation
never crops: the picture is scaled down and moved within the room that this leaves, and its edge pixels fill the rest.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from data.mirroring import mirror_caption

AFFINE_VARIANTS = 16  # of each picture; few enough to encode all of them once


@dataclass(frozen=True)
class Affine:
    """Size, rotation and place of a picture in its frame; the defaults leave it unchanged."""

    scale: float = 1.0  # an upper bound: a rotated picture shrinks further until it fits
    rotation: float = 0.0  # radians, clockwise, below pi / 2
    translate_x: float = 0.0  # -1 (left edge) to 1 (right edge): the share of the free room, from the centre
    translate_y: float = 0.0  # -1 (top edge) to 1 (bottom edge)


@dataclass(frozen=True)
class Augmentation:
    """How one sample shows its picture."""

    mirrored: bool = False
    affine: Affine = Affine()


NO_AUGMENTATION = (Augmentation(),)


@cache
def list_augmentations(may_flip: bool, random_affine: float) -> tuple[Augmentation, ...]:
    """All augmentations of a picture, which samples choose from equally often; the unchanged picture comes first.

    `random_affine` A: scaled by 1 - A to 1, and rotated by up to A / 4 radians either way. 0: no affine variants.
    """
    affines = [Affine(), *(_affine_variants(random_affine) if random_affine else [])]
    return tuple(Augmentation(mirrored, affine) for mirrored in (False, True)[: 1 + may_flip] for affine in affines)


def _affine_variants(strength: float) -> list[Affine]:
    """Evenly spread Sobol points (Joe & Kuo 2008), the same for every picture and every run."""
    points = torch.quasirandom.SobolEngine(4, scramble=True, seed=0).draw(AFFINE_VARIANTS - 1).tolist()
    return [Affine(1 - strength * a, strength * (b - 0.5) / 2, 2 * c - 1, 2 * d - 1) for a, b, c, d in points]


def apply_augmentation(pixels: torch.Tensor, augmentation: Augmentation) -> torch.Tensor:
    """(3, H, W) in [-1, 1] → the same shape and range, augmented."""
    if augmentation.mirrored:
        pixels = pixels.flip(-1)
    if augmentation.affine == Affine():
        return pixels
    return _apply_affine(pixels, augmentation.affine, "bicubic", "border").clamp(-1, 1)


def augment_mask(mask: torch.Tensor, augmentation: Augmentation) -> torch.Tensor:
    """(1, H, W) in [0, 1] → the same shape and range, moved as its picture is; 0 outside of the picture."""
    if augmentation.mirrored:
        mask = mask.flip(-1)
    return mask if augmentation.affine == Affine() else _apply_affine(mask, augmentation.affine, "bilinear", "zeros")


def augmented_caption(caption: str, augmentation: Augmentation) -> str:
    """The caption of the augmented picture: 'left' and 'right' change places where it is mirrored."""
    return mirror_caption(caption) if augmentation.mirrored else caption


def fit_in_frame(affine: Affine, height: int, width: int) -> tuple[float, float, float]:
    """(scale, x, y) with which all of the picture stays in the frame; its centre is (x, y), -1 to 1 across it."""
    cos, sin = math.cos(affine.rotation), abs(math.sin(affine.rotation))
    # The bounding box of the rotated picture, as a fraction of the frame.
    box_width, box_height = cos + sin * height / width, cos + sin * width / height
    scale = min(affine.scale, 1 / box_width, 1 / box_height)
    return scale, affine.translate_x * (1 - scale * box_width), affine.translate_y * (1 - scale * box_height)


def _apply_affine(pixels: torch.Tensor, affine: Affine, mode: str, padding_mode: str) -> torch.Tensor:
    """(C, H, W) moved in its frame; `mode` and `padding_mode` as `grid_sample` has them."""
    height, width = pixels.shape[-2:]
    scale, x, y = fit_in_frame(affine, height, width)
    cos, sin = math.cos(affine.rotation) / scale, math.sin(affine.rotation) / scale
    # The inverse transform: affine_grid wants, for each place in the output, the place in the input to sample. Both
    # are 2 wide and 2 high there, whatever their shape.
    inverse = torch.tensor([[cos, sin * height / width], [-sin * width / height, cos]])
    theta = torch.hstack([inverse, -inverse @ torch.tensor([[x], [y]])])[None]
    grid = F.affine_grid(theta, [1, *pixels.shape], align_corners=False)
    return F.grid_sample(pixels[None], grid, mode=mode, padding_mode=padding_mode, align_corners=False)[0]

"""The views that training has of one picture: as it is or mirrored, whole or a little smaller, moved and turned.

Few pictures are otherwise learned together with their place in the frame, and every result repeats it. A view never
loses a part of its picture: that is made smaller and moved within the room this leaves, which continues its edge.
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

AFFINE_VARIANTS = 16  # of each picture; few enough to encode them all once


@dataclass(frozen=True)
class Affine:
    """Where in the frame a picture lies."""

    scale: float = 1.0  # at most: a turned picture is made smaller until it fits
    turn: float = 0.0  # radians, clockwise, less than a right angle
    right: float = 0.0  # of the way that there is from the middle to the edge, -1 to 1
    down: float = 0.0


@dataclass(frozen=True)
class Augmentation:
    """A picture as training sees it."""

    mirrored: bool = False
    affine: Affine = Affine()


NO_AUGMENTATION = (Augmentation(),)


@cache
def list_augmentations(may_flip: bool, random_affine: float) -> tuple[Augmentation, ...]:
    """All views of a picture, equally often seen; as it is comes first.

    `random_affine` A: smaller by up to A, and turned by up to A / 4 radians.
    """
    poses = [Affine(), *(_spread_poses(random_affine) if random_affine else [])]
    return tuple(Augmentation(mirrored, pose) for mirrored in (False, True)[: 1 + may_flip] for pose in poses)


def _spread_poses(most: float) -> list[Affine]:
    """Evenly over all that is possible, the same for every picture and run: Sobol points (Joe & Kuo 2008)."""
    points = torch.quasirandom.SobolEngine(4, scramble=True, seed=0).draw(AFFINE_VARIANTS - 1).tolist()
    return [Affine(1 - most * a, most * (b - 0.5) / 2, 2 * c - 1, 2 * d - 1) for a, b, c, d in points]


def apply_augmentation(pixels: torch.Tensor, view: Augmentation) -> torch.Tensor:
    """(3, H, W) in [-1, 1] → the same of this view."""
    if view.mirrored:
        pixels = pixels.flip(-1)
    return pixels if view.affine == Affine() else _laid(pixels, view.affine)


def place(pose: Affine, height: int, width: int) -> tuple[float, float, float]:
    """How large a picture lies in its own frame so that all of it is in there, and where its middle is: (scale, x, y),
    the frame reaching from -1 to 1."""
    cos, sin = math.cos(pose.turn), abs(math.sin(pose.turn))
    wide, high = cos + sin * height / width, cos + sin * width / height  # the turned picture, in frames
    scale = min(pose.scale, 1 / wide, 1 / high)
    return scale, pose.right * (1 - scale * wide), pose.down * (1 - scale * high)


def _laid(pixels: torch.Tensor, pose: Affine) -> torch.Tensor:
    height, width = pixels.shape[-2:]
    scale, x, y = place(pose, height, width)
    cos, sin = math.cos(pose.turn) / scale, math.sin(pose.turn) / scale
    # affine_grid asks, for each place in the view, where in the picture to look; both are 2 wide and 2 high there.
    look = torch.tensor([[cos, sin * height / width], [-sin * width / height, cos]])
    grid = F.affine_grid(torch.hstack([look, -look @ torch.tensor([[x], [y]])])[None], [1, *pixels.shape], False)
    laid = F.grid_sample(pixels[None], grid, mode="bicubic", padding_mode="border", align_corners=False)
    return laid[0].clamp(-1, 1)

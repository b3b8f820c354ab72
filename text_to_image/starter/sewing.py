"""Helpers of the sewing patterns: rounded outlines, limbs, hems, mirrored pieces; all in garment units."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from cloth import Piece


@dataclass
class Look:
    """What the sewing patterns of one garment have in common."""

    rng: np.random.Generator
    back: bool
    thread: tuple[float, float, float]  # colour of the stitching
    button: tuple[float, float, float]
    worn: tuple[float, float, float] | None = None  # colour of worn denim; None for cloth that does not fade

    def vary(self, value: float, by: float = 0.08) -> float:
        """`value`, randomly larger or smaller by up to the share `by`."""
        return value * (1 + self.rng.uniform(-by, by))


def smooth(points, rounds: int = 3, closed: bool = True, keep: Sequence[int] = ()) -> np.ndarray:
    """Rounds the corners of a line (Chaikin's corner cutting); corners with an index in `keep` stay sharp."""
    sharp = {tuple(np.asarray(points[i], float)) for i in keep}
    pts = [np.asarray(p, float) for p in points]
    for _ in range(rounds):
        out = []
        for i, p in enumerate(pts):
            before, after = pts[i - 1], pts[(i + 1) % len(pts)]
            ends = not closed and i in (0, len(pts) - 1)
            out += [p] if ends or tuple(p) in sharp else [0.75 * p + 0.25 * before, 0.75 * p + 0.25 * after]
        pts = out
    return np.array(pts)


def flip(points) -> np.ndarray:
    """The points mirrored at the vertical axis."""
    return np.asarray(points, float) * [-1, 1]


def line(*points) -> np.ndarray:
    """A smooth open line through about these points."""
    return smooth(points, 2, closed=False)


def limb(axis, widths) -> np.ndarray:
    """The outline of a sleeve or leg around its axis (N points) with a width at each."""
    axis, half = np.asarray(axis, float), np.asarray(widths)[:, None] / 2
    along = np.gradient(axis, axis=0)
    across = np.stack([-along[:, 1], along[:, 0]], 1) / np.linalg.norm(along, axis=1, keepdims=True)
    return smooth(np.r_[axis + across * half, (axis - across * half)[::-1]], 2, keep=(0, len(axis) - 1, len(axis), -1))


def hem(a, b, look: Look, inset=(0.0, -0.025)) -> list[Piece]:
    """A sewn hem along the edge from a to b: a groove with stitches just above it."""
    edge = np.array([a, b], float) + np.asarray(inset)
    return [
        Piece("seam", edge, 0.006, depth=0.7),
        Piece("stitch", edge - np.asarray(inset) * 0.25, 0.004, colour=look.thread),
    ]


def double_stitch(points, look: Look, width: float = 0.0045) -> list[Piece]:
    """A groove with stitches just below it."""
    return [Piece("seam", points, 0.008), Piece("stitch", np.asarray(points) + [0, 0.007], width, colour=look.thread)]


def mapped(piece: Piece, mapping: Callable) -> Piece:
    """The piece with its points moved by `mapping`, and its grain turned with them where that mirrors."""
    mirrored = mapping([[1, 0]])[0, 0] < 0
    return Piece(
        piece.role,
        mapping(piece.points),
        piece.width,
        -piece.angle if mirrored else piece.angle,
        piece.tint,
        piece.puff,
        piece.depth,
        piece.colour,
    )

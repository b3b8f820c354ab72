"""What a garment lies on besides a white table: paper, wood or cloth; and the light and the camera of such pictures.

A background is a word or two: 'white', a colour for paper, 'wood', 'light wood', 'dark wood', or a colour and 'cloth'.
"""

import numpy as np
from PIL import Image

from cloth import noise

WOODS = {"wood": (168, 118, 76), "light wood": (212, 178, 134), "dark wood": (92, 60, 40)}


def paper(shape: tuple[int, int], colour: tuple[float, float, float], rng: np.random.Generator) -> np.ndarray:
    """An even surface in nearly this colour, (H, W, 3) in 0..255."""
    tone = 1 + 0.008 * noise(shape, (3, 3), rng) + 0.006 * rng.standard_normal(shape).astype(np.float32)
    return _shade(colour, rng) * tone[..., None]


def wood(shape: tuple[int, int], colour: tuple[float, float, float], rng: np.random.Generator) -> np.ndarray:
    """Planks with grain and dark gaps between them, across or down, (H, W, 3) in 0..255."""
    down = rng.random() < 0.5
    h, w = shape[::-1] if down else shape
    planks = rng.uniform(2.5, 7)
    position = np.arange(h, dtype=np.float32) / h * planks + rng.uniform()
    tones = rng.normal(1, 0.07, int(planks) + 3)[position.astype(int)].astype(np.float32)
    grain = 0.05 * noise((h, w), (h / 2, 4), rng) + 0.06 * noise((h, w), (h / 6, 3), rng)
    rings = np.sin(position[:, None] * rng.uniform(14, 26) + 2.5 * noise((h, w), (planks, 3), rng))
    tone = tones[:, None] * (1 + grain + 0.04 * rings)
    gap = np.abs(position - position.round()) * h / planks < 0.002 * h + 0.8
    tone[gap] *= rng.uniform(0.3, 0.6)
    return _shade(colour, rng) * (tone.T if down else tone)[..., None]


def fabric(shape: tuple[int, int], colour: tuple[float, float, float], rng: np.random.Generator) -> np.ndarray:
    """A blanket or sheet with creases, (H, W, 3) in 0..255."""
    height = noise(shape, (3, 4), rng) + 0.45 * noise(shape, (7, 6), rng) + 0.12 * noise(shape, (20, 20), rng)
    gy, gx = np.gradient(height)
    slope = np.tanh((gx * np.cos(rng.uniform(0, 6.3)) + gy) * shape[1] * rng.uniform(0.02, 0.06))
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]].astype(np.float32)
    period = shape[1] * rng.uniform(0.008, 0.016)
    weave = 0.03 * np.sin(2 * np.pi * x / period) * np.sin(2 * np.pi * y / period)
    grain = 0.03 * rng.standard_normal(shape).astype(np.float32)
    return _shade(colour, rng) * (1 + 0.16 * slope + weave + grain)[..., None]


def _shade(colour: tuple[float, float, float], rng: np.random.Generator) -> np.ndarray:
    return np.clip(np.array(colour) * rng.uniform(0.85, 1.08) + rng.uniform(-6, 6, 3), 12, 250).astype(np.float32)


def surface(
    background: str, shape: tuple[int, int], colours: dict[str, tuple], rng: np.random.Generator
) -> np.ndarray:
    """The surface of this background, (H, W, 3) float32 in 0..255; `colours` by name."""
    if background in WOODS:
        return wood(shape, WOODS[background], rng)
    if background.endswith(" cloth"):
        return fabric(shape, colours[background.removesuffix(" cloth")], rng)
    return paper(shape, colours[background], rng)


def expose(photo: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Light from one side, a vignette and a colour cast on a photo (H, W, 3) in 0..255."""
    h, w = photo.shape[:2]
    y, x = np.mgrid[-1 : 1 : h * 1j, -1 : 1 : w * 1j].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    light = 1 + rng.uniform(0, 0.16) * (np.cos(angle) * x + np.sin(angle) * y)
    vignette = 1 - rng.uniform(0, 0.14) * (x**2 + y**2)
    cast = 1 + rng.uniform(-0.045, 0.045) * np.array([1, 0, -1], np.float32)
    return photo * (light * vignette * rng.uniform(0.88, 1.04))[..., None] * cast


def tilt(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The picture from a camera that is not quite above it: a slight perspective, never beyond the edges."""
    w, h = image.size
    inset = rng.uniform(0, 0.022, (4, 2)) * (w, h)
    corners = np.array([(0, 0), (0, h), (w, h), (w, 0)]) + inset * [(1, 1), (1, -1), (-1, -1), (-1, 1)]
    return image.transform((w, h), Image.Transform.QUAD, corners.flatten().tolist(), Image.Resampling.BICUBIC)

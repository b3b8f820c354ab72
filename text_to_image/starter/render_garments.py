"""Renders flat-lay photographs of garments, with captions: the training data of the starter models.

python render_garments.py --count 24 --to renders               squares of 256 px and metadata.jsonl
python render_garments.py --count 8 --width 768 --height 1024 --supersample 3 --kind jeans --to jeans
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from backgrounds import WOODS, expose, surface, tilt
from cloth import Cloth, Frame, blur, fill, noise
from describe import caption_of
from garments import GARMENTS, Look

KINDS = tuple(kind for kind in GARMENTS if kind != "jeans")
COLOURS = {
    "black": (38, 38, 42),
    "white": (240, 240, 238),
    "grey": (146, 147, 150),
    "red": (196, 34, 40),
    "orange": (236, 124, 28),
    "yellow": (244, 208, 52),
    "green": (42, 138, 68),
    "turquoise": (54, 186, 184),
    "blue": (42, 98, 204),
    "navy": (30, 40, 86),
    "purple": (116, 58, 152),
    "pink": (242, 148, 180),
    "brown": (112, 72, 46),
    "beige": (218, 196, 160),
}
DENIM, WORN_DENIM = (58, 88, 140), (142, 168, 204)
PATTERNS = ("plain", "striped", "checked", "dotted")
CORNERS = ("upper right", "upper left", "lower right", "lower left")


@dataclass(frozen=True)
class Spec:
    """What is on a picture; everything else (shape, creases, light) follows from the seed."""

    kind: str
    colour: str
    pattern: str  # one of PATTERNS
    second: str | None  # the pattern's own colour
    view: str  # front, back
    fold: str  # flat, half, knee (one leg), cuffs
    marker: str | None  # the corner of the black reference square, None without one
    seed: int
    background: str = "white"  # another one (backgrounds.py) also has another light and a tilted camera


def sample_spec(seed: int, kind: str | None = None) -> Spec:
    """A random garment of this kind; without `kind` of any kind but jeans."""
    rng = np.random.default_rng([seed, 1])
    kind = kind or KINDS[rng.integers(len(KINDS))]
    colour, second = rng.choice(list(COLOURS), 2, replace=False)
    pattern = "plain" if kind == "jeans" or rng.random() < 0.55 else str(rng.choice(PATTERNS[1:]))
    if pattern != "plain":
        light = sum(COLOURS[str(colour)]) / 3 > 150
        second = str(rng.choice(["black", "navy", "brown"] if light else ["white", "beige"]))
    folds = {"trousers": ("half", "knee", "cuffs"), "jeans": ("knee", "cuffs")}.get(kind, ("half",))
    fold = str(rng.choice(folds)) if rng.random() < 0.22 else "flat"
    return Spec(
        kind,
        "blue" if kind == "jeans" else str(colour),
        pattern,
        str(second) if pattern != "plain" else None,
        "back" if rng.random() < 0.4 else "front",
        fold,
        str(rng.choice(CORNERS)) if rng.random() < 0.55 else None,
        seed,
    )


def sample_scene(seed: int) -> Spec:
    """A random garment on something that is neither white nor of the garment's colour."""
    spec, rng = sample_spec(seed), np.random.default_rng([seed, 6])
    hidden = {"white", spec.colour, spec.second, "black" if spec.marker else None}
    colour = str(rng.choice([name for name in COLOURS if name not in hidden]))
    background = str(rng.choice([colour, f"{colour} cloth", *WOODS], p=[0.35, 0.3, 0.15, 0.1, 0.1]))
    return replace(spec, background=background)


def mirrored_spec(spec: Spec) -> Spec:
    """The spec of the mirrored picture: the marker changes sides, and captions name no other side."""
    sides = {"right": "left", "left": "right"}
    corner = spec.marker and " ".join(sides.get(word, word) for word in spec.marker.split())
    return replace(spec, marker=corner)


def render(
    spec: Spec, width: int = 256, height: int = 256, supersample: int = 2, same_layout: bool = False
) -> Image.Image:
    """The picture, RGB. The same spec and size give the same pixels; another size shows the same garment.

    With `same_layout` front and back of a spec have the same layout, light and creases: only what is sewn differs.
    """
    rng = np.random.default_rng([spec.seed, 2])
    pieces = GARMENTS[spec.kind](_look(spec, rng))
    if same_layout:  # front and back have taken different numbers of random values for their pieces
        rng = np.random.default_rng([spec.seed, 5])
    frame = _lay_out(pieces, (height * supersample, width * supersample), spec, rng)
    cloth = Cloth(frame, _fabric(spec, rng))
    for piece in pieces:
        cloth.paint(piece)
    _fold(cloth, spec, rng)
    photo = _photograph(cloth, spec, rng)
    image = Image.fromarray(np.clip(photo + 0.5, 0, 255).astype(np.uint8))
    if spec.background != "white":
        image = tilt(image, np.random.default_rng([spec.seed, 8]))
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _look(spec: Spec, rng: np.random.Generator) -> Look:
    base = np.array(COLOURS[spec.colour], float)
    if spec.kind == "jeans":
        return Look(rng, spec.view == "back", (206, 150, 84), (176, 122, 72), WORN_DENIM)
    thread = base * 0.62 if base.mean() > 90 else base * 0.5 + 70
    button = (236, 232, 222) if base.mean() < 150 else (92, 70, 56)
    return Look(rng, spec.view == "back", tuple(thread), button)


def _lay_out(pieces, shape, spec: Spec, rng: np.random.Generator) -> Frame:
    """Fits the garment into the picture with a margin, slightly rotated and off centre, clear of the marker."""
    h, w = shape
    points = np.concatenate([p.points for p in pieces if p.role == "panel"])
    angle = rng.uniform(-0.06, 0.06)
    c, s = np.cos(angle), np.sin(angle)
    turned = points @ np.array([[c, s], [-s, c]])
    low, high = turned.min(0), turned.max(0)
    margin = rng.uniform(0.85, 0.93)
    scale = min(margin * w / (high - low)[0], margin * h / (high - low)[1])
    free = np.array([w, h]) - scale * (high - low)
    origin = free * rng.uniform(0.35, 0.65, 2) - scale * low
    frame = Frame(shape, scale, angle, np.zeros(2), origin)
    if spec.marker is None:
        return frame
    box, scene = _marker_box(spec, shape), frame.pixels(points)
    for _ in range(8):  # shrink it and move it away from the marker's corner until they do not overlap
        if not (fill(shape, _enlarged(box, 0.02 * w)) * _panels(frame, pieces)).any():
            break
        away = np.array([-1 if "right" in spec.marker else 1, 1 if "upper" in spec.marker else -1])
        frame.scale *= 0.95
        scene = frame.pixels(points)
        room = np.where(away > 0, np.array([w, h]) * 0.965 - scene.max(0), scene.min(0) - np.array([w, h]) * 0.035)
        frame.origin = frame.origin + away * room * 0.6
    return frame


def _panels(frame: Frame, pieces) -> np.ndarray:
    return np.max([fill(frame.shape, frame.pixels(p.points)) for p in pieces if p.role == "panel"], axis=0)


def _marker_box(spec: Spec, shape: tuple[int, int]) -> np.ndarray:
    """The corners (4, 2) of the reference square, its side 6 to 8 % of the width; from its own generator."""
    rng = np.random.default_rng([spec.seed, 3])
    h, w = shape
    side, turn = rng.uniform(0.062, 0.08) * w, rng.uniform(-0.12, 0.12)
    gap = rng.uniform(0.035, 0.07, 2) * w
    x = w - gap[0] - side / 2 if "right" in spec.marker else gap[0] + side / 2
    y = gap[1] + side / 2 if "upper" in spec.marker else h - gap[1] - side / 2
    c, s = np.cos(turn), np.sin(turn)
    square = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * side / 2
    return square @ np.array([[c, s], [-s, c]]) + [x, y]


def _enlarged(box: np.ndarray, by: float) -> np.ndarray:
    centre = box.mean(0)
    return centre + (box - centre) * (1 + by / np.linalg.norm(box[0] - centre))


def _fabric(spec: Spec, rng: np.random.Generator) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """A function (u, v) -> colour (H, W, 3) at cloth coordinates (H, W): dye, pattern and weave."""
    base = np.array(DENIM if spec.kind == "jeans" else COLOURS[spec.colour], np.float32)
    base = base * rng.uniform(0.95, 1.05) + rng.uniform(-0.03, 0.03, 3) * base.mean()
    second = np.array(COLOURS[spec.second] if spec.second else base, np.float32)
    period, phase = rng.uniform(0.075, 0.105), rng.uniform(0, 1, 2)
    weave_rng = np.random.default_rng([spec.seed, 4])

    def colour(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        a, b = (u / period + phase[0]) % 1, (v / period + phase[1]) % 1
        soft = lambda d, edge: np.clip(d / edge + 0.5, 0, 1)  # noqa: E731
        if spec.pattern == "striped":
            ink = soft(0.21 - np.abs(b - 0.5), 0.05)
        elif spec.pattern == "checked":
            ink = 0.62 * (soft(0.16 - np.abs(a - 0.5), 0.05) + soft(0.16 - np.abs(b - 0.5), 0.05))
        elif spec.pattern == "dotted":
            ink = soft(0.23 - np.hypot(a - 0.5, b - 0.5), 0.06)
        else:
            ink = np.zeros_like(u)
        tone = 1 + 0.025 * noise(u.shape, (7, 7), weave_rng) + _weave(spec, u, v, weave_rng)
        return (base + np.clip(ink, 0, 1)[..., None] * (second - base)) * tone[..., None]

    return colour


def _weave(spec: Spec, u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The relative brightness of the threads (H, W): denim's diagonal twill and slubs, or an even weave."""
    grain = rng.standard_normal(u.shape).astype(np.float32)
    if spec.kind != "jeans":
        return 0.035 * grain
    twill = np.sin(2 * np.pi * (u + 0.55 * v) / 0.0042)
    slubs = noise(u.shape, (14, u.shape[1] / 3), rng)
    return 0.075 * grain + 0.05 * twill + 0.045 * slubs


def _fold(cloth: Cloth, spec: Spec, rng: np.random.Generator) -> None:
    if spec.fold == "flat":
        return
    ys = cloth.y[cloth.mask > 0.5]
    top, bottom = float(ys.min()), float(ys.max())
    tilt = rng.uniform(-0.05, 0.05)
    if spec.fold == "cuffs":
        cloth.fold((0, bottom - rng.uniform(0.065, 0.085)), (tilt * 0.1, 1), tint=1.18)
    elif spec.fold == "knee":
        side = float(rng.choice([-1, 1]))
        leg = np.array([(0.0, 0.3), (side, 0.3), (side, 2.0), (0.0, 2.0)])
        cloth.fold((0, top + (bottom - top) * rng.uniform(0.62, 0.7)), (-side * rng.uniform(0.05, 0.22), 1), leg)
    elif spec.kind in ("trousers", "shorts"):
        cloth.fold((0.012, 0), (1, tilt))
    else:
        cloth.fold((0, top + (bottom - top) * rng.uniform(0.56, 0.66)), (tilt, 1))
    if spec.fold == "half":
        cloth.centre(by=rng.uniform(0.7, 1))


def _wrinkles(cloth: Cloth, rng: np.random.Generator) -> np.ndarray:
    """The height of soft wrinkles in garment units, (H, W)."""
    shape = cloth.frame.shape
    units = np.array(shape) / cloth.frame.scale
    broad = noise(shape, units * 4, rng) * 0.0075
    ridge = lambda cells: 1 - np.sqrt(noise(shape, units * cells, rng) ** 2 + 0.12)  # noqa: E731
    ridges = 0.0045 * ridge((4, 8)) + 0.0035 * ridge((9, 6))
    fine = 0.0009 * noise(shape, units * 30, rng)
    return (broad + ridges * np.clip(0.5 + noise(shape, units * 3, rng), 0, 1.5)) * rng.uniform(0.6, 1.1) + fine


def _photograph(cloth: Cloth, spec: Spec, rng: np.random.Generator) -> np.ndarray:
    """The lit cloth on its background, shadows, marker, and a camera's exposure and grain; (H, W, 3) in 0..255."""
    h, w = cloth.frame.shape
    turn = rng.uniform(-0.5, 0.5)
    light = (-np.cos(0.9 + turn), -np.sin(0.9 + turn))
    garment = cloth.lit(light, _wrinkles(cloth, rng))
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    slope = ((x / w - 0.5) * light[0] + (y / h - 0.5) * light[1]) * rng.uniform(0, 4)
    table = np.stack([np.full((h, w), t, np.float32) for t in rng.uniform(249, 253) + rng.uniform(-1.2, 1.2, 3)], -1)
    table += slope[..., None]
    if spec.background != "white":
        scene_rng = np.random.default_rng([spec.seed, 7])
        table = surface(spec.background, (h, w), COLOURS, scene_rng)
    shift = [int(round(-d * 0.010 * w)) for d in light]
    mask = cloth.mask
    marker = np.zeros((h, w), np.float32) if spec.marker is None else fill((h, w), _marker_box(spec, (h, w)))
    for image, strength in ((mask, 1.0), (marker, 0.5)):
        contact = blur(image, 0.005 * w)
        cast = np.roll(blur(image, 0.013 * w), shift[::-1], (0, 1))
        table *= (1 - strength * np.clip(0.24 * contact + 0.22 * cast, 0, 0.42))[..., None]
    photo = table + mask[..., None] * (garment - table)
    photo += marker[..., None] * (np.array([22, 22, 24], np.float32) - photo)
    if spec.background != "white":
        photo = expose(photo, scene_rng)
    photo = photo * rng.uniform(0.985, 1.01) + rng.standard_normal((h, w, 1)).astype(np.float32) * 1.6
    return photo


def write_folder(folder: Path, specs: list[Spec], width: int, height: int, supersample: int) -> None:
    """Writes the pictures as JPEG, and their captions to metadata.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as rows:
        for i, spec in enumerate(specs):
            name = f"{i:05d}.jpg"
            render(spec, width, height, supersample).save(folder / name, quality=94)
            row = {"file_name": name, "text": caption_of(spec, np.random.default_rng([spec.seed, 5]))}
            rows.write(json.dumps(row, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, help="folder to write pictures and metadata.jsonl into")
    parser.add_argument("--count", type=int, default=16, help="number of pictures")
    parser.add_argument("--width", type=int, default=256, help="pixels")
    parser.add_argument("--height", type=int, default=256, help="pixels")
    parser.add_argument("--supersample", type=int, default=2, help="render this many times larger, then reduce")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture; each further one has the next")
    parser.add_argument("--kind", choices=sorted(GARMENTS), help="this kind only (default: all but jeans)")
    parser.add_argument("--view", choices=("front", "back"), help="this view only (default: both)")
    args = parser.parse_args()
    specs = [sample_spec(args.seed + i, args.kind) for i in range(args.count)]
    specs = [replace(s, view=args.view) if args.view else s for s in specs]
    write_folder(args.to, specs, args.width, args.height, args.supersample)


if __name__ == "__main__":
    main()

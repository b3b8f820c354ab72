"""A garment as rasters (mask, colour, height above the table, occlusion): pieces are painted, folded and lit."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image, ImageDraw


@dataclass(frozen=True)
class Piece:
    """One thing to paint, in garment units (x to the right, y down, a garment is about 1 high).

    `role` is 'panel' (a piece of cloth, closed outline), 'seam' (a groove, open line), 'stitch' (a dashed thread, open
    line), 'crease' (a soft ridge, open line), 'dot' (a button or rivet at each point) or 'fade' (worn dye,
    closed outline).
    """

    role: str
    points: np.ndarray  # (N, 2)
    width: float = 0.012  # of a line, or a dot's radius
    angle: float = 0.0  # of the cloth's grain, radians: stripes of a sleeve follow the sleeve
    tint: float = 1.0  # multiplies the cloth's colour: 0.6 is the inside of a neck
    puff: float = 1.0  # how much the panel bulges
    depth: float = 1.0  # of a seam, crease or fade; negative creases are valleys
    colour: tuple[float, float, float] | None = None


@dataclass
class Frame:
    """Converts garment units to pixels: rotate about `centre`, scale, move to `origin`."""

    shape: tuple[int, int]  # height, width in (supersampled) pixels
    scale: float  # pixels a garment unit
    angle: float
    centre: np.ndarray
    origin: np.ndarray

    def pixels(self, points: np.ndarray) -> np.ndarray:
        """(N, 2) in garment units -> (N, 2) in pixels."""
        c, s = np.cos(self.angle), np.sin(self.angle)
        return (np.asarray(points) - self.centre) @ np.array([[c, s], [-s, c]]) * self.scale + self.origin

    def units(self) -> tuple[np.ndarray, np.ndarray]:
        """The garment coordinates x, y of every pixel, each (H, W)."""
        h, w = self.shape
        y, x = np.mgrid[0:h, 0:w].astype(np.float32)
        x, y = (x - self.origin[0]) / self.scale, (y - self.origin[1]) / self.scale
        c, s = np.float32(np.cos(self.angle)), np.float32(np.sin(self.angle))
        return c * x + s * y + np.float32(self.centre[0]), c * y - s * x + np.float32(self.centre[1])


@dataclass
class Cloth:
    """The rasters that pieces are painted on, one after the other; (H, W) or (H, W, 3), float32."""

    frame: Frame
    fabric: Callable[[np.ndarray, np.ndarray], np.ndarray]  # (u, v) -> (H, W, 3), colour and pattern in garment units
    mask: np.ndarray = field(init=False)
    albedo: np.ndarray = field(init=False)
    height: np.ndarray = field(init=False)  # in garment units
    occlusion: np.ndarray = field(init=False)

    def __post_init__(self):
        h, w = self.frame.shape
        self.mask, self.height = np.zeros((h, w), np.float32), np.zeros((h, w), np.float32)
        self.occlusion, self.albedo = np.ones((h, w), np.float32), np.zeros((h, w, 3), np.float32)
        self.x, self.y = self.frame.units()

    def paint(self, piece: Piece) -> None:
        """Paints one piece over those before."""
        getattr(self._window(piece), f"_{piece.role}")(piece)

    def _window(self, piece: Piece) -> "Cloth":
        """The part of the cloth that a piece can change, as views of the same rasters: small pieces cost little."""
        points, reach = self.frame.pixels(piece.points), (0.13 + 2.5 * piece.width) * self.frame.scale
        low = np.clip(np.floor(points.min(0) - reach), 0, np.array(self.mask.shape[::-1]) - 2).astype(int)
        high = np.maximum(np.ceil(points.max(0) + reach), low + 2).astype(int)
        window = (slice(low[1], high[1]), slice(low[0], high[0]))
        view = copy.copy(self)
        for name in ("mask", "albedo", "height", "occlusion", "x", "y"):
            setattr(view, name, getattr(self, name)[window])
        view.frame = replace(self.frame, shape=view.mask.shape, origin=self.frame.origin - low)
        return view

    def _blur(self, image: np.ndarray, units: float) -> np.ndarray:
        return blur(image, units * self.frame.scale)

    def _panel(self, piece: Piece) -> None:
        m = fill(self.frame.shape, self.frame.pixels(piece.points))
        near = self._blur(m, 0.014)
        self.occlusion *= 1 - 0.55 * near * (1 - m) * self.mask
        c, s = np.cos(piece.angle), np.sin(piece.angle)
        colour = self.fabric(c * self.x + s * self.y, c * self.y - s * self.x) * piece.tint
        self.albedo += m[..., None] * (colour - self.albedo)
        wide = self._blur(m, 0.05)
        dome = 0.012 * np.clip(2 * near - 1, 0, 1) ** 0.6 + 0.030 * np.clip(2 * wide - 1, 0, 1)
        self.height += m * (piece.puff * dome - self.height)
        self.occlusion += m * ((0.86 + 0.14 * np.clip(2 * near - 1, 0, 1) ** 0.5) - self.occlusion)
        np.maximum(self.mask, m, out=self.mask)

    def _line(self, piece: Piece, dash: float = 0.0) -> np.ndarray:
        pts = self.frame.pixels(piece.points)
        return stroke(self.frame.shape, pts, max(piece.width * self.frame.scale, 1.0), dash * self.frame.scale)

    def _seam(self, piece: Piece) -> None:
        line = self._line(piece) * self.mask
        soft = self._blur(line, 0.006)
        self.height -= 0.006 * piece.depth * soft
        self.occlusion *= 1 - 0.34 * min(piece.depth, 1.5) * np.clip(soft * 1.3, 0, 1)

    def _stitch(self, piece: Piece) -> None:
        line = self._line(piece, dash=0.011) * self.mask * 0.85
        thread = np.asarray(piece.colour, np.float32)
        self.albedo += line[..., None] * (thread - self.albedo)

    def _crease(self, piece: Piece) -> None:
        soft = self._blur(self._line(piece), piece.width * 0.8)
        self.height += 0.010 * piece.depth * soft * self.mask

    def _fade(self, piece: Piece) -> None:
        m = self._blur(fill(self.frame.shape, self.frame.pixels(piece.points)), piece.width)
        worn = np.asarray(piece.colour, np.float32)
        self.albedo += (np.clip(m * piece.depth, 0, 1) * self.mask)[..., None] * (worn - self.albedo)

    def _dot(self, piece: Piece) -> None:
        for point in self.frame.pixels(piece.points):
            disc = fill(self.frame.shape, point + piece.width * self.frame.scale * circle(20))
            self.occlusion *= 1 - 0.4 * self._blur(disc, 0.006) * (1 - disc) * self.mask
            self.albedo += disc[..., None] * (np.asarray(piece.colour, np.float32) - self.albedo)
            self.height += 0.004 * self._blur(disc, 0.004)

    def fold(self, point, normal, region=None, tint: float = 0.93) -> None:
        """Folds what is on the side of `normal` over the line through `point`, so that its back shows.

        `region` (closed outline, garment units) limits what is folded, such as one leg of two.
        """
        p, q = self.frame.pixels(np.array([point, np.asarray(point) + np.asarray(normal)], float))
        n = (q - p) / np.linalg.norm(q - p)
        h, w = self.frame.shape
        side = ((np.arange(w)[None] - p[0]) * n[0] + (np.arange(h)[:, None] - p[1]) * n[1] > 0).astype(np.float32)
        if region is not None:
            side *= fill(self.frame.shape, self.frame.pixels(region))
        flap = self.mask * side
        k = 2 * float(n @ p)  # the reflection x -> x - 2 (n·x) n + k n is its own inverse
        affine = (1 - 2 * n[0] ** 2, -2 * n[0] * n[1], k * n[0], -2 * n[0] * n[1], 1 - 2 * n[1] ** 2, k * n[1])
        over = transform(flap, affine)
        near = self._blur(over, 0.016)
        self.mask *= 1 - side
        self.occlusion *= 1 - 0.6 * near * (1 - over)
        back = np.stack([transform(self.albedo[..., i], affine) for i in range(3)], -1) * tint
        self.albedo += over[..., None] * (back - self.albedo)
        rise = 0.02 * np.clip(2 * near - 1, 0, 1) ** 0.7 + transform(self.height, affine) * 0.6
        self.height += over * (rise - self.height)
        self.occlusion += over * (transform(self.occlusion, affine) - self.occlusion)
        self.mask = np.maximum(self.mask, over)

    def centre(self, by: float) -> None:
        """Moves the garment towards the middle of the picture; 1 centres it, 0 leaves it."""
        for axis in (0, 1):
            (covered,) = np.nonzero(self.mask.max(1 - axis) > 0.5)
            shift = round(by * (self.mask.shape[axis] - covered[0] - covered[-1]) / 2)
            for name in ("mask", "albedo", "height", "occlusion"):
                setattr(self, name, np.roll(getattr(self, name), shift, axis))

    def lit(self, light: tuple[float, float], wrinkles: np.ndarray, gain: float = 1.5) -> np.ndarray:
        """The shaded colour under light from direction `light` (x, y on the table), (H, W, 3) in 0..255."""
        gy, gx = np.gradient((self.height + wrinkles) * self.frame.scale)
        facing = np.tanh(gain * (gx * light[0] + gy * light[1]))
        sheen = 9 * np.clip(facing, -0.3, 1)[..., None]
        return self.albedo * ((1 + 0.38 * facing) * self.occlusion)[..., None] + sheen


def circle(n: int) -> np.ndarray:
    """n points on the unit circle, (n, 2)."""
    t = np.linspace(0, 2 * np.pi, n, endpoint=False)
    return np.stack([np.cos(t), np.sin(t)], 1)


def fill(shape: tuple[int, int], points: np.ndarray) -> np.ndarray:
    """A closed outline in pixels as a mask (H, W) of 0 and 1."""
    image = Image.new("L", shape[::-1])
    ImageDraw.Draw(image).polygon([tuple(p) for p in points], fill=1)
    return np.asarray(image).astype(np.float32)


def stroke(shape: tuple[int, int], points: np.ndarray, width: float, dash: float = 0.0) -> np.ndarray:
    """An open line in pixels as a mask (H, W); `dash` is the length of a stitch, 0 an unbroken line."""
    image = Image.new("L", shape[::-1])
    draw = ImageDraw.Draw(image)
    runs = dashes(points, dash) if dash else [points]
    for run in runs:
        draw.line([tuple(p) for p in run], fill=255, width=max(round(width), 1), joint="curve")
    return np.asarray(image).astype(np.float32) / 255 * min(width, 1.0)


def dashes(points: np.ndarray, length: float) -> list[np.ndarray]:
    """Cuts a line into stitches of `length` with gaps half as long."""
    steps = np.r_[0, np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))]
    starts = np.arange(0, steps[-1], 1.5 * length)
    at = lambda s: np.stack([np.interp(s, steps, points[:, i]) for i in (0, 1)], -1)  # noqa: E731
    return [at(np.array([s, min(s + length, steps[-1])])) for s in starts]


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of (H, W) float32; a wide blur is computed on a smaller grid, where it costs little."""
    step = max(int(sigma / 2), 1)
    h, w = image.shape
    small = resize(image, (max(h // step, 2), max(w // step, 2)), Image.Resampling.BOX) if step > 1 else image
    s = sigma * small.shape[1] / w
    radius = max(int(2.5 * s + 0.5), 1)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / max(s, 0.3)) ** 2).astype(np.float32)
    kernel /= kernel.sum()
    for axis in (0, 1):
        padded = np.pad(small, [(radius, radius) if i == axis else (0, 0) for i in (0, 1)], mode="edge")
        n = small.shape[axis]
        small = sum(k * (padded[i : i + n] if axis == 0 else padded[:, i : i + n]) for i, k in enumerate(kernel))
    return resize(small, (h, w), Image.Resampling.BICUBIC) if step > 1 else small


def resize(image: np.ndarray, shape: tuple[int, int], method) -> np.ndarray:
    return np.asarray(Image.fromarray(np.ascontiguousarray(image, np.float32)).resize(shape[::-1], method))


def transform(image: np.ndarray, affine: tuple[float, ...]) -> np.ndarray:
    """PIL's affine transform of (H, W) float32."""
    source = Image.fromarray(np.ascontiguousarray(image, np.float32))
    return np.asarray(source.transform(source.size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR))


def noise(shape: tuple[int, int], cells: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """Smooth noise (H, W), mean 0 and deviation about 1, with about `cells` bumps down and across."""
    grid = rng.standard_normal((max(round(cells[0]), 2), max(round(cells[1]), 2))).astype(np.float32)
    return resize(grid, shape, Image.Resampling.BICUBIC) * np.float32(1.5)

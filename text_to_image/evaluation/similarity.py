"""How far a picture is from others: by structural similarity, or by the features of a vision model."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from PIL import Image, ImageOps

from runtime.devices import choose_device
from runtime.errors import UserError, first_line
from runtime.progress import progress_bar

try:
    from scipy import fft, ndimage
    from skimage.exposure import match_histograms
    from skimage.metrics import structural_similarity
except ImportError:
    raise UserError("structural similarity needs scikit-image and its scipy: `pip install scikit-image`") from None

LONG_SIDE, SHORTEST = 64, 24  # px; more takes longer and tells copies from others no better
MAX_SHIFT = 5  # px of those, to each side
ZOOMS = (0.91, 0.94, 0.97, 1, 1.03, 1.06, 1.09)
SAME_SHAPE = 0.02  # sides whose ratios differ by less are cut alike
TRIED = 3  # of the poses, whose correlations are much the same for neighbouring sizes
WINDOW = 7  # px, of structural similarity
SHARP = 20  # of 255 grey levels: the deviation from which on a place counts in full
BATCH = 16
BAR = {"delay": 5, "leave": False}  # what is done within seconds shows none


class StructuralSimilarity:
    """1 - SSIM (Wang et al., 2004) of the grey pictures at 64 px, the other one moved to where it fits best.

    It may be mirrored, shifted by 8 % and resized by 9 %, and has its grey levels matched, so that a copy that is
    recoloured or lighter stays a copy. Only places with something to see count: plain ground is alike everywhere.
    """

    name = f"structural similarity at {LONG_SIDE} px"

    def distances(
        self, pictures: Sequence[Image.Image], others: Sequence[Image.Image], desc: str | None = None
    ) -> np.ndarray:
        """(pictures, others), 0 for the same, about 1 for what has nothing in common; with a bar named `desc`."""
        sizes, apart = [small_size(picture) for picture in pictures], np.empty((len(pictures), len(others)))
        by_size = sorted(range(len(pictures)), key=sizes.__getitem__)  # as the poses of one size fill much memory
        told = progress_bar(by_size, desc=desc, unit="picture", disable=desc is None, **BAR)
        for size, group in groupby(told, key=sizes.__getitem__):
            posed = [_Poses.of(other, size) for other in others]
            for i in group:
                grey = _grey(pictures[i].resize(size, Image.Resampling.LANCZOS))
                apart[i] = [1 - max(_similarity(*both) for both in poses.fitted(grey)) for poses in posed]
        return apart


def small_size(picture: Image.Image) -> tuple[int, int]:
    """(width, height) with a long side of 64 px."""
    factor = LONG_SIDE / max(picture.size)
    return max(SHORTEST, round(picture.width * factor)), max(SHORTEST, round(picture.height * factor))


def ground_of(picture: Image.Image) -> tuple[int, int, int]:
    """The colour that most of the border has."""
    pixels = np.asarray(picture)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return tuple(int(level) for level in np.median(border, axis=0))


def resized_on_ground(picture: Image.Image, zoom: float) -> Image.Image:
    """The picture enlarged or made smaller around its middle, its size kept."""
    width, height = round(picture.width * zoom), round(picture.height * zoom)
    canvas = Image.new("RGB", picture.size, ground_of(picture))
    resized = picture.resize((width, height), Image.Resampling.LANCZOS)
    canvas.paste(resized, ((picture.width - width) // 2, (picture.height - height) // 2))
    return canvas


@dataclass(frozen=True)
class _Poses:
    """A picture in all the ways in which it may lie in another: K grey pictures, and what their fit follows from."""

    greys: np.ndarray  # (K, h, w)
    spectra: np.ndarray  # of what stands out from the ground, with room for the shifts
    norms: np.ndarray  # (K,)

    @classmethod
    def of(cls, picture: Image.Image, size: tuple[int, int]) -> "_Poses":
        greys = np.stack([_grey(pose) for pose in _poses(picture, size)])
        shown = greys - _ground(greys)
        return cls(greys, np.conj(_spectrum(shown)), np.sqrt((shown**2).sum((-2, -1))))

    def fitted(self, grey: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Where the two lie on each other, from each one: the best poses by correlation, each at its best shift."""
        correlation = fft.irfft2(_spectrum(grey - _ground(grey)) * self.spectra, _roomy(grey))
        shifts = np.r_[0 : MAX_SHIFT + 1, -MAX_SHIFT:0]
        near = (
            correlation[:, shifts][:, :, shifts].reshape(len(self.greys), -1) / np.maximum(self.norms, 1e-6)[:, None]
        )
        for pose in np.argsort(-near.max(1))[:TRIED]:
            down, right = (int(shift) for shift in shifts[list(np.divmod(near[pose].argmax(), len(shifts)))])
            down, right = _peak(correlation[pose], down, right)
            moved = ndimage.shift(self.greys[pose], (down, right), mode="nearest")
            yield _inside(grey, down, right), _inside(moved, down, right)


def _poses(picture: Image.Image, size: tuple[int, int]) -> Iterator[Image.Image]:
    """Cut to the shape of `size` as training cuts it, or whole on its ground; mirrored and not; smaller and larger."""
    laid = [ImageOps.fit(picture, size, Image.Resampling.LANCZOS)]
    if abs(picture.width * size[1] / (picture.height * size[0]) - 1) > SAME_SHAPE:
        laid.append(ImageOps.pad(picture, size, Image.Resampling.LANCZOS, color=ground_of(picture)))
    for whole in laid:
        for zoom in ZOOMS:
            pose = resized_on_ground(whole, zoom)
            yield pose
            yield ImageOps.mirror(pose)


def _grey(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("L"), dtype=np.float32)


def _roomy(greys: np.ndarray) -> tuple[int, int]:
    return greys.shape[-2] + MAX_SHIFT, greys.shape[-1] + MAX_SHIFT


def _spectrum(greys: np.ndarray) -> np.ndarray:
    return fft.rfft2(greys, _roomy(greys))


def _ground(greys: np.ndarray) -> float:
    """The level that most of the border has."""
    return float(np.median(np.concatenate([greys[..., (0, -1), :].ravel(), greys[..., :, (0, -1)].ravel()])))


def _peak(correlation: np.ndarray, down: int, right: int) -> tuple[float, float]:
    """The shift to a fraction of a pixel, by the parabola through the highest value and its neighbours: half a pixel
    beside it a copy would seem twice as far away."""

    def vertex(before: float, at: float, after: float) -> float:
        bend = before - 2 * at + after
        return float(np.clip((before - after) / (2 * bend), -0.5, 0.5)) if bend < 0 else 0.0

    rows = [(down + i) % correlation.shape[0] for i in (-1, 0, 1)]
    columns = [(right + i) % correlation.shape[1] for i in (-1, 0, 1)]
    return down + vertex(*correlation[rows, columns[1]]), right + vertex(*correlation[rows[1], columns])


def _inside(grey: np.ndarray, down: float, right: float) -> np.ndarray:
    """Without the margin that a shift by so many pixels lays bare."""
    height, width = grey.shape
    top, left = math.ceil(max(down, 0)), math.ceil(max(right, 0))
    return grey[top : math.floor(height + min(down, 0)), left : math.floor(width + min(right, 0))]


def _similarity(one: np.ndarray, other: np.ndarray) -> float:
    other = match_histograms(other, one)
    _, alike = structural_similarity(one, other, data_range=255, win_size=WINDOW, full=True)
    weight = np.minimum(np.maximum(_deviation(one), _deviation(other)), SHARP)
    return float((alike * weight).sum() / weight.sum()) if weight.any() else 1.0


def _deviation(grey: np.ndarray) -> np.ndarray:
    """The local standard deviation, in grey levels: 0 on plain ground."""
    grey = grey.astype(np.float64)
    mean = ndimage.uniform_filter(grey, WINDOW)
    variance = ndimage.uniform_filter(grey**2, WINDOW) - mean**2
    return np.sqrt(np.where(variance > 0.01, variance, 0))  # what is less is rounding


class FeatureSimilarity:
    """1 - cosine of the features that a vision model (DINOv2, CLIP) has for two pictures, mirrored or not."""

    def __init__(self, name: str):
        """UserError where `name` is neither a folder nor a hub id of such a model with safetensors."""
        from transformers import AutoImageProcessor, AutoModel

        self.name = f"features of {name}"
        try:
            self.processor = AutoImageProcessor.from_pretrained(name)
            self.model = AutoModel.from_pretrained(name, use_safetensors=True)
            self.model = self.model.float().to(choose_device()).eval()
            self.features([Image.new("RGB", (64, 64))])  # one that reads text alone is refused now
        except Exception as error:  # the hub's and transformers' errors have no common class
            raise UserError(
                f"--embedder {name}: not a vision model with safetensors that transformers loads: {first_line(error)}"
            ) from None

    def distances(
        self, pictures: Sequence[Image.Image], others: Sequence[Image.Image], desc: str | None = None
    ) -> np.ndarray:
        """(pictures, others), 0 for the same, at most 2; with a bar named `desc` over the others."""
        mirrored = self.features([ImageOps.mirror(picture) for picture in pictures])
        theirs = self.features(others, desc).T
        return 1 - np.maximum(self.features(pictures) @ theirs, mirrored @ theirs)

    @torch.no_grad()
    def features(self, pictures: Sequence[Image.Image], desc: str | None = None) -> np.ndarray:
        """(pictures, D) of length 1. Each is laid on a square first: processors cut the ends of what is not one."""
        rows, starts = [], range(0, len(pictures), BATCH)
        for start in progress_bar(starts, desc=desc, unit="batch", disable=desc is None, **BAR):
            squares = [_squared(picture) for picture in pictures[start : start + BATCH]]
            rows.append(self._encode(self.processor(images=squares, return_tensors="pt").to(self.model.device)))
        return torch.nn.functional.normalize(torch.cat(rows).float(), dim=-1).cpu().numpy()

    def _encode(self, inputs) -> torch.Tensor:
        # CLIP's whole model reads text too, its picture half by a method of its own
        encode = getattr(self.model, "get_image_features", self.model)
        out = encode(**inputs)
        if isinstance(out, torch.Tensor):
            return out
        pooled = getattr(out, "pooler_output", None)
        return out.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)


def _squared(picture: Image.Image) -> Image.Image:
    side = max(picture.size)
    return ImageOps.pad(picture, (side, side), color=ground_of(picture))

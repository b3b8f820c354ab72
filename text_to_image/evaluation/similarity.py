"""How far pictures are from each other: by structural similarity, or by the features of a vision model."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps

from runtime.devices import choose_device
from runtime.errors import UserError
from runtime.hub import hub_error, refuse_missing_path, waiting_for_hub
from runtime.progress import progress_bar

try:
    from scipy import fft, ndimage
    from skimage.exposure import match_histograms
    from skimage.metrics import structural_similarity
except ImportError:
    raise UserError("structural similarity needs scikit-image and its scipy: `pip install scikit-image`") from None

LONG_SIDE, MIN_SIDE = 64, 24  # px; larger is slower and finds copies no better
MAX_SHIFT = 5  # px of those, in each direction
ZOOMS = (0.91, 0.94, 0.97, 1, 1.03, 1.06, 1.09)
MAX_RATIO_DIFFERENCE = 0.02  # pictures whose aspect ratios differ by less are only cropped
CANDIDATES = 3  # templates whose SSIM is computed: the correlations of neighbouring zooms are nearly the same
SSIM_WINDOW = 7  # px
FULL_WEIGHT_STD = 20  # grey levels of 255; a place whose local deviation is at least this counts in full
FEATURE_BATCH = 16
BAR = {"delay": 5, "leave": False}  # none appears for work of a few seconds


class ImageSimilarity(Protocol):
    """A way to measure distances between pictures."""

    name: str

    def distances(
        self, pictures: Sequence[Image.Image], others: Sequence[Image.Image], desc: str | None = None
    ) -> np.ndarray:
        """(len(pictures), len(others)), 0 for identical pictures; with a progress bar if `desc` names it."""
        ...


def background_colour(picture: Image.Image) -> tuple[int, int, int]:
    """The median colour of the border."""
    pixels = np.asarray(picture)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    red, green, blue = (int(level) for level in np.median(border, axis=0))
    return red, green, blue


def zoomed_on_background(picture: Image.Image, zoom: float) -> Image.Image:
    """The picture scaled about its centre on a canvas of its own size and background colour."""
    width, height = round(picture.width * zoom), round(picture.height * zoom)
    canvas = Image.new("RGB", picture.size, background_colour(picture))
    scaled = picture.resize((width, height), Image.Resampling.LANCZOS)
    canvas.paste(scaled, ((picture.width - width) // 2, (picture.height - height) // 2))
    return canvas


# --- structural similarity ------------------------------------------------------------------------------------------


class StructuralSimilarity:
    """1 - SSIM (Wang et al., 2004) of the greyscale pictures at 64 px, after aligning the other picture.

    Aligning tries mirroring, shifts of up to 8 % and zooms of up to 9 %, and matches the grey levels, so a copy that
    is recoloured or lighter is still a copy. Only places with contrast count, as all plain backgrounds are alike.
    """

    name = f"structural similarity at {LONG_SIDE} px"

    def distances(
        self, pictures: Sequence[Image.Image], others: Sequence[Image.Image], desc: str | None = None
    ) -> np.ndarray:
        """As ImageSimilarity; about 1 for pictures that have nothing in common."""
        sizes, distances = [comparison_size(picture) for picture in pictures], np.empty((len(pictures), len(others)))
        by_size = sorted(range(len(pictures)), key=sizes.__getitem__)  # templates of one size fill much memory
        bar = progress_bar(by_size, desc=desc, unit="picture", disable=desc is None, **BAR)
        for size, group in groupby(bar, key=sizes.__getitem__):
            templates = [_Templates.of(other, size) for other in others]
            for i in group:
                grey = _greyscale(pictures[i].resize(size, Image.Resampling.LANCZOS))
                distances[i] = [
                    1 - max(_weighted_ssim(*overlap) for overlap in template.best_overlaps(grey))
                    for template in templates
                ]
        return distances


def comparison_size(picture: Image.Image) -> tuple[int, int]:
    """(width, height) with a long side of 64 px."""
    factor = LONG_SIDE / max(picture.size)
    return max(MIN_SIDE, round(picture.width * factor)), max(MIN_SIDE, round(picture.height * factor))


@dataclass(frozen=True)
class _Templates:
    """A picture in K variants (cropped or padded, zoomed, mirrored), ready for template matching by FFT."""

    greys: np.ndarray  # (K, h, w)
    conjugate_spectra: np.ndarray  # of the templates less their background, padded by MAX_SHIFT
    norms: np.ndarray  # (K,)

    @classmethod
    def of(cls, picture: Image.Image, size: tuple[int, int]) -> "_Templates":
        greys = np.stack([_greyscale(variant) for variant in _variants(picture, size)])
        foreground = greys - _background_level(greys)
        return cls(greys, np.conj(_padded_fft(foreground)), np.sqrt((foreground**2).sum((-2, -1))))

    def best_overlaps(self, grey: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The parts of `grey` (h, w) and of a template that cover each other, for the templates that correlate best,
        each at its best shift."""
        correlation = fft.irfft2(
            _padded_fft(grey - _background_level(grey)) * self.conjugate_spectra, _padded_shape(grey)
        )
        shifts = np.r_[0 : MAX_SHIFT + 1, -MAX_SHIFT:0]
        allowed = correlation[:, shifts][:, :, shifts].reshape(len(self.greys), -1)
        normalised = allowed / np.maximum(self.norms, 1e-6)[:, None]
        for k in np.argsort(-normalised.max(1))[:CANDIDATES]:
            row, column = np.divmod(normalised[k].argmax(), len(shifts))
            down, right = _subpixel_peak(correlation[k], int(shifts[row]), int(shifts[column]))
            shifted = ndimage.shift(self.greys[k], (down, right), mode="nearest")
            yield _without_margin(grey, down, right), _without_margin(shifted, down, right)


def _variants(picture: Image.Image, size: tuple[int, int]) -> Iterator[Image.Image]:
    """Cropped to the aspect ratio of `size` as training crops it, or padded to it; at each zoom; mirrored and not."""
    fitted = [ImageOps.fit(picture, size, Image.Resampling.LANCZOS)]
    if abs(picture.width * size[1] / (picture.height * size[0]) - 1) > MAX_RATIO_DIFFERENCE:
        fitted.append(ImageOps.pad(picture, size, Image.Resampling.LANCZOS, color=background_colour(picture)))
    for whole in fitted:
        for zoom in ZOOMS:
            variant = zoomed_on_background(whole, zoom)
            yield variant
            yield ImageOps.mirror(variant)


def _greyscale(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("L"), dtype=np.float32)


def _background_level(greys: np.ndarray) -> float:
    """The median grey level of the border."""
    return float(np.median(np.concatenate([greys[..., (0, -1), :].ravel(), greys[..., :, (0, -1)].ravel()])))


def _padded_shape(greys: np.ndarray) -> tuple[int, int]:
    return greys.shape[-2] + MAX_SHIFT, greys.shape[-1] + MAX_SHIFT


def _padded_fft(greys: np.ndarray) -> np.ndarray:
    return fft.rfft2(greys, _padded_shape(greys))


def _subpixel_peak(correlation: np.ndarray, down: int, right: int) -> tuple[float, float]:
    """The shift to a fraction of a pixel. Without it a copy that is half a pixel off would seem twice as far away."""
    rows = [(down + i) % correlation.shape[0] for i in (-1, 0, 1)]
    columns = [(right + i) % correlation.shape[1] for i in (-1, 0, 1)]
    down_fraction = _parabola_vertex(*correlation[rows, columns[1]])
    right_fraction = _parabola_vertex(*correlation[rows[1], columns])
    return down + down_fraction, right + right_fraction


def _parabola_vertex(before: float, peak: float, after: float) -> float:
    """Where, from -0.5 to 0.5, the parabola through a peak and its neighbours is highest."""
    curvature = before - 2 * peak + after
    return float(np.clip((before - after) / (2 * curvature), -0.5, 0.5)) if curvature < 0 else 0.0


def _without_margin(grey: np.ndarray, down: float, right: float) -> np.ndarray:
    """The part of (h, w) that is still covered after a shift by that many pixels."""
    height, width = grey.shape
    top, left = math.ceil(max(down, 0)), math.ceil(max(right, 0))
    return grey[top : math.floor(height + min(down, 0)), left : math.floor(width + min(right, 0))]


def _weighted_ssim(grey: np.ndarray, other: np.ndarray) -> float:
    """SSIM of two (h, w) with equal histograms, averaged over the places with contrast; 1 where there is none."""
    other = match_histograms(other, grey)
    _, ssim_map = structural_similarity(grey, other, data_range=255, win_size=SSIM_WINDOW, full=True)
    weight = np.minimum(np.maximum(_local_std(grey), _local_std(other)), FULL_WEIGHT_STD)
    return float((ssim_map * weight).sum() / weight.sum()) if weight.any() else 1.0


def _local_std(grey: np.ndarray) -> np.ndarray:
    """The local standard deviation in grey levels, (h, w): 0 on plain background."""
    grey = grey.astype(np.float64)
    mean = ndimage.uniform_filter(grey, SSIM_WINDOW)
    variance = ndimage.uniform_filter(grey**2, SSIM_WINDOW) - mean**2
    return np.sqrt(np.where(variance > 0.01, variance, 0))  # less than that is rounding


# --- features of a vision model -------------------------------------------------------------------------------------


class FeatureSimilarity:
    """1 - cosine similarity of a vision model's features (DINOv2, CLIP), of the picture or of its mirror image."""

    def __init__(self, model: str):
        """UserError unless `model` is a folder or hub id of a vision model with safetensors."""
        from transformers import AutoImageProcessor, AutoModel

        self.folder_or_id, self.name = model, f"features of {model}"
        if not Path(model).exists():
            refuse_missing_path(f"--embedder {model}", model)
        try:
            with waiting_for_hub():
                self.processor = AutoImageProcessor.from_pretrained(model)
                self.model = AutoModel.from_pretrained(model, use_safetensors=True)
            self.model = self.model.float().to(choose_device()).eval()
            self.features([Image.new("RGB", (64, 64))])  # so that a model for text alone is refused now
        except Exception as error:  # the hub's and transformers' errors have no common class
            asked = f"--embedder {model}: not a vision model with safetensors that transformers loads"
            raise hub_error(asked, error) from None

    def distances(
        self, pictures: Sequence[Image.Image], others: Sequence[Image.Image], desc: str | None = None
    ) -> np.ndarray:
        """As ImageSimilarity; at most 2."""
        mirrored = self.features([ImageOps.mirror(picture) for picture in pictures])
        others_features = self.features(others, desc).T
        return 1 - np.maximum(self.features(pictures) @ others_features, mirrored @ others_features)

    @torch.no_grad()
    def features(self, pictures: Sequence[Image.Image], desc: str | None = None) -> np.ndarray:
        """Unit vectors (len(pictures), D). Pictures are padded to squares first, because processors crop others."""
        rows, starts = [], range(0, len(pictures), FEATURE_BATCH)
        for start in progress_bar(starts, desc=desc, unit="batch", disable=desc is None, **BAR):
            squares = [_padded_to_square(picture) for picture in pictures[start : start + FEATURE_BATCH]]
            rows.append(self._encode(self.processor(images=squares, return_tensors="pt").to(self.model.device)))
        return _unit_vectors(torch.cat(rows))

    @property
    def reads_text(self) -> bool:
        """Whether the model encodes text as well, as CLIP does."""
        return hasattr(self.model, "get_text_features")

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors (len(texts), D) in the space of the pictures'; long texts are cut. UserError without a
        tokenizer."""
        length = self.model.config.text_config.max_position_embeddings
        options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        tokens = self._tokenizer(list(texts), **options).to(self.model.device)
        return _unit_vectors(_pooled(self.model.get_text_features(**tokens)))

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            with waiting_for_hub():
                return AutoTokenizer.from_pretrained(self.folder_or_id)
        except Exception as error:  # as in __init__
            raise hub_error(f"--embedder {self.folder_or_id}: reads text, and has no tokenizer", error) from None

    def _encode(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """(B, D) from what the processor returns."""
        # CLIP has methods of its own for pictures and text.
        return _pooled(getattr(self.model, "get_image_features", self.model)(**inputs))


def _pooled(output: Any) -> torch.Tensor:
    """(B, D) of what a model of transformers returns."""
    if isinstance(output, torch.Tensor):
        return output
    pooled = getattr(output, "pooler_output", None)
    return output.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)


def _unit_vectors(features: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy()


def _padded_to_square(picture: Image.Image) -> Image.Image:
    side = max(picture.size)
    return ImageOps.pad(picture, (side, side), color=background_colour(picture))

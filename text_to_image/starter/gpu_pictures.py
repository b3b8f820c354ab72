"""Pictures on the GPU: renders as they come and photographs, whole, in crops and as latents."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from pictures import SHARES, SIZES, RenderStream

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the folders of the entry points

from data.images import open_image  # noqa: E402

SQUARE_OFTEN = (0.7, 0.2, 0.1)  # shares of SIZES where photographs, which are square, join whole renders


@dataclass
class DevicePictures:
    """The photographs and the renders so far, uint8 on the device; later the latents of the renders too."""

    stream: RenderStream
    photos: torch.Tensor  # (N, 256, 256, 3) uint8
    device: str
    pictures: dict = field(default_factory=dict)  # (set, size) -> (N, h, w, 3) uint8, of which `ready` are there
    latents: dict = field(default_factory=dict)  # (set, size) -> (N, 2, 4, h, w) fp16, of which `encoded` are there

    def __post_init__(self):
        for key, pictures in self.stream.pictures.items():
            self.pictures[key] = torch.zeros(pictures.shape, dtype=torch.uint8, device=self.device)
        self.ready, self.encoded = dict.fromkeys(self.pictures, 0), dict.fromkeys(self.pictures, 0)

    def update(self) -> None:
        """Copies the pictures that were rendered since."""
        for key, pictures in self.pictures.items():
            start, end = self.ready[key], self.stream.ready(*key)
            if end > start:
                pictures[start:end] = torch.from_numpy(np.array(self.stream.pictures[key][start:end])).to(self.device)
                self.ready[key] = end

    @torch.no_grad()
    def encode(self, vae: AutoencoderKL) -> None:
        """Encodes the pictures that were copied since, and their mirror images."""
        for key, pictures in self.pictures.items():
            n, h, w, _ = pictures.shape
            if key not in self.latents:
                self.latents[key] = torch.zeros((n, 2, 4, h // 4, w // 4), dtype=torch.float16, device=self.device)
            for start in range(self.encoded[key], self.ready[key], 64):
                end = min(start + 64, self.ready[key])
                images = as_images(pictures[start:end])
                both = [vae.encode(i).latent_dist.mean for i in (images, images.flip(-1))]
                self.latents[key][start:end] = torch.stack(both, 1).half()
            self.encoded[key] = self.ready[key]

    def crops(self, batch: int, side: int, rng: np.random.Generator) -> torch.Tensor:
        """Crops (B, 3, side, side) in -1..1, half of photographs, half of renders of one random set and size."""
        renders = self._random_renders(rng)
        parts = [random_crops(pictures, batch // 2, side, rng) for pictures in (self.photos, renders)]
        return torch.cat(parts)

    def white(self, count: int) -> torch.Tensor:
        """The first square renders on white (N, 3, 256, 256)."""
        return as_images(self.pictures["pictures", 0][: min(count, self.ready["pictures", 0])])

    def whole(self, batch: int, rng: np.random.Generator) -> torch.Tensor:
        """Whole renders of one size (B, 3, h, w) in -1..1; beside square ones as many photographs."""
        renders = self._random_renders(rng, SQUARE_OFTEN)
        images = random_crops(renders, batch, None, rng)
        if renders.shape[1] == renders.shape[2]:
            images = torch.cat([images, random_crops(self.photos, batch, None, rng)])
        return images

    def _random_renders(self, rng: np.random.Generator, shares: tuple[float, ...] = SHARES) -> torch.Tensor:
        size = int(rng.choice(len(SIZES), p=shares))
        keys = [key for key in self.pictures if key[1] == size and self.ready[key]]
        key = keys[rng.integers(len(keys))]
        return self.pictures[key][: self.ready[key]]


def as_images(pictures: torch.Tensor) -> torch.Tensor:
    """(B, h, w, 3) uint8 -> (B, 3, h, w) in -1..1."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def random_crops(pictures: torch.Tensor, batch: int, side: int | None, rng: np.random.Generator) -> torch.Tensor:
    """Crops of random pictures, (B, 3, side, side) in -1..1, mirrored or not; whole pictures if `side` is None."""
    n, h, w, _ = pictures.shape
    rows = torch.from_numpy(rng.integers(n, size=batch)).to(pictures.device, non_blocking=True)
    if side is None:
        images = pictures[rows]
    else:
        corners = np.stack([rng.integers(h - side + 1, size=batch), rng.integers(w - side + 1, size=batch)])
        y, x = torch.from_numpy(corners).to(pictures.device, non_blocking=True)[..., None]
        reach = torch.arange(side, device=pictures.device)
        images = pictures[rows[:, None, None], (y + reach)[:, :, None], (x + reach)[:, None, :]]
    images = as_images(images)
    return images.flip(-1) if rng.random() < 0.5 else images


def load_photos(folder: Path) -> np.ndarray:
    """The squares that fetch_photos.py wrote, (N, 256, 256, 3) uint8."""
    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(_pixels, sorted(folder.glob("*.jpg")))))


def _pixels(file: Path) -> np.ndarray:
    return np.asarray(open_image(file))


def square(path: Path, side: int = 256) -> np.ndarray:
    """The middle of a photograph, as large as it can be, at `side` px."""
    photo = open_image(path)
    shortest = min(photo.size)
    x, y = ((s - shortest) // 2 for s in photo.size)
    return np.asarray(photo.resize((side, side), Image.Resampling.LANCZOS, (x, y, x + shortest, y + shortest)))

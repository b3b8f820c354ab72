"""Pictures on the GPU: renders as they come and as latents; photographs, crops, and what a VAE keeps of them."""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from pictures import RenderStream

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the folders of the entry points

from data.images import open_image  # noqa: E402
from runtime.errors import UserError  # noqa: E402

SIDE = 256  # px of a square photograph


@dataclass
class DevicePictures:
    """The renders so far, uint8 on the device, and their latents."""

    stream: RenderStream
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
    """The squares that fetch_photos.py wrote, (N, 256, 256, 3) uint8. UserError where it is something else."""
    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(_square_pixels, photo_files(folder))))


def photo_files(folder: Path) -> list[Path]:
    """The JPEGs in a folder and in those within. UserError where there are none."""
    if files := sorted(folder.rglob("*.jpg")):
        return files
    raise UserError(f"{folder}: no .jpg here; fetch_photos.py fetches photographs")


def _square_pixels(file: Path) -> np.ndarray:
    photo = _open_photo(file)
    if photo.size != (SIDE, SIDE):
        w, h = photo.size
        raise UserError(f"{file}: {w} x {h} px; fetch_photos.py writes squares of {SIDE} x {SIDE} px")
    return np.asarray(photo)


def _open_photo(file: Path) -> Image.Image:
    try:
        return open_image(file)
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None


def square(path: Path, side: int = SIDE) -> np.ndarray:
    """The middle of a photograph, as large as it can be, at `side` px."""
    photo = _open_photo(path)
    shortest = min(photo.size)
    x, y = ((s - shortest) // 2 for s in photo.size)
    return np.asarray(photo.resize((side, side), Image.Resampling.LANCZOS, (x, y, x + shortest, y + shortest)))


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: np.ndarray) -> tuple[list[float], torch.Tensor]:
    """PSNR in dB of a VAE's reconstruction of each picture (N, h, w, 3) uint8, and the latents (N, 4, h/4, w/4)."""
    values, latents = [], []
    for part in torch.from_numpy(pictures).split(8):
        images = as_images(part.to(vae.device))
        latents.append(vae.encode(images).latent_dist.mean)
        decoded = vae.decode(latents[-1]).sample.clamp(-1, 1)
        errors = ((decoded - images) / 2).square().mean((1, 2, 3))
        values += (-10 * errors.log10()).tolist()
    return values, torch.cat(latents)

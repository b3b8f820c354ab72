"""What training reads of VAE and text encoder: encoded once and kept on disk, or live, by the same `encode(draws)`.

A latent is kept as mean and standard deviation, so that every step still draws its own sample of the posterior. Every
file is named by the hash of all that it follows from, so a changed picture, caption or model is never served stale.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch.utils.data import DataLoader

from data.augmentation import Augmentation, apply_augmentation
from data.buckets import ImageToEncode
from data.images import load_pixel_values
from models.text_encoding import encode_prompts, join_embeddings
from runtime.files import atomic_write, hash_key
from runtime.progress import progress_bar
from training.batches import PRIOR
from training.samples import Sample

PIXELS_AT_ONCE = 1 << 19  # of pictures that a GPU encodes together: two of 512 x 512 take 2 GB

Encoded = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


Subjects = Mapping[tuple[str, int], ImageToEncode]  # by stream and number


class Encodings:
    """Gives the tensors of drawn samples; the base's own pictures it is handed, sampled latents without spread."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.prior: Sequence[torch.Tensor] = ()  # (C, h, w) each

    def file(self, kind: str, key: str) -> Path:
        return self.folder / kind / f"{key}.safetensors"

    def text(self, caption: str) -> torch.Tensor:
        """(L, D)"""
        raise NotImplementedError

    def posterior(self, draw: Sample) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation (C, h, w) of a picture's scaled latents."""
        raise NotImplementedError

    def latent(self, draw: Sample) -> torch.Tensor:
        """(C, h, w)"""
        if draw.stream == PRIOR:
            return self.prior[draw.picture]
        mean, std = self.posterior(draw)
        return mean + std * draw.posterior_noise

    def encode(self, draws: Sequence[Sample]) -> Encoded:
        """latents (B, C, h, w), encoder_hidden_states (B, L, D) and its mask (B, L) or None."""
        latents = torch.stack([self.latent(draw) for draw in draws])
        return latents, *join_embeddings([self.text(draw.caption) for draw in draws])


class CachedEncodings(Encodings):
    """In a folder; what a step needs is read when it needs it, so a large data set takes no memory."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.texts: dict[str, tuple[Path, str]] = {}  # caption -> its file, its name in there
        self.posteriors: dict[tuple[str, int, Augmentation], tuple[Path, str]] = {}

    def text(self, caption: str) -> torch.Tensor:
        return _read(*self.texts[caption])

    def posterior(self, draw: Sample) -> tuple[torch.Tensor, torch.Tensor]:
        return _read(*self.posteriors[draw.stream, draw.picture, draw.augmentation]).unbind()


class LiveEncodings(Encodings):
    """At every step: only the base's own pictures are stored, and VAE and text encoder stay in memory."""

    def __init__(self, folder: Path, subjects: Subjects, vae, text: "TextEncoding"):
        super().__init__(folder)
        self.images_to_encode, self.vae, self.text_encoding = subjects, vae, text

    def text(self, caption: str) -> torch.Tensor:
        return self.text_encoding.encode([caption])[0]

    def posterior(self, draw: Sample) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = apply_augmentation(load_pixels(self.images_to_encode[draw.stream, draw.picture]), draw.augmentation)
        return encode_pixels(self.vae, pixels[None])[0]


@dataclass(frozen=True)
class TextEncoding:
    """Tokenizer and text encoder, and how many chunks of a caption they read; `fingerprint` is the models' hash."""

    tokenizer: object
    text_encoder: object
    max_chunks: int
    fingerprint: str

    def encode(self, captions: Sequence[str]) -> list[torch.Tensor]:
        """(L, D) of each, read together."""
        encoded = encode_prompts(self.tokenizer, self.text_encoder, captions, self.max_chunks)
        return [hidden_states.float().cpu() for hidden_states in encoded]

    def key(self, captions: Sequence[str]) -> str:
        """Of a file of these captions."""
        return hash_key("text", self.fingerprint, str(self.text_encoder.dtype), self.max_chunks, *captions)


# --- Encoding the data set ------------------------------------------------------------------------------------------


def store_latents(
    encodings: CachedEncodings, subjects: Subjects, vae, vae_hash: str, share: slice, workers: int, quiet: bool
) -> None:
    """Encodes those of this process's `share` of the pictures that the folder lacks, and notes where all will lie."""
    files = {key: encodings.file("latents", latent_key(s, vae_hash, vae.dtype)) for key, s in subjects.items()}
    missing = [key for key in list(subjects)[share] if not is_intact(files[key])]
    with progress_bar(
        total=len(missing), desc="encoding pictures", unit="picture", disable=quiet or not missing, leave=False
    ) as bar:
        # One by one on a CPU: it is no slower, and what comes out does not depend on which others were missing.
        at_once = 1 if vae.device.type == "cpu" else PIXELS_AT_ONCE
        for keys, pictures in _load_ahead(subjects, missing, workers, at_once):
            views = subjects[keys[0]].augmentations
            seen = [apply_augmentation(picture, view) for picture in pictures for view in views]
            together = max(1, at_once // pictures[0, 0].numel())
            parts = (torch.stack(seen[at : at + together]) for at in range(0, len(seen), together))
            posteriors = iter([posterior for part in parts for posterior in encode_pixels(vae, part)])
            for key in keys:
                save_with_checksum(
                    files[key], {str(view): torch.stack(next(posteriors)) for view in range(len(views))}
                )
            bar.update(len(keys))
    for key, subject in subjects.items():
        encodings.posteriors.update(
            {(*key, view): (files[key], str(i)) for i, view in enumerate(subject.augmentations)}
        )


def store_texts(
    encodings: CachedEncodings, groups: Iterable[Sequence[str]], text: TextEncoding, share: slice, quiet: bool
) -> None:
    """A file for the captions of each group: all forms of a picture's captions, or one prompt."""
    files = {group: encodings.file("text", text.key(group)) for group in dict.fromkeys(map(tuple, groups))}
    missing = [group for group in list(files)[share] if not is_intact(files[group])]
    for group in progress_bar(
        missing, desc="encoding captions", unit="picture", disable=quiet or not missing, leave=False
    ):
        save_with_checksum(files[group], {str(i): hidden_states for i, hidden_states in enumerate(text.encode(group))})
    for group, path in files.items():
        encodings.texts.update({caption: (path, str(i)) for i, caption in enumerate(group)})


def _load_ahead(
    subjects: Subjects, wanted: Sequence[tuple[str, int]], workers: int, pixels_at_once: int
) -> Iterator[tuple[list[tuple[str, int]], torch.Tensor]]:
    """Batches of pictures of one size and the same views, (B, 3, H, W), read by `workers` processes ahead."""
    alike: dict[tuple, list[tuple[str, int]]] = {}
    for key in wanted:
        alike.setdefault((subjects[key].size, subjects[key].augmentations), []).append(key)
    batches = []
    for (size, views), keys in alike.items():
        at_once = max(1, pixels_at_once // (size[0] * size[1] * len(views)))
        batches += [keys[at : at + at_once] for at in range(0, len(keys), at_once)]
    pixels = DataLoader(_Pixels(subjects, batches), batch_size=None, num_workers=workers)
    return zip(batches, pixels, strict=True)


@dataclass(frozen=True)
class _Pixels:
    """Batches of pixel values by their number, as a DataLoader asks for them."""

    images_to_encode: Subjects
    batches: Sequence[Sequence[tuple[str, int]]]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.stack([load_pixels(self.images_to_encode[key]) for key in self.batches[number]])


def load_pixels(subject: ImageToEncode) -> torch.Tensor:
    """(3, H, W) in [-1, 1], as it is"""
    return load_pixel_values(subject.picture.path, *subject.size, subject.interpolation)


@torch.no_grad()
def encode_pixels(vae, pixel_values: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(B, 3, H, W) in [-1, 1] → mean and standard deviation (C, h, w) of each one's latents, scaled for the UNet."""
    posterior = vae.encode(pixel_values.to(vae.device, vae.dtype)).latent_dist
    scale = vae.config.scaling_factor
    mean, std = ((values * scale).float().cpu() for values in (posterior.mean, posterior.std))
    return list(zip(mean, std, strict=True))


# --- Files ----------------------------------------------------------------------------------------------------------


def latent_key(subject: ImageToEncode, vae_hash: str, dtype: torch.dtype) -> str:
    content = hashlib.sha256(subject.picture.path.read_bytes()).hexdigest()
    shown = (*subject.size, repr(subject.augmentations), subject.interpolation)
    return hash_key("latents", vae_hash, str(dtype), content, *shown)


def save_with_checksum(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Written beside and renamed; a checksum in the file's head."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with atomic_write(path, durable=False) as beside:  # its checksum tells
        save_file(tensors, beside, {"checksum": _checksum(tensors)})


def is_intact(path: Path) -> bool:
    """Whether the file is there and undamaged."""
    try:
        content = path.read_bytes()
        with safe_open(path, "pt") as file:
            return _checksum(load(content)) == (file.metadata() or {}).get("checksum")
    except (OSError, SafetensorError):
        return False


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)

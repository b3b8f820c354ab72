"""Latents and text embeddings that training reads instead of the VAE and the text encoder, encoded once.

A latent is kept as mean and standard deviation, so that every step still draws its own sample of the posterior.
"""

from collections.abc import Iterable, Sequence

import torch

from batches import DATA, PRIOR
from data import Picture, load_picture
from draws import Draw
from prompts import encode_prompt, join_embeddings
from reporting import progress


class StoredEncodings:
    """Encodings in memory. `encode(draws)` is the interface that encoding live would share."""

    def __init__(self, text: dict[str, torch.Tensor]):
        self.text = text
        self.posteriors: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def add(self, stream: str, mean: Sequence[torch.Tensor], std: Sequence[torch.Tensor]) -> None:
        """The pictures of a stream, from its first: mean and standard deviation (C, h, w) of their scaled latents."""
        for index, posterior in enumerate(zip(mean, std, strict=True)):
            self.posteriors[stream, index] = posterior

    def encode(self, draws: Sequence[Draw]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """latents (B, C, h, w), encoder_hidden_states (B, L, D) and its mask (B, L) or None."""
        latents = []
        for draw in draws:
            mean, std = self.posteriors[draw.stream, draw.picture]
            latents.append(mean + std * draw.posterior_noise)
        return torch.stack(latents), *join_embeddings([self.text[draw.caption] for draw in draws])


def store_encodings(
    pictures: Sequence[Picture], height: int, width: int, vae, text: dict[str, torch.Tensor], quiet: bool
) -> StoredEncodings:
    """Encodes the data set's pictures at their training size; `text` holds the embedding of every caption."""
    encodings = StoredEncodings(text)
    bar = progress(pictures, desc="encoding pictures", unit="picture", disable=quiet, leave=False)
    posteriors = [encode_picture(vae, load_picture(picture.path, height, width)) for picture in bar]
    encodings.add(DATA, *zip(*posteriors, strict=True))
    return encodings


def add_prior(encodings: StoredEncodings, latents: Sequence[torch.Tensor]) -> None:
    """The base's own pictures: sampled latents, not a posterior, so they have no spread."""
    encodings.add(PRIOR, latents, [torch.zeros_like(latent) for latent in latents])


@torch.no_grad()
def encode_picture(vae, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(3, H, W) in [-1, 1] → mean and standard deviation (C, h, w) of its latents, scaled as the UNet sees them."""
    posterior = vae.encode(pixel_values[None].to(vae.device, vae.dtype)).latent_dist
    scale = vae.config.scaling_factor
    return (posterior.mean[0] * scale).float().cpu(), (posterior.std[0] * scale).float().cpu()


def encode_texts(
    tokenizer, text_encoder, texts: Iterable[str], max_chunks: int, quiet: bool
) -> dict[str, torch.Tensor]:
    """The embedding (L, D) of each text, and of the empty one that stands for a dropped caption."""
    bar = progress(dict.fromkeys(["", *texts]), desc="encoding captions", unit="caption", disable=quiet, leave=False)
    return {text: encode_prompt(tokenizer, text_encoder, text, max_chunks).float().cpu() for text in bar}

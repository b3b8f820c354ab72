"""What chance decides about a sample, as a pure function of (seed, stream, number).

A run that is stopped and resumed, or spread over more processes, therefore trains on the same samples. All is drawn on
the CPU, whose generator gives the same numbers on every machine.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class SampleId:
    """One sample of a run. The samples of a stream are numbered from 0 through the whole run, across epochs."""

    stream: str
    number: int


@dataclass(frozen=True)
class Source:
    """A stream's pictures as far as chance is concerned: groups of captions for each, the shape of a latent."""

    forms: Sequence[Sequence[Sequence[str]]]
    latent_shape: tuple[int, int, int]


@dataclass(frozen=True)
class Draw:
    """A sample with everything decided; `posterior_noise` and `noise` are (C, h, w)."""

    stream: str
    picture: int
    caption: str
    timestep: int
    posterior_noise: torch.Tensor
    noise: torch.Tensor


def generator(seed: int, *key: str | int) -> torch.Generator:
    """A CPU generator for this key; hashed, since with `seed + n` seed 1's sample 2 would be seed 2's sample 1."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def draw_sample(seed: int, sample: SampleId, source: Source, caption_dropout: float, timesteps: int) -> Draw:
    """`caption_dropout` is the probability of an empty caption (classifier-free guidance, arXiv:2207.12598)."""
    chance = generator(seed, sample.stream, sample.number)
    picture = picture_of(seed, sample, len(source.forms))
    caption = draw_caption(source.forms[picture], chance)
    dropped = torch.rand((), generator=chance).item() < caption_dropout
    return Draw(
        stream=sample.stream,
        picture=picture,
        caption="" if dropped else caption,
        timestep=torch.randint(timesteps, (), generator=chance).item(),
        posterior_noise=torch.randn(source.latent_shape, generator=chance),
        noise=torch.randn(source.latent_shape, generator=chance),
    )


def draw_caption(groups: Sequence[Sequence[str]], chance: torch.Generator) -> str:
    """Every group of forms equally often, then every form of the group."""
    group = groups[torch.randint(len(groups), (), generator=chance).item()]
    return group[torch.randint(len(group), (), generator=chance).item()]


def picture_of(seed: int, sample: SampleId, pictures: int) -> int:
    """Which picture a sample shows: every pass goes over all of them once, each time in another order."""
    return _order(seed, sample.stream, sample.number // pictures, pictures)[sample.number % pictures]


@lru_cache(maxsize=8)
def _order(seed: int, stream: str, number: int, pictures: int) -> list[int]:
    return torch.randperm(pictures, generator=generator(seed, stream, "pass", number)).tolist()

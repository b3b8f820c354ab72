"""What chance decides about a sample, as a pure function of (seed, stream, number).

A run that is stopped and resumed, or spread over more processes, therefore trains on the same samples. All is drawn on
the CPU, whose generator gives the same numbers on every machine.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from data.augmentation import Augmentation, augmented_caption


@dataclass(frozen=True)
class SampleKey:
    """One sample of a run. The samples of a stream are numbered from 0 through the whole run, across epochs."""

    stream: str
    number: int


@dataclass(frozen=True, eq=False)
class SampleSource:
    """A stream's pictures as far as chance is concerned, an entry of each for each picture."""

    caption_groups: Sequence[Sequence[Sequence[str]]]  # groups of captions
    latent_shapes: tuple[tuple[int, int, int], ...]
    augmentations: Sequence[Sequence[Augmentation]]
    run: int = 1  # pictures of one shape follow each other in runs of this length: batches that need no second pass


@dataclass(frozen=True)
class SampleSettings:
    """What the run leaves to chance, and how far."""

    caption_dropout: float  # the probability of an empty caption (classifier-free guidance, arXiv:2207.12598)
    timesteps: int
    noise_offset: float = 0.0  # https://www.crosslabs.org/blog/diffusion-with-offset-noise
    input_perturbation: float = 0.0  # arXiv:2301.11706


@dataclass(frozen=True)
class Sample:
    """A sample with everything decided; the noises are (C, h, w)."""

    stream: str
    picture: int
    augmentation: Augmentation
    caption: str
    timestep: int
    posterior_noise: torch.Tensor
    noise: torch.Tensor  # what the UNet is to find
    input_noise: torch.Tensor  # what it is shown: the same, unless perturbed


def generator(seed: int, *key: str | int) -> torch.Generator:
    """A CPU generator for this key; hashed, since with `seed + n` seed 1's sample 2 would be seed 2's sample 1."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def make_sample(seed: int, sample: SampleKey, source: SampleSource, chances: SampleSettings) -> Sample:
    chance = generator(seed, sample.stream, sample.number)
    picture = picture_index(seed, sample, source)
    shape = source.latent_shapes[picture]
    caption = draw_caption(source.caption_groups[picture], chance)
    dropped = torch.rand((), generator=chance).item() < chances.caption_dropout
    timestep = torch.randint(chances.timesteps, (), generator=chance).item()
    posterior_noise, noise = (torch.randn(shape, generator=chance) for _ in range(2))
    noise += chances.noise_offset * torch.randn((shape[0], 1, 1), generator=chance)
    perturbation = torch.randn(shape, generator=chance) if chances.input_perturbation else 0.0
    views = source.augmentations[picture]
    view = views[torch.randint(len(views), (), generator=chance).item()]
    return Sample(
        stream=sample.stream,
        picture=picture,
        augmentation=view,
        caption="" if dropped else augmented_caption(caption, view),
        timestep=timestep,
        posterior_noise=posterior_noise,
        noise=noise,
        input_noise=noise + chances.input_perturbation * perturbation,
    )


def draw_caption(groups: Sequence[Sequence[str]], chance: torch.Generator) -> str:
    """Every group of forms equally often, then every form of the group."""
    group = groups[torch.randint(len(groups), (), generator=chance).item()]
    return group[torch.randint(len(group), (), generator=chance).item()]


def picture_index(seed: int, sample: SampleKey, source: SampleSource) -> int:
    """Which picture a sample shows: every pass goes over all of them once, each time in another order."""
    number, place = divmod(sample.number, len(source.latent_shapes))
    return _order(seed, sample.stream, number, source)[place]


@lru_cache(maxsize=8)
def _order(seed: int, stream: str, number: int, source: SampleSource) -> list[int]:
    """Shuffled, then dealt into runs of one shape; the shorter runs, what is left of each shape, come last."""
    chance = generator(seed, stream, "pass", number)
    alike: dict[tuple[int, int, int], list[int]] = {}
    for picture in torch.randperm(len(source.latent_shapes), generator=chance).tolist():
        alike.setdefault(source.latent_shapes[picture], []).append(picture)
    run = source.run
    runs = [pictures[at : at + run] for pictures in alike.values() for at in range(0, len(pictures), run)]
    shuffled = [runs[i] for i in torch.randperm(len(runs), generator=chance).tolist()]
    return [picture for pictures in sorted(shuffled, key=len, reverse=True) for picture in pictures]

"""Which samples make up which step, and each one's random draws: a pure function of (seed, stream, number).

A run that is stopped and resumed, or spread over more processes, therefore trains on the same samples. Random numbers
come from the CPU, whose generator gives the same ones on every machine.
"""

import math
import threading
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple, Protocol

import torch

from data.augmentation import Augmentation, augmented_caption
from data.random_numbers import keyed_generator
from models.conditions import Conditions, TimeIds
from runtime.devices import set_thread_device, to_device

# The streams: the data set's pictures, those that the base generated, and those that are never trained on. Their names
# are part of the random generators' keys.
DATA, PRIOR, HELD_OUT = "data", "prior", "held out"
ORDERS_KEPT = 8
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2  # its multiples, modulo 1, fill [0, 1) as evenly as any
MARKS = 1 << 20  # a power of 2, so that what is added to them stays exact

LatentShape = tuple[int, int, int]  # (C, h, w)


class Encoded(NamedTuple):
    """What the UNet's inputs are made of."""

    latents: torch.Tensor  # (B, C, h, w)
    conditions: Conditions
    loss_weights: torch.Tensor | None = None  # (B, 1, h, w), 1 on average; None: every latent pixel counts the same


@dataclass(frozen=True)
class SampleKey:
    """One sample of a run. The samples of a stream are numbered from 0 through the whole run, across epochs."""

    stream: str
    number: int


@dataclass(frozen=True, eq=False)
class SampleSource:
    """A stream's pictures: parallel lists, indexed by picture."""

    caption_groups: Sequence[Sequence[Sequence[str]]]
    latent_shapes: tuple[LatentShape, ...]
    augmentations: Sequence[Sequence[Augmentation]]
    time_ids: Sequence[TimeIds]
    group_length: int = 1  # that many pictures of one shape follow each other, so that a batch needs one pass
    repeats: Sequence[float] = ()  # how often each picture is used in an epoch; empty: once
    whole_groups: Sequence[Collection[int]] = ()  # of each picture's groups those of whole captions; empty: not known
    _orders: dict[tuple[int, str, int], tuple[int, ...]] = field(default_factory=dict, repr=False)

    @cached_property
    def epoch_length(self) -> int:
        """Samples of an epoch."""
        return epoch_length(self.repeats or [1.0] * len(self.latent_shapes))

    def epoch_order(self, seed: int, stream: str, epoch: int) -> tuple[int, ...]:
        """Which picture comes when in an epoch; the last few orders are kept."""
        key = (seed, stream, epoch)
        order = self._orders.get(key)
        if order is None:  # two threads at most work it out twice
            if len(self._orders) >= ORDERS_KEPT:
                self._orders.clear()
            order = self._orders[key] = shuffle_epoch(seed, stream, epoch, self)
        return order


@dataclass(frozen=True)
class SampleSettings:
    """Settings of the random draws."""

    caption_dropout: float  # the probability of an empty caption (classifier-free guidance, arXiv:2207.12598)
    timesteps: int
    noise_offset: float = 0.0  # https://www.crosslabs.org/blog/diffusion-with-offset-noise
    input_perturbation: float = 0.0  # arXiv:2301.11706
    short_captions: float | None = None  # the share of shorter variants; None: all groups are chosen equally often
    timestep_bias: float = 1.0  # the noisier half of the timesteps is drawn this many times as often


@dataclass(frozen=True)
class Sample:
    """A sample after all random draws; the noises are (C, h, w)."""

    stream: str
    picture: int
    augmentation: Augmentation
    caption: str
    timestep: int
    posterior_noise: torch.Tensor
    noise: torch.Tensor  # the target (epsilon)
    input_noise: torch.Tensor  # what is added to the latents: the same, unless perturbed
    time_ids: TimeIds  # an augmentation moves the crop as it is, and changes nothing of it


def make_sample(seed: int, key: SampleKey, source: SampleSource, settings: SampleSettings) -> Sample:
    """Never reorder these draws: it would change existing runs. New randomness takes a generator of its own."""
    generator = keyed_generator(seed, key.stream, key.number)
    picture = picture_index(seed, key, source)
    shape = source.latent_shapes[picture]
    caption = choose_caption(offered_groups(seed, key, source, settings.short_captions), generator)
    dropped = torch.rand((), generator=generator).item() < settings.caption_dropout
    timestep = biased_timestep(seed, key, int(torch.randint(settings.timesteps, (), generator=generator)), settings)
    posterior_noise, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    noise += settings.noise_offset * torch.randn((shape[0], 1, 1), generator=generator)
    perturbation = torch.randn(shape, generator=generator) if settings.input_perturbation else 0.0
    augmentations = source.augmentations[picture]
    augmentation = augmentations[int(torch.randint(len(augmentations), (), generator=generator))]
    return Sample(
        stream=key.stream,
        picture=picture,
        augmentation=augmentation,
        caption="" if dropped else augmented_caption(caption, augmentation),
        timestep=timestep,
        posterior_noise=posterior_noise,
        noise=noise,
        input_noise=noise + settings.input_perturbation * perturbation,
        time_ids=source.time_ids[picture],
    )


def biased_timestep(seed: int, key: SampleKey, timestep: int, settings: SampleSettings) -> int:
    """The given, evenly drawn timestep, or in a share of the samples one moved into the half that is favoured."""
    # (1 + share) / 2 of all samples are then in the noisier half, (1 - share) / 2 in the other: as bias to 1.
    share = (settings.timestep_bias - 1) / (settings.timestep_bias + 1)
    if share == 0:
        return timestep
    generator = keyed_generator(seed, key.stream, key.number, "timestep bias")
    if torch.rand((), generator=generator).item() >= abs(share):
        return timestep
    return (settings.timesteps + timestep) // 2 if share > 0 else timestep // 2


def offered_groups(
    seed: int, key: SampleKey, source: SampleSource, short_captions: float | None
) -> Sequence[Sequence[str]]:
    """The groups of captions that a sample chooses from: whole captions or, in the share `short_captions` of samples,
    their shorter variants. A caption without any stays whole."""
    picture = picture_index(seed, key, source)
    groups = source.caption_groups[picture]
    if short_captions is None or not source.whole_groups:
        return groups
    generator = keyed_generator(seed, key.stream, key.number, "short captions")
    is_short = torch.rand((), generator=generator).item() < short_captions
    whole = source.whole_groups[picture]
    return [group for number, group in enumerate(groups) if (number not in whole) == is_short] or groups


def choose_caption(groups: Sequence[Sequence[str]], generator: torch.Generator) -> str:
    """Every group equally often, then every caption of the group."""
    group = groups[int(torch.randint(len(groups), (), generator=generator))]
    return group[int(torch.randint(len(group), (), generator=generator))]


def picture_index(seed: int, key: SampleKey, source: SampleSource) -> int:
    """Which picture a sample shows: every epoch goes over all of them, each time in another order."""
    epoch, position = divmod(key.number, source.epoch_length)
    return source.epoch_order(seed, key.stream, epoch)[position]


def shuffle_epoch(seed: int, stream: str, epoch: int, source: SampleSource) -> tuple[int, ...]:
    """Shuffled, then grouped into runs of one shape; the shorter runs, what is left of each shape, come last."""
    generator = keyed_generator(seed, stream, "pass", epoch)
    used = epoch_pictures(seed, stream, epoch, source)
    by_shape: dict[LatentShape, list[int]] = {}
    for position in torch.randperm(len(used), generator=generator).tolist():
        by_shape.setdefault(source.latent_shapes[used[position]], []).append(used[position])
    length = source.group_length
    runs = [pictures[at : at + length] for pictures in by_shape.values() for at in range(0, len(pictures), length)]
    shuffled = [runs[i] for i in torch.randperm(len(runs), generator=generator).tolist()]
    return tuple(picture for pictures in sorted(shuffled, key=len, reverse=True) for picture in pictures)


def epoch_length(repeats: Sequence[float]) -> int:
    """Samples of an epoch that uses each picture `repeats` times: the rounded sum, at least 1."""
    return max(1, math.floor(sum(repeats) + 0.5))


def epoch_pictures(seed: int, stream: str, epoch: int, source: SampleSource) -> list[int]:
    """The pictures of an epoch, in the data set's order; one whose `repeats` is 0.5 is in half of the epochs.

    Systematic sampling: the pictures lie side by side on a line, each as long as its repeats, and marks at distance 1
    choose from it. From epoch to epoch the marks move on by the golden ratio, so that over many epochs every picture
    has its share, more exactly than chance would give it.
    """
    if not source.repeats:
        return list(range(len(source.latent_shapes)))
    start = torch.rand((), generator=keyed_generator(seed, stream, "repeats"), dtype=torch.float64).item()
    mark = math.floor((start + epoch * GOLDEN_RATIO) % 1 * MARKS) / MARKS
    stretch = source.epoch_length / sum(source.repeats)
    ends = [0.0, *accumulate(repeats * stretch for repeats in source.repeats)]
    ends[-1] = source.epoch_length  # exactly, not but for rounding
    counts = (math.ceil(end - mark) - math.ceil(begin - mark) for begin, end in pairwise(ends))
    return [picture for picture, count in enumerate(counts) for _ in range(count)]


# --- Batches --------------------------------------------------------------------------------------------------------


class Encoder(Protocol):
    """What batches need of `training.encoding.Encodings`, which itself imports this module."""

    def encode(self, samples: Sequence[Sample]) -> Encoded:
        """The tensors of samples of one shape."""


@dataclass(frozen=True)
class Batch:
    """What `objective.diffusion_loss` reads: latents and noises (B, C, h, w), timesteps (B,), conditions."""

    latents: torch.Tensor
    noise: torch.Tensor
    input_noise: torch.Tensor
    timesteps: torch.Tensor
    conditions: Conditions
    loss_weights: torch.Tensor | None = None  # (B, 1, h, w); None: all 1


def make_batch(encodings: Encoder, samples: Sequence[Sample], device: torch.device, dtype: torch.dtype) -> Batch:
    """The tensors of samples of one shape; `dtype` is the UNet's, for what it reads as it is."""
    encoded = encodings.encode(samples)
    weights = encoded.loss_weights
    return Batch(
        latents=to_device(encoded.latents, device),
        noise=to_device(torch.stack([sample.noise for sample in samples]), device),
        input_noise=to_device(torch.stack([sample.input_noise for sample in samples]), device),
        timesteps=to_device(torch.tensor([sample.timestep for sample in samples]), device),
        conditions=encoded.conditions.to(device, dtype),
        loss_weights=None if weights is None else to_device(weights, device),
    )


@dataclass(frozen=True)
class StepBatches:
    """A process's batches of every step, the same whenever they are asked for."""

    encodings: Encoder
    sources: dict[str, SampleSource]
    settings: SampleSettings
    seed: int
    data_batch: int  # samples of a step over all processes and accumulation parts
    prior_batch: int
    process: int
    processes: int
    accumulation: int
    device: torch.device
    dtype: torch.dtype

    def for_step(self, step: int) -> Iterator[tuple[Batch, bool]]:
        """What this process trains on in step `step` (from 0), and with each batch whether it is the last.

        At least `accumulation` batches, more where a step holds pictures of several sizes.
        """
        keys = sorted(step_samples(step, self.data_batch, self.prior_batch), key=self._shape)
        parts = micro_batches(keys, self.process, self.processes, self.accumulation)
        groups = [list(group) for part in parts for _, group in groupby(part, key=self._shape)]
        for group in groups:
            samples = [make_sample(self.seed, key, self.sources[key.stream], self.settings) for key in group]
            yield make_batch(self.encodings, samples, self.device, self.dtype), group is groups[-1]

    def pictures_of(self, step: int) -> list[int]:
        """The data set's pictures in step `step` (from 0), over all processes."""
        keys = (SampleKey(DATA, step * self.data_batch + i) for i in range(self.data_batch))
        return [picture_index(self.seed, key, self.sources[DATA]) for key in keys]

    def _shape(self, key: SampleKey) -> LatentShape:
        source = self.sources[key.stream]
        return source.latent_shapes[picture_index(self.seed, key, source)]


class Batches:
    """The same batches, all of a step made before it begins: what cannot be read is known between two steps.

    `ahead`: those of the next step are made by a thread while this one computes, so that the GPU does not wait for
    files, which may lie on a network disk, nor for random numbers. `steps` is where the run ends.
    """

    def __init__(self, batches: StepBatches, steps: int, ahead: bool):
        self._batches, self._steps, self._ahead = batches, steps, ahead
        self._made: dict[int, Future[list[tuple[Batch, bool]]]] = {}  # by the step

    def for_step(self, step: int) -> Iterator[tuple[Batch, bool]]:
        """As `StepBatches.for_step`."""
        made = self._made.pop(step, None) or self._begin(step)
        self._made = {step + 1: self._begin(step + 1)} if self._ahead and step + 1 < self._steps else {}
        yield from made.result()

    def error_of(self, step: int) -> Exception | None:
        """Why the batches of step `step` could not be made; waits until they are."""
        if step >= self._steps:
            return None
        made = self._made[step] = self._made.get(step) or self._begin(step)
        error = made.exception()
        if error is None or isinstance(error, Exception):
            return error
        raise error  # a second Ctrl-C

    def pictures_of(self, step: int) -> list[int]:
        """As `StepBatches.pictures_of`."""
        return self._batches.pictures_of(step)

    def _begin(self, step: int) -> Future[list[tuple[Batch, bool]]]:
        """`ahead` in a thread that the program does not wait for when it ends: a file may hang."""
        future: Future[list[tuple[Batch, bool]]] = Future()

        def make() -> None:
            try:
                set_thread_device(self._batches.device)  # or memory would be pinned through the first GPU
                future.set_result(list(self._batches.for_step(step)))
            except BaseException as error:
                future.set_exception(error)

        if self._ahead:
            threading.Thread(target=make, name=f"batches of step {step}", daemon=True).start()
        else:
            make()
        return future


def step_samples(step: int, data_batch: int, prior_batch: int) -> list[SampleKey]:
    """The samples of step `step` (from 0). Batches continue into the next epoch: none is short."""
    data = [SampleKey(DATA, step * data_batch + i) for i in range(data_batch)]
    prior = [SampleKey(PRIOR, step * prior_batch + i) for i in range(prior_batch)]
    return data + prior


def micro_batches(
    keys: Sequence[SampleKey], process: int, processes: int, accumulation: int
) -> list[Sequence[SampleKey]]:
    """A process's share of a step in `accumulation` parts, none empty: contiguous slices."""
    parts = processes * accumulation
    assert len(keys) >= parts
    bounds = [len(keys) * part // parts for part in range(parts + 1)]
    first = process * accumulation
    return [keys[bounds[part] : bounds[part + 1]] for part in range(first, first + accumulation)]

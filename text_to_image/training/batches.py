"""Which samples make up which step, and their tensors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from runtime.devices import to_device
from training.samples import Sample, SampleKey, SampleSettings, SampleSource, make_sample, picture_index

# The streams: the data set's pictures, those the base has drawn, and those that are never trained on.
DATA, PRIOR, HELD_OUT = "data", "prior", "held out"


@dataclass(frozen=True)
class Batch:
    """The arguments of `objective.diffusion_loss`: latents and noises (B, C, h, w), timesteps (B,), text (B, L, D)."""

    latents: torch.Tensor
    noise: torch.Tensor
    input_noise: torch.Tensor
    timesteps: torch.Tensor
    encoder_hidden_states: torch.Tensor
    encoder_attention_mask: torch.Tensor | None


def make_batch(encodings, draws: Sequence[Sample], device: torch.device, dtype: torch.dtype) -> Batch:
    """The tensors of draws of one shape; `dtype` is the UNet's, for what it reads as it is."""
    latents, hidden_states, mask = encodings.encode(draws)
    return Batch(
        latents=to_device(latents, device),
        noise=to_device(torch.stack([draw.noise for draw in draws]), device),
        input_noise=to_device(torch.stack([draw.input_noise for draw in draws]), device),
        timesteps=to_device(torch.tensor([draw.timestep for draw in draws]), device),
        encoder_hidden_states=to_device(hidden_states, device, dtype),
        encoder_attention_mask=None if mask is None else to_device(mask, device, dtype),
    )


@dataclass(frozen=True)
class Batches:
    """A process's batches of every step, the same whenever they are asked for."""

    encodings: object  # has encode(draws) -> (latents, encoder_hidden_states, encoder_attention_mask)
    sources: dict[str, SampleSource]
    chances: SampleSettings
    seed: int
    data_batch: int  # samples of a step over all processes and accumulation parts
    prior_batch: int
    process: int
    processes: int
    accumulation: int
    device: torch.device
    dtype: torch.dtype

    def of_step(self, step: int) -> Iterator[tuple[Batch, bool]]:
        """What this process trains on in step `step` (from 0), and with each batch whether it is the last.

        At least `accumulation` batches, more where a step holds pictures of several sizes.
        """
        samples = sorted(step_samples(step, self.data_batch, self.prior_batch), key=self._shape)
        parts = micro_batches(samples, self.process, self.processes, self.accumulation)
        alike = [list(group) for part in parts for _, group in groupby(part, key=self._shape)]
        for group in alike:
            draws = [make_sample(self.seed, sample, self.sources[sample.stream], self.chances) for sample in group]
            yield make_batch(self.encodings, draws, self.device, self.dtype), group is alike[-1]

    def pictures_of(self, step: int) -> list[int]:
        """The data set's pictures in step `step` (from 0), over all processes."""
        samples = (SampleKey(DATA, step * self.data_batch + i) for i in range(self.data_batch))
        return [picture_index(self.seed, sample, self.sources[DATA]) for sample in samples]

    def _shape(self, sample: SampleKey) -> tuple[int, int, int]:
        source = self.sources[sample.stream]
        return source.latent_shapes[picture_index(self.seed, sample, source)]


def step_samples(step: int, data_batch: int, prior_batch: int) -> list[SampleKey]:
    """The samples of step `step` (from 0). Batches flow over the border between epochs: none is short."""
    data = [SampleKey(DATA, step * data_batch + i) for i in range(data_batch)]
    prior = [SampleKey(PRIOR, step * prior_batch + i) for i in range(prior_batch)]
    return data + prior


def micro_batches(
    samples: Sequence[SampleKey], process: int, processes: int, accumulation: int
) -> list[Sequence[SampleKey]]:
    """A process's share of a step in `accumulation` parts, none empty: neighbours stay together."""
    parts = processes * accumulation
    assert len(samples) >= parts
    bounds = [len(samples) * part // parts for part in range(parts + 1)]
    first = process * accumulation
    return [samples[bounds[part] : bounds[part + 1]] for part in range(first, first + accumulation)]

"""Which samples make up which step, and their tensors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from draws import Draw, SampleId, Source, draw_sample

DATA, PRIOR = "data", "prior"  # the two streams: the data set's pictures, and those the base has drawn


@dataclass(frozen=True)
class Batch:
    """The arguments of `objective.diffusion_loss`: latents and noise (B, C, h, w), timesteps (B,), text (B, L, D)."""

    latents: torch.Tensor
    noise: torch.Tensor
    timesteps: torch.Tensor
    encoder_hidden_states: torch.Tensor
    encoder_attention_mask: torch.Tensor | None


@dataclass(frozen=True)
class Batches:
    """A process's batches of every step, the same whenever they are asked for."""

    encodings: object  # has encode(draws) -> (latents, encoder_hidden_states, encoder_attention_mask)
    sources: dict[str, Source]
    seed: int
    data_batch: int  # samples of a step over all processes and accumulation parts
    prior_batch: int
    caption_dropout: float
    timesteps: int
    process: int
    processes: int
    accumulation: int
    device: torch.device

    def of_step(self, step: int) -> Iterator[Batch]:
        """The `accumulation` parts of optimisation step `step` (from 0) that this process trains on."""
        samples = step_samples(step, self.data_batch, self.prior_batch)
        for part in micro_batches(samples, self.process, self.processes, self.accumulation):
            yield self._batch([self._draw(sample) for sample in part])

    def _draw(self, sample: SampleId) -> Draw:
        return draw_sample(self.seed, sample, self.sources[sample.stream], self.caption_dropout, self.timesteps)

    def _batch(self, draws: Sequence[Draw]) -> Batch:
        latents, hidden_states, mask = self.encodings.encode(draws)
        return Batch(
            latents=latents.to(self.device),
            noise=torch.stack([draw.noise for draw in draws]).to(self.device),
            timesteps=torch.tensor([draw.timestep for draw in draws], device=self.device),
            encoder_hidden_states=hidden_states.to(self.device),
            encoder_attention_mask=None if mask is None else mask.to(self.device),
        )


def step_samples(step: int, data_batch: int, prior_batch: int) -> list[SampleId]:
    """The samples of step `step` (from 0). Batches flow over the border between epochs: none is short."""
    data = [SampleId(DATA, step * data_batch + i) for i in range(data_batch)]
    prior = [SampleId(PRIOR, step * prior_batch + i) for i in range(prior_batch)]
    return data + prior


def micro_batches(
    samples: Sequence[SampleId], process: int, processes: int, accumulation: int
) -> list[list[SampleId]]:
    """A process's share of a step in `accumulation` parts, none empty; dealt out in turn."""
    parts = processes * accumulation
    assert len(samples) >= parts
    return [list(samples[process * accumulation + part :: parts]) for part in range(accumulation)]

"""Which samples a step is made of, however it is split."""

import pytest
import torch

from batches import DATA, PRIOR, Batches, micro_batches, step_samples
from draws import SampleId, Source


def numbers(samples: list[SampleId], stream: str) -> list[int]:
    return [sample.number for sample in samples if sample.stream == stream]


def test_steps_take_the_samples_of_each_stream_in_order_with_none_left_out_or_twice():
    run = [sample for step in range(7) for sample in step_samples(step, 4, 2)]
    assert numbers(run, DATA) == list(range(28))
    assert numbers(run, PRIOR) == list(range(14))


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 1), (1, 4), (2, 2), (4, 1)])
def test_processes_and_accumulation_share_out_a_step_exactly(processes, accumulation):
    samples = step_samples(5, 4, 2)
    parts = [part for process in range(processes) for part in micro_batches(samples, process, processes, accumulation)]
    assert len(parts) == processes * accumulation and all(parts)
    assert sorted(numbers(sum(parts, []), DATA)) == numbers(samples, DATA)
    assert sorted(numbers(sum(parts, []), PRIOR)) == numbers(samples, PRIOR)


class Encodings:
    """Latents that hold the picture's number; captions of one or two tokens."""

    def encode(self, draws):
        latents = torch.stack([torch.full((1, 2, 2), float(draw.picture)) for draw in draws])
        return latents, torch.zeros(len(draws), 3, 8), None


def batches(processes: int, process: int, accumulation: int) -> Batches:
    sources = {DATA: Source([(("a",),)] * 5, (1, 2, 2)), PRIOR: Source([(("b",),)] * 3, (1, 2, 2))}
    return Batches(
        encodings=Encodings(), sources=sources, seed=0, data_batch=4, prior_batch=2, caption_dropout=0.1,
        timesteps=1000, process=process, processes=processes, accumulation=accumulation, device=torch.device("cpu"),
    )  # fmt: skip


def test_a_step_holds_the_same_noise_and_timesteps_on_one_process_and_on_two():
    alone = list(batches(1, 0, 1).of_step(3))[0]
    shared = [batch for process in (0, 1) for batch in batches(2, process, 2).of_step(3)]
    assert sorted(alone.timesteps.tolist()) == sorted(torch.cat([batch.timesteps for batch in shared]).tolist())
    assert alone.noise.sum().item() == pytest.approx(sum(batch.noise.sum().item() for batch in shared), abs=1e-5)
    assert alone.latents.shape == alone.noise.shape == (6, 1, 2, 2)

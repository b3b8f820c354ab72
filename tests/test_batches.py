"""Which samples a step is made of, however it is split."""

import pytest
import torch

from batches import DATA, PRIOR, Batches, micro_batches, step_samples
from draws import Chances, SampleId, Source


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
    together = [sample for part in parts for sample in part]
    assert sorted(numbers(together, DATA)) == numbers(samples, DATA)
    assert sorted(numbers(together, PRIOR)) == numbers(samples, PRIOR)


class Encodings:
    """Latents that hold the picture's number; captions of one or two tokens."""

    def encode(self, draws):
        latents = torch.stack([torch.full_like(draw.noise, float(draw.picture)) for draw in draws])
        return latents, torch.zeros(len(draws), 3, 8), None


def source(caption: str, shapes: list[tuple[int, int, int]], run: int = 1) -> Source:
    return Source([((caption,),)] * len(shapes), tuple(shapes), [False] * len(shapes), run)


def batches(processes: int, process: int, accumulation: int, shapes=((1, 2, 2),) * 5) -> Batches:
    sources = {DATA: source("a", list(shapes), run=4), PRIOR: source("b", [(1, 2, 2)] * 3)}
    return Batches(
        encodings=Encodings(), sources=sources, chances=Chances(0.1, 1000), seed=0, data_batch=4, prior_batch=2,
        process=process, processes=processes, accumulation=accumulation, device=torch.device("cpu"),
        dtype=torch.float32,
    )  # fmt: skip


def test_a_step_holds_the_same_noise_and_timesteps_on_one_process_and_on_two():
    (alone, last), *more = batches(1, 0, 1).of_step(3)
    assert last and not more
    shared = [batch for process in (0, 1) for batch, _ in batches(2, process, 2).of_step(3)]
    assert sorted(alone.timesteps.tolist()) == sorted(torch.cat([batch.timesteps for batch in shared]).tolist())
    assert alone.noise.sum().item() == pytest.approx(sum(batch.noise.sum().item() for batch in shared), abs=1e-5)
    assert alone.latents.shape == alone.noise.shape == (6, 1, 2, 2)


def test_pictures_of_several_sizes_are_split_into_batches_of_one_and_the_last_is_marked():
    shapes = [(1, 2, 2), (1, 2, 4), (1, 4, 2), (1, 2, 4), (1, 2, 2)]
    for step in range(6):
        for accumulation in (1, 2):
            parts = list(batches(1, 0, accumulation, shapes).of_step(step))
            assert sum(len(batch.latents) for batch, _ in parts) == 6
            assert all(batch.latents.shape == batch.noise.shape for batch, _ in parts)
            assert [last for _, last in parts] == [False] * (len(parts) - 1) + [True]

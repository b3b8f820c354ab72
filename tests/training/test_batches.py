"""Which samples a step is made of, however it is split."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.augmentation import NO_AUGMENTATION
from training.batches import DATA, PRIOR, Batches, make_batch, micro_batches, step_samples
from training.samples import SampleKey, SampleSettings, SampleSource, make_sample


def numbers(samples: list[SampleKey], stream: str) -> list[int]:
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


def source(caption: str, shapes: list[tuple[int, int, int]], run: int = 1) -> SampleSource:
    return SampleSource([((caption,),)] * len(shapes), tuple(shapes), [NO_AUGMENTATION] * len(shapes), run)


def batches(processes: int, process: int, accumulation: int, shapes=((1, 2, 2),) * 5) -> Batches:
    sources = {DATA: source("a", list(shapes), run=4), PRIOR: source("b", [(1, 2, 2)] * 3)}
    return Batches(
        encodings=Encodings(), sources=sources, chances=SampleSettings(0.1, 1000), seed=0, data_batch=4, prior_batch=2,
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


class Recorder:
    """Notes the drawn samples in the order in which they are trained on."""

    def __init__(self):
        self.noises = []

    def encode(self, draws):
        self.noises += [tuple(draw.noise.flatten().tolist()) for draw in draws]
        return torch.zeros(len(draws), 1, 1, 1), torch.zeros(len(draws), 1, 1), None


SHAPES = ((1, 2, 2), (1, 2, 4), (1, 4, 2))


@settings(deadline=None, max_examples=60)
@given(
    pictures=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=9),
    split=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    other_split=st.permutations([0, 1, 2]),
    prior=st.integers(0, 3),
    seed=st.integers(0, 3),
    steps=st.integers(1, 6),
    data=st.data(),
)
def test_a_run_cut_anywhere_and_split_otherwise_trains_on_the_uncut_sequence(
    pictures, split, other_split, prior, seed, steps, data
):
    """Split: processes, accumulation, pictures at once; the later part of the run has them the other way round."""

    def seen(step: int, processes: int, accumulation: int) -> list[tuple]:
        recorder = Recorder()
        for process in range(processes):
            part = Batches(
                encodings=recorder, sources=sources,
                chances=SampleSettings(0.1, 1000),
                seed=seed, data_batch=global_batch, prior_batch=prior, process=process,
                processes=processes, accumulation=accumulation, device=torch.device("cpu"), dtype=torch.float32,
            )  # fmt: skip
            list(part.of_step(step))
        return recorder.noises

    global_batch = split[0] * split[1] * split[2]
    sources = {DATA: source("a", pictures, run=global_batch), PRIOR: source("b", SHAPES)}
    cut = data.draw(st.integers(0, steps))
    uncut = [sorted(seen(step, split[0], split[1])) for step in range(steps)]
    then = [split[i] for i in other_split]
    resumed = [sorted(seen(step, *(split if step < cut else then)[:2])) for step in range(steps)]
    assert resumed == uncut
    assert seen(cut, *split[:2]) == seen(cut, *split[:2])  # in the same order too, asked for out of turn
    everything = [noise for step in uncut for noise in step]
    assert len(set(everything)) == len(everything) == steps * (global_batch + prior)
    passes = steps * global_batch // len(pictures)
    order = [picture for step in range(steps) for picture in _pictures(pictures, global_batch, seed, step)]
    for number in range(passes):
        assert sorted(order[number * len(pictures) : (number + 1) * len(pictures)]) == list(range(len(pictures)))


def _pictures(pictures: list, global_batch: int, seed: int, step: int) -> list[int]:
    sources = {DATA: source("a", pictures, run=global_batch)}
    run = Batches(
        Recorder(), sources, SampleSettings(0, 1000), seed, global_batch, 0, 0, 1, 1, torch.device("cpu"), None
    )
    return run.pictures_of(step)


def test_what_the_unet_sees_may_be_noisier_than_what_it_is_to_find():
    draw = make_sample(
        0, SampleKey(DATA, 0), source("a", [(1, 2, 2)]), SampleSettings(0.0, 1000, input_perturbation=0.5)
    )
    batch = make_batch(Encodings(), [draw], torch.device("cpu"), torch.float32)
    assert torch.equal(batch.noise[0], draw.noise) and torch.equal(batch.input_noise[0], draw.input_noise)
    assert not torch.equal(draw.noise, draw.input_noise)

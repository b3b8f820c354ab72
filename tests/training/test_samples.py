"""What is random about a sample is a pure function of seed and sample number, however a step is split into batches."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.augmentation import NO_AUGMENTATION, list_augmentations
from data.random_numbers import keyed_generator
from plain_conditions import ANY_SIZE, text_alone
from runtime.errors import InputChanged
from training.samples import (
    DATA,
    PRIOR,
    Batches,
    Encoded,
    Sample,
    SampleKey,
    SampleSettings,
    SampleSource,
    StepBatches,
    make_batch,
    make_sample,
    micro_batches,
    picture_index,
    step_samples,
)

FORMS = [((f"picture {i} at the left",), ("short", "shorter")) for i in range(5)]
SOURCE = SampleSource(FORMS, ((4, 3, 2),) * 5, augmentations=[NO_AUGMENTATION] * 5, time_ids=[ANY_SIZE] * 5)


def sample_at(seed: int, number: int, stream: str = "data", dropout: float = 0.1, source=SOURCE, **settings) -> Sample:
    return make_sample(seed, SampleKey(stream, number), source, SampleSettings(dropout, 1000, **settings))


def same(one: Sample, other: Sample) -> bool:
    return one.timestep == other.timestep and torch.equal(one.noise, other.noise)


def test_a_sample_is_the_same_whatever_was_sampled_before():
    alone = sample_at(0, 7)
    torch.manual_seed(123)
    for number in range(7):
        sample_at(0, number)
    again = sample_at(0, 7)
    assert same(alone, again) and torch.equal(alone.posterior_noise, again.posterior_noise)
    assert (alone.picture, alone.caption) == (again.picture, again.caption)


def test_making_a_sample_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    sample_at(0, 0)
    assert torch.equal(torch.rand(1), expected)


def test_neighbouring_seeds_and_streams_share_no_sample():
    assert not same(sample_at(1, 2), sample_at(2, 1))
    assert not same(sample_at(0, 0, "data"), sample_at(0, 0, "prior"))


def test_every_pass_shows_each_picture_once_and_passes_differ_in_order():
    passes = [[picture_index(3, SampleKey("data", 5 * p + i), SOURCE) for i in range(5)] for p in range(8)]
    assert all(sorted(shown) == list(range(5)) for shown in passes)
    assert len({tuple(shown) for shown in passes}) > 1


def test_captions_are_dropped_as_often_as_asked():
    dropped = [sample_at(0, number, dropout=0.25).caption == "" for number in range(2000)]
    assert 0.22 < sum(dropped) / 2000 < 0.28
    assert all(sample_at(0, number, dropout=0.0).caption for number in range(200))
    assert not any(sample_at(0, number, dropout=1.0).caption for number in range(200))


def test_groups_of_captions_are_chosen_equally_often():
    captions = [sample_at(0, number, dropout=0).caption for number in range(2000)]
    assert 0.46 < sum(caption.startswith("picture") for caption in captions) / 2000 < 0.54
    assert 0.21 < captions.count("short") / 2000 < 0.29


def test_timesteps_cover_the_whole_schedule_evenly():
    timesteps = torch.tensor([sample_at(0, number).timestep for number in range(2000)]).float()
    assert timesteps.min() < 20 and timesteps.max() > 979
    assert abs(timesteps.mean() - 499.5) < 25


def test_a_generator_is_a_function_of_its_whole_key():
    numbers = {
        torch.randint(2**40, (), generator=keyed_generator(0, *key)).item() for key in [("a", 1), ("a", 2), ("b", 1)]
    }
    assert len(numbers) == 3


def test_a_pass_over_several_sizes_shows_each_picture_once_and_keeps_one_size_together():
    shapes = tuple((4, 3, 2) if i % 3 else (4, 2, 3) for i in range(30))
    source = SampleSource([(("x",),)] * 30, shapes, [NO_AUGMENTATION] * 30, [ANY_SIZE] * 30, group_length=5)
    for number in range(4):
        shown = [picture_index(3, SampleKey("data", 30 * number + i), source) for i in range(30)]
        assert sorted(shown) == list(range(30))
        steps = [{shapes[picture] for picture in shown[at : at + 5]} for at in range(0, 30, 5)]
        assert all(len(step) == 1 for step in steps)


def test_half_of_the_samples_are_mirrored_with_their_captions_and_never_those_that_may_not():
    source = SampleSource(
        FORMS,
        SOURCE.latent_shapes,
        augmentations=[list_augmentations(True, 0.0)] * 4 + [NO_AUGMENTATION],
        time_ids=[ANY_SIZE] * 5,
    )
    samples = [sample_at(0, number, dropout=0, source=source) for number in range(2000)]
    flippable = [sample for sample in samples if sample.picture != 4]
    assert 0.46 < sum(sample.augmentation.mirrored for sample in flippable) / len(flippable) < 0.54
    assert not any(sample.augmentation.mirrored for sample in samples if sample.picture == 4)
    assert all(
        ("right" in sample.caption) == sample.augmentation.mirrored
        for sample in samples
        if "picture" in sample.caption
    )


def test_perturbation_changes_the_input_noise_only_and_an_offset_is_one_number_for_a_channel():
    plain, perturbed, shifted = (
        sample_at(0, 1),
        sample_at(0, 1, input_perturbation=0.5),
        sample_at(0, 1, noise_offset=0.3),
    )
    assert torch.equal(plain.noise, plain.input_noise) and torch.equal(plain.noise, perturbed.noise)
    assert 0.2 < (perturbed.input_noise - perturbed.noise).std() < 0.9
    offset = shifted.noise - plain.noise
    assert torch.allclose(offset, offset[:, :1, :1].expand_as(offset), atol=1e-6) and offset.abs().max() > 0.01
    assert torch.equal(shifted.noise, shifted.input_noise)


@pytest.mark.parametrize(("bias", "noisier"), [(3.0, 0.75), (1.0, 0.5), (0.25, 0.2)])
def test_a_timestep_bias_draws_the_noisier_half_as_many_times_as_often(bias, noisier):
    plain = [sample_at(0, number) for number in range(2000)]
    biased = [sample_at(0, number, timestep_bias=bias) for number in range(2000)]
    timesteps = torch.tensor([sample.timestep for sample in biased])
    assert timesteps.min() >= 0 and timesteps.max() < 1000
    assert abs((timesteps >= 500).float().mean().item() - noisier) < 0.03
    for half in (timesteps[timesteps < 500], timesteps[timesteps >= 500] - 500):  # evenly within each half
        assert abs(half.float().mean().item() - 250) < 20
    assert all(torch.equal(one.noise, other.noise) for one, other in zip(plain, biased, strict=True))
    assert [one.caption for one in plain] == [other.caption for other in biased]


# --- Batches ---


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

    def encode(self, samples):
        latents = torch.stack([torch.full_like(sample.noise, float(sample.picture)) for sample in samples])
        return Encoded(latents, text_alone(torch.zeros(len(samples), 3, 8)))


def source(caption: str, shapes: list[tuple[int, int, int]], group_length: int = 1) -> SampleSource:
    number = len(shapes)
    return SampleSource(
        [((caption,),)] * number, tuple(shapes), [NO_AUGMENTATION] * number, [ANY_SIZE] * number, group_length
    )


def batches(processes: int, process: int, accumulation: int, shapes=((1, 2, 2),) * 5) -> StepBatches:
    sources = {DATA: source("a", list(shapes), group_length=4), PRIOR: source("b", [(1, 2, 2)] * 3)}
    return StepBatches(
        encodings=Encodings(), sources=sources, settings=SampleSettings(0.1, 1000), seed=0,
        data_batch=4, prior_batch=2,
        process=process, processes=processes, accumulation=accumulation, device=torch.device("cpu"),
        dtype=torch.float32,
    )  # fmt: skip


def test_a_step_holds_the_same_noise_and_timesteps_on_one_process_and_on_two():
    (alone, last), *more = batches(1, 0, 1).for_step(3)
    assert last and not more
    shared = [batch for process in (0, 1) for batch, _ in batches(2, process, 2).for_step(3)]
    assert sorted(alone.timesteps.tolist()) == sorted(torch.cat([batch.timesteps for batch in shared]).tolist())
    assert alone.noise.sum().item() == pytest.approx(sum(batch.noise.sum().item() for batch in shared), abs=1e-5)
    assert alone.latents.shape == alone.noise.shape == (6, 1, 2, 2)


def test_pictures_of_several_sizes_are_split_into_batches_of_one_and_the_last_is_marked():
    shapes = [(1, 2, 2), (1, 2, 4), (1, 4, 2), (1, 2, 4), (1, 2, 2)]
    for step in range(6):
        for accumulation in (1, 2):
            parts = list(batches(1, 0, accumulation, shapes).for_step(step))
            assert sum(len(batch.latents) for batch, _ in parts) == 6
            assert all(batch.latents.shape == batch.noise.shape for batch, _ in parts)
            assert [last for _, last in parts] == [False] * (len(parts) - 1) + [True]


def test_batches_made_ahead_are_the_same_in_whatever_order_they_are_asked_for():
    plain, ahead = batches(1, 0, 2), Batches(batches(1, 0, 2), 9, ahead=True)
    for step in (0, 1, 2, 2, 7, 8):
        pairs = zip(plain.for_step(step), ahead.for_step(step), strict=True)
        assert all(a.noise.equal(b.noise) and last == also for (a, last), (b, also) in pairs)
    assert ahead.pictures_of(3) == plain.pictures_of(3)


def test_the_next_batch_is_made_while_this_one_is_used_and_its_error_comes_in_its_step():
    begun, read_on = threading.Event(), threading.Event()

    class Steps:
        device = torch.device("cpu")

        def for_step(self, step):
            if step == 1:
                begun.set()
                read_on.wait(60)
                raise OSError("the disk is gone")
            yield step, True

    ahead = Batches(Steps(), 2, ahead=True)
    assert list(ahead.for_step(0)) == [(0, True)]
    assert begun.wait(60)
    read_on.set()
    with pytest.raises(OSError, match="gone"):
        list(ahead.for_step(1))


@pytest.mark.parametrize("ahead", [True, False])
def test_why_batches_cannot_be_made_is_known_before_their_step_and_comes_in_it_too(ahead):
    class Steps:
        device = torch.device("cpu")

        def for_step(self, step):
            if step:
                raise InputChanged("1.jpg is gone") if step == 1 else OSError("a bug")
            yield step, True

    steps = Batches(Steps(), 3, ahead)
    assert steps.error_of(0) is None and list(steps.for_step(0)) == [(0, True)]
    assert "1.jpg" in str(steps.error_of(1))
    assert isinstance(steps.error_of(2), OSError) and steps.error_of(3) is None
    with pytest.raises(OSError, match="a bug"):
        list(steps.for_step(2))


class Recorder:
    """Notes the samples in the order in which they are trained on."""

    def __init__(self):
        self.noises = []

    def encode(self, samples):
        self.noises += [tuple(sample.noise.flatten().tolist()) for sample in samples]
        return Encoded(torch.zeros(len(samples), 1, 1, 1), text_alone(torch.zeros(len(samples), 1, 1)))


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
    """Split: processes, accumulation, pictures at once; the later part has them the other way round."""

    def seen(step: int, processes: int, accumulation: int) -> list[tuple]:
        recorder = Recorder()
        for process in range(processes):
            part = StepBatches(
                encodings=recorder, sources=sources,
                settings=SampleSettings(0.1, 1000),
                seed=seed, data_batch=global_batch, prior_batch=prior, process=process,
                processes=processes, accumulation=accumulation, device=torch.device("cpu"), dtype=torch.float32,
            )  # fmt: skip
            list(part.for_step(step))
        return recorder.noises

    global_batch = split[0] * split[1] * split[2]
    sources = {DATA: source("a", pictures, group_length=global_batch), PRIOR: source("b", SHAPES)}
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
    sources = {DATA: source("a", pictures, group_length=global_batch)}
    run = StepBatches(
        Recorder(), sources, SampleSettings(0, 1000), seed, global_batch, 0, 0, 1, 1, torch.device("cpu"), None
    )
    return run.pictures_of(step)


def test_the_input_noise_may_be_stronger_than_the_target_noise():
    sample = make_sample(
        0, SampleKey(DATA, 0), source("a", [(1, 2, 2)]), SampleSettings(0.0, 1000, input_perturbation=0.5)
    )
    batch = make_batch(Encodings(), [sample], torch.device("cpu"), torch.float32)
    assert torch.equal(batch.noise[0], sample.noise) and torch.equal(batch.input_noise[0], sample.input_noise)
    assert not torch.equal(sample.noise, sample.input_noise)

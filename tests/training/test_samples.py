"""Chance is a pure function of seed and sample number."""

import torch

from data.augmentation import NO_AUGMENTATION, list_augmentations
from training.samples import Sample, SampleKey, SampleSettings, SampleSource, generator, make_sample, picture_index

FORMS = [((f"picture {i} at the left",), ("short", "shorter")) for i in range(5)]
SOURCE = SampleSource(FORMS, ((4, 3, 2),) * 5, augmentations=[NO_AUGMENTATION] * 5)


def draw(seed: int, number: int, stream: str = "data", dropout: float = 0.1, source=SOURCE, **chances) -> Sample:
    return make_sample(seed, SampleKey(stream, number), source, SampleSettings(dropout, 1000, **chances))


def same(one: Sample, other: Sample) -> bool:
    return one.timestep == other.timestep and torch.equal(one.noise, other.noise)


def test_a_sample_is_the_same_whatever_was_drawn_before():
    alone = draw(0, 7)
    torch.manual_seed(123)
    for number in range(7):
        draw(0, number)
    again = draw(0, 7)
    assert same(alone, again) and torch.equal(alone.posterior_noise, again.posterior_noise)
    assert (alone.picture, alone.caption) == (again.picture, again.caption)


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    draw(0, 0)
    assert torch.equal(torch.rand(1), expected)


def test_neighbouring_seeds_and_streams_share_no_sample():
    assert not same(draw(1, 2), draw(2, 1))
    assert not same(draw(0, 0, "data"), draw(0, 0, "prior"))


def test_every_pass_shows_each_picture_once_and_passes_differ_in_order():
    passes = [[picture_index(3, SampleKey("data", 5 * p + i), SOURCE) for i in range(5)] for p in range(8)]
    assert all(sorted(shown) == list(range(5)) for shown in passes)
    assert len({tuple(shown) for shown in passes}) > 1


def test_captions_are_dropped_as_often_as_asked():
    dropped = [draw(0, number, dropout=0.25).caption == "" for number in range(2000)]
    assert 0.22 < sum(dropped) / 2000 < 0.28
    assert all(draw(0, number, dropout=0.0).caption for number in range(200))
    assert not any(draw(0, number, dropout=1.0).caption for number in range(200))


def test_groups_of_captions_are_drawn_equally_often():
    captions = [draw(0, number, dropout=0).caption for number in range(2000)]
    assert 0.46 < sum(caption.startswith("picture") for caption in captions) / 2000 < 0.54
    assert 0.21 < captions.count("short") / 2000 < 0.29


def test_timesteps_cover_the_whole_schedule_evenly():
    timesteps = torch.tensor([draw(0, number).timestep for number in range(2000)]).float()
    assert timesteps.min() < 20 and timesteps.max() > 979
    assert abs(timesteps.mean() - 499.5) < 25


def test_a_generator_is_a_function_of_its_whole_key():
    numbers = {torch.randint(2**40, (), generator=generator(0, *key)).item() for key in [("a", 1), ("a", 2), ("b", 1)]}
    assert len(numbers) == 3


def test_a_pass_over_several_sizes_shows_each_picture_once_and_keeps_one_size_together():
    shapes = tuple((4, 3, 2) if i % 3 else (4, 2, 3) for i in range(30))
    source = SampleSource([(("x",),)] * 30, shapes, [NO_AUGMENTATION] * 30, run=5)
    for number in range(4):
        shown = [picture_index(3, SampleKey("data", 30 * number + i), source) for i in range(30)]
        assert sorted(shown) == list(range(30))
        steps = [{shapes[picture] for picture in shown[at : at + 5]} for at in range(0, 30, 5)]
        assert all(len(step) == 1 for step in steps)


def test_half_of_the_samples_are_mirrored_with_their_captions_and_never_those_that_may_not():
    source = SampleSource(
        FORMS, SOURCE.latent_shapes, augmentations=[list_augmentations(True, 0.0)] * 4 + [NO_AUGMENTATION]
    )
    drawn = [draw(0, number, dropout=0, source=source) for number in range(2000)]
    flippable = [sample for sample in drawn if sample.picture != 4]
    assert 0.46 < sum(sample.augmentation.mirrored for sample in flippable) / len(flippable) < 0.54
    assert not any(sample.augmentation.mirrored for sample in drawn if sample.picture == 4)
    assert all(
        ("right" in sample.caption) == sample.augmentation.mirrored for sample in drawn if "picture" in sample.caption
    )


def test_perturbation_is_seen_and_not_to_be_found_and_an_offset_is_one_number_for_a_channel():
    plain, perturbed, shifted = draw(0, 1), draw(0, 1, input_perturbation=0.5), draw(0, 1, noise_offset=0.3)
    assert torch.equal(plain.noise, plain.input_noise) and torch.equal(plain.noise, perturbed.noise)
    assert 0.2 < (perturbed.input_noise - perturbed.noise).std() < 0.9
    offset = shifted.noise - plain.noise
    assert torch.allclose(offset, offset[:, :1, :1].expand_as(offset), atol=1e-6) and offset.abs().max() > 0.01
    assert torch.equal(shifted.noise, shifted.input_noise)

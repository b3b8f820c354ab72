"""How often a picture and a form of its caption are sampled: as their repeats and --short_captions say, exactly."""

from collections import Counter

import pytest
import torch

from data.augmentation import NO_AUGMENTATION
from plain_conditions import ANY_SIZE, text_alone
from training.samples import (
    DATA,
    PRIOR,
    Encoded,
    SampleKey,
    SampleSettings,
    SampleSource,
    StepBatches,
    epoch_length,
    epoch_pictures,
    make_sample,
    picture_index,
    step_samples,
)

DRAWS = 10_000
FORMS = (("A cap. It is blue. It is new.",), ("A cap.",), ("cap",), ("A cap. It is blue.", "A cap. It is new."))


def source(repeats: list[float], group_length: int = 1) -> SampleSource:
    return SampleSource(
        [FORMS] * len(repeats), ((1, 2, 2),) * len(repeats), [NO_AUGMENTATION] * len(repeats),
        [ANY_SIZE] * len(repeats), group_length, repeats, whole_groups=[(0,)] * len(repeats),
    )  # fmt: skip


@pytest.mark.parametrize(
    "repeats",
    [[0.5, 1, 1, 1], [2, 1, 1], [0.1] * 30 + [1] * 5, [0.3, 0.3, 0.4, 7], [1 / 3, 2 / 3, 1, 1], [1.5, 1.5], [0.2]],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 5])
def test_over_ten_thousand_samples_every_picture_has_its_share_within_one_percent(repeats, seed):
    weighted = source(repeats)
    seen = Counter(picture_index(seed, SampleKey(DATA, number), weighted) for number in range(DRAWS))
    for picture, times in enumerate(repeats):
        expected = DRAWS * times / sum(repeats)
        assert seen[picture] == pytest.approx(expected, rel=0.01, abs=3)  # 3: where it is seen a hundred times


def test_a_picture_of_half_a_repeat_is_in_half_of_the_epochs_and_never_twice_in_one():
    weighted = source([0.5, 0.5, 1, 2])
    epochs = [Counter(epoch_pictures(3, DATA, epoch, weighted)) for epoch in range(1000)]
    assert {epoch.total() for epoch in epochs} == {4}
    assert all(epoch[2] == 1 and epoch[3] == 2 and epoch[0] + epoch[1] == 1 for epoch in epochs)
    assert sum(epoch[0] for epoch in epochs) == pytest.approx(500, abs=3)
    longest = max(len(run) for run in "".join(str(epoch[0]) for epoch in epochs).split("1"))
    assert longest <= 3  # the epochs without it are spread out


@pytest.mark.parametrize(
    ("repeats", "length"), [([1, 1, 1], 3), ([0.5, 1, 1], 3), ([0.4, 1], 1), ([0.1], 1), ([2.5], 3)]
)
def test_an_epoch_has_the_rounded_sum_of_the_repeats(repeats, length):
    assert epoch_length(repeats) == source(repeats).epoch_length == length
    assert len(epoch_pictures(0, DATA, 7, source(repeats))) == length


def test_with_all_repeats_1_the_order_is_the_one_without_any():
    ones = source([1.0] * 9)
    plain = SampleSource([FORMS] * 9, ((1, 2, 2),) * 9, [NO_AUGMENTATION] * 9, [ANY_SIZE] * 9)
    for number in range(200):
        key = SampleKey(DATA, number)
        assert picture_index(4, key, plain) == picture_index(4, key, ones)


def test_the_same_samples_come_in_any_order_and_from_two_processes_as_from_one():
    class Numbers:
        def encode(self, samples):
            latents = torch.stack([torch.full_like(sample.noise, float(sample.picture)) for sample in samples])
            return Encoded(latents, text_alone(torch.zeros(len(samples), 1, 1)))

    def noises(step: int, processes: int, accumulation: int) -> list[tuple]:
        found = []
        for process in range(processes):
            batches = StepBatches(
                Numbers(), {DATA: source([0.5, 2, 1, 0.25], 4), PRIOR: source([])},
                SampleSettings(0.1, 1000, short_captions=0.3), 0, 4, 0, process, processes, accumulation,
                torch.device("cpu"), torch.float32,
            )  # fmt: skip
            for batch, _ in batches.for_step(step):
                sums = (tensor.sum((1, 2, 3)).tolist() for tensor in (batch.latents, batch.noise))
                found += list(zip(*sums, strict=True))
        return sorted(found)

    forwards = [noises(step, 1, 1) for step in range(9)]
    assert [noises(step, 2, 2) for step in reversed(range(9))][::-1] == forwards
    assert [key.number for key in step_samples(2, 4, 0)] == [8, 9, 10, 11]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_captions_are_read_whole_but_in_the_share_asked_for(share):
    settings = SampleSettings(0.0, 1000, short_captions=share)
    seen = Counter(make_sample(0, SampleKey(DATA, n), source([1.0]), settings).caption for n in range(DRAWS // 5))
    total, whole = seen.total(), seen[FORMS[0][0]]
    assert whole / total == pytest.approx(1 - share, abs=0.03)
    if share:
        assert (seen["cap"] / (total - whole)) == pytest.approx(1 / 3, abs=0.04)
        assert (seen["A cap. It is new."] / (total - whole)) == pytest.approx(1 / 6, abs=0.04)


def test_a_share_of_shorter_captions_leaves_all_other_random_numbers_as_they_are():
    plain, shared = SampleSettings(0.1, 1000), SampleSettings(0.1, 1000, short_captions=0.5)
    for number in range(50):
        one, other = (make_sample(1, SampleKey(DATA, number), source([1.0]), settings) for settings in (plain, shared))
        assert one.timestep == other.timestep and torch.equal(one.noise, other.noise)
        assert (one.caption == "") == (other.caption == "")


def test_a_caption_without_shorter_variants_and_a_prior_prompt_stay_whole():
    alone = SampleSource([(("cap",),)], ((1, 2, 2),), [NO_AUGMENTATION], [ANY_SIZE], whole_groups=[(0,)])
    prior = SampleSource([(("a cap",),)], ((1, 2, 2),), [NO_AUGMENTATION], [ANY_SIZE])
    settings = SampleSettings(0.0, 1000, short_captions=1.0)
    assert {make_sample(0, SampleKey(DATA, n), alone, settings).caption for n in range(20)} == {"cap"}
    assert {make_sample(0, SampleKey(PRIOR, n), prior, settings).caption for n in range(20)} == {"a cap"}

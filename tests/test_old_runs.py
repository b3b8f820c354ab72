"""Runs of earlier versions go on: fingerprints and per-sample randomness are those that commit eda9298 gave.

A run is found again by its fingerprint, and resumed or repeated with the same random numbers. So from now on
- a new flag defaults to None, False or 0, which count as absent, or stands in `NOT_IN_FINGERPRINT` (runs/records.py)
  where it does not change the weights;
- new randomness takes a generator of its own (a new `keyed_generator(seed, key, ...)`), never one more number from
  an existing one.
The numbers below are what eda9298 computed. They change where the starter model, its training_defaults.json or
dataset/ change, and for no other reason: a failure here after a change of the code is a fault of that change.
"""

from types import SimpleNamespace

import pytest
import torch

from clone import ROOT
from data.augmentation import list_augmentations
from data.caption_variants import caption_variants
from data.random_numbers import keyed_generator
from models.loading import load_tokenizer
from plain_conditions import ANY_SIZE
from train_text_to_image import parse_args
from training.plan import describe_run, make_plan
from training.samples import SampleKey, SampleSettings, SampleSource, make_sample, picture_index
from training.setup import make_accelerator
from training.validation import fixed_samples

FINGERPRINTS = {
    "": "66390cf666d5ff2420a372c182d1615e2b71d41e6f85abd4a3df7a68d31f64ec",
    "--lora_rank 4 --random_flip --seed 5": "91e0f347c567ed8da0e1e90c1b19cb60eb55464371da27d70662b410b390b269",
    "--mixed_precision bf16 --use_ema --validation_split 0.4 --trigger sks --lr_scheduler constant_with_warmup "
    "--lr_warmup_steps 0 --snr_gamma 5 --noise_offset 0.1 --train_batch_size 2 --gradient_accumulation_steps 2 "
    "--resolution 128 --max_token_chunks 1 --no_short_captions": (
        "2bd2b7202ed7b1e736d5e4e337f8815c0af214107a131c1bbd614ae4dbfdba67"
    ),
}
FINGERPRINTS["--short_captions"] = FINGERPRINTS[""]  # bare it means what it meant when it had no number
CAPTIONS = (
    "A red shirt laid flat on a table, its pocket on the left. The collar is open. It is new.",
    "A cap seen from the right. It is blue.",
    "A pair of denim jeans on a white background.",
    "socks",
    "A green dress, the zip at its left side.",
)
PORTRAIT, LANDSCAPE = (4, 6, 4), (4, 4, 6)
SHAPES = (PORTRAIT, LANDSCAPE, PORTRAIT, PORTRAIT, LANDSCAPE)
AUGMENTATIONS = list_augmentations(True, 0.06)


def source(run: int = 1) -> SampleSource:
    return SampleSource(
        [caption_variants(c) for c in CAPTIONS], SHAPES, [AUGMENTATIONS] * len(CAPTIONS), [ANY_SIZE] * 5, run
    )


def sample_facts(seed: int, number: int, settings: SampleSettings, stream: str = "data") -> tuple:
    """Picture, index of its augmentation, caption, timestep, and two numbers of each noise."""
    sample = make_sample(seed, SampleKey(stream, number), source(), settings)
    noises = (sample.posterior_noise, sample.noise, sample.input_noise)
    augmentation = AUGMENTATIONS.index(sample.augmentation)
    return sample.picture, augmentation, sample.caption, sample.timestep, *map(first_two, noises)


def first_two(noise: torch.Tensor):
    return pytest.approx(noise.flatten()[:2].tolist(), abs=1e-5)


@pytest.mark.parametrize("flags", FINGERPRINTS, ids=["plain", "lora", "many flags", "short captions"])
def test_a_command_line_has_the_fingerprint_that_it_always_had(flags, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    args = parse_args(["--dataset", str(ROOT / "dataset"), *flags.split()])
    accelerator, precision = make_accelerator(args)
    plan = make_plan(args, accelerator)
    run = describe_run(args, plan, accelerator, load_tokenizer(plan.base), precision)
    assert run["fingerprint"] == FINGERPRINTS[flags]
    assert run["seed"] == (args.seed if args.seed is not None else int(FINGERPRINTS[flags][-8:], 16))


PLAIN = SampleSettings(caption_dropout=0.1, timesteps=1000)
PERTURBED = SampleSettings(caption_dropout=0.1, timesteps=1000, noise_offset=0.1, input_perturbation=0.1)


@pytest.mark.parametrize(
    ("seed", "number", "settings", "expected"),
    [
        (0, 0, PLAIN, (0, 25, "red shirt", 278, [0.26586, 0.42268], [-1.09134, -0.86539], [-1.09134, -0.86539])),
        (0, 0, PERTURBED, (0, 19, "red shirt", 278, [0.26586, 0.42268], [-1.00069, -0.77474], [-0.93204, -0.73832])),
        (0, 11, PLAIN, (4, 28, "A green dress", 309, [0.04949, 1.1496], [-0.35094, 0.23652], [-0.35094, 0.23652])),
        (0, 10, PERTURBED, (0, 12, "", 569, [0.86677, -0.12268], [-0.62543, 2.13068], [-0.73709, 2.18841])),
        (0, 26, PERTURBED, (
            1, 22, "A cap seen from the left.", 173, [-0.24493, -0.79866], [-0.65987, -0.52791], [-0.68562, -0.70127]
        )),
        (5, 3, PLAIN, (0, 9, "A red shirt", 278, [0.43602, 0.33358], [-0.14517, 0.19381], [-0.14517, 0.19381])),
        (5, 11, PERTURBED, (2, 27, "denim jeans", 146, [-1.9902, -0.96335], [-0.85567, 0.23171], [-0.71471, 0.10063])),
    ],
)  # fmt: skip
def test_a_sample_is_made_of_the_same_random_numbers(seed, number, settings, expected):
    assert sample_facts(seed, number, settings) == expected


def test_the_other_streams_have_numbers_of_their_own():
    never_dropped = SampleSettings(caption_dropout=0, timesteps=1000)
    assert sample_facts(0, 0, never_dropped, "prior")[:4] == (0, 12, "A red shirt", 573)
    assert sample_facts(0, 0, never_dropped, "held out")[:4] == (3, 30, "socks", 422)


@pytest.mark.parametrize(
    ("seed", "run", "order"),
    [
        (0, 1, [0, 4, 3, 1, 2, 2, 0, 4, 3, 1]),
        (0, 2, [0, 3, 1, 4, 2, 1, 4, 2, 3, 0]),
        (5, 1, [2, 3, 4, 0, 1, 3, 1, 2, 0, 4]),
        (5, 2, [1, 4, 2, 0, 3, 4, 1, 2, 0, 3]),
    ],
)
def test_two_passes_show_the_pictures_in_the_same_order(seed, run, order):
    assert [picture_index(seed, SampleKey("data", number), source(run)) for number in range(10)] == order


def test_the_loss_on_fixed_noise_is_measured_on_the_same_noise():
    images = [SimpleNamespace(captions=[caption], time_ids=ANY_SIZE) for caption in "ab"]
    samples = fixed_samples("held out", images, [PORTRAIT, LANDSCAPE], 1000)
    assert [(sample.picture, sample.timestep) for sample in samples] == [
        (picture, timestep) for picture in (0, 1) for timestep in (125, 375, 625, 875)
    ]
    last = samples[-1]
    assert first_two(last.posterior_noise) == [-1.24861, 0.30164] and first_two(last.noise) == [-0.44628, 0.81611]


def test_the_bases_own_pictures_begin_with_the_same_noise():
    assert first_two(torch.randn(PORTRAIT, generator=keyed_generator(5, "prior picture", 1))) == [-0.15439, -0.62492]

"""The plan: which pictures are trained on, at what size, which may be mirrored."""

from argparse import Namespace
from pathlib import Path

import pytest

from data.augmentation import NO_AUGMENTATION, Augmentation, list_augmentations
from data.buckets import Size
from data.dataset import Picture
from models.folders import ModelShape
from runtime.errors import UserError
from training.plan import Plan, base_name, hold_out, unmirrored_word
from training.samples import DATA, HELD_OUT


def picture(number: int, *captions: str) -> Picture:
    return Picture(Path(f"{number}.jpg"), 60, 80, (captions or ("a shirt",),))


PICTURES = [picture(i) for i in range(20)]
BOTH = list_augmentations(True, 0.0)


def chosen(**flags) -> tuple[list[str], list[str]]:
    args = Namespace(
        **{"seed": 0, "max_train_samples": None, "validation_split": 0.0, "validation_dir": None, **flags}
    )
    return tuple([p.path.name for p in pictures] for pictures in hold_out(args, PICTURES))


def test_all_are_trained_on_in_the_data_sets_order_unless_asked_otherwise():
    trained, held_out = chosen()
    assert trained == [p.path.name for p in PICTURES] and held_out == []


def test_held_out_pictures_are_a_share_and_none_of_them_is_trained_on():
    trained, held_out = chosen(validation_split=0.25)
    assert len(held_out) == 5 and len(trained) == 15 and not set(trained) & set(held_out)
    assert chosen(validation_split=0.25) == (trained, held_out)
    assert chosen(validation_split=0.25, seed=1) != (trained, held_out)


def test_a_limited_number_is_chosen_by_the_seed_and_held_out_ones_come_from_it():
    trained, _ = chosen(max_train_samples=8)
    assert len(trained) == 8 and trained == sorted(trained, key=lambda name: int(name[:-4]))
    less, held_out = chosen(max_train_samples=8, validation_split=0.25)
    assert sorted(less + held_out) == sorted(trained)


def test_a_split_that_holds_out_none_or_all_is_refused():
    for split in (0.01, 0.99):
        with pytest.raises(UserError, match="--validation_split"):
            chosen(validation_split=split)


def plan_of(sizes: list[Size], augmentations: list[tuple[Augmentation, ...]], held_out: list[Picture]) -> Plan:
    return Plan(
        folders=[Path("data")], without_caption=[], unreadable=[], pictures=PICTURES[: len(sizes)], sizes=sizes,
        augmentations=augmentations,
        held_out=held_out, base=Path("base"), unet_base=Path("base"), shape=ModelShape(2, 2, 4, 64, (1,)),
        global_batch=4, prior_batch=2, epoch_samples=3, steps=10, warmup=1, learning_rate=1e-4, prior_prompts=[],
        held_out_sizes=[(64, 96)] * len(held_out), interpolation="lanczos",
    )  # fmt: skip


def test_everything_that_is_encoded_is_known_by_stream_and_number():
    plan = plan_of([(72, 56), (64, 64), (72, 56)], [BOTH, NO_AUGMENTATION, NO_AUGMENTATION], [picture(9)])
    assert plan.main_size == (72, 56) and plan.largest_size == (64, 96) and plan.samples_per_step == 6
    subjects = plan.images_to_encode
    assert list(subjects) == [(DATA, 0), (DATA, 1), (DATA, 2), (HELD_OUT, 0)]
    assert subjects[DATA, 1].size == (64, 64) and subjects[HELD_OUT, 0].size == (64, 96)
    assert [subject.augmentations for subject in subjects.values()] == [
        BOTH,
        NO_AUGMENTATION,
        NO_AUGMENTATION,
        NO_AUGMENTATION,
    ]


def test_one_caption_with_writing_or_a_foreign_side_keeps_a_picture_from_being_mirrored():
    assert unmirrored_word(picture(0, "a shirt", "a shirt with a logo")) == "logo"
    assert unmirrored_word(picture(0, "a shirt", "ein Knopf links")) == "links"
    assert unmirrored_word(picture(0, "a shirt", "a plain shirt")) is None


def test_a_folder_is_recorded_so_that_it_is_found_from_anywhere_and_a_hub_id_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert base_name("model") == str(tmp_path / "model")
    assert base_name("stable-diffusion-v1-5/stable-diffusion-v1-5") == "stable-diffusion-v1-5/stable-diffusion-v1-5"

"""Lists of tags: what is one, which orders it is read in, which tags stay and how many are left out."""

from collections import Counter
from pathlib import Path

import pytest

from data.dataset import Picture, read_tags
from data.tags import TAG_ORDERS, TagSettings, split_tags

TAGS = "sks jeans, blue, folded, from above, on white, a button, a seam"
SHUFFLED = TagSettings(shuffle=True, keep=0, dropout=0.0, seed=0)


@pytest.mark.parametrize(
    ("caption", "tags"),
    [
        ("jeans, blue ,folded,", ["jeans", "blue", "folded"]),
        ("jeans", []),
        ("A pair of jeans, folded.", []),
        ("A pair of jeans, folded. They are new, and blue", []),
        ("jeans, ,", []),
    ],
)
def test_a_list_of_tags_has_commas_and_no_sentence(caption, tags):
    assert split_tags(caption) == tags


def test_all_tags_are_in_every_order_and_each_is_first_about_as_often():
    first = Counter[str]()
    for seed in range(50):
        orders = TagSettings(True, 0, 0.0, seed).variants(TAGS)
        assert len(orders) == TAG_ORDERS and len(set(orders)) > TAG_ORDERS / 2
        assert all(sorted(order.split(", ")) == sorted(split_tags(TAGS)) for order in orders)
        first.update(order.split(", ")[0] for order in orders)
    assert all(0.7 < count / (50 * TAG_ORDERS / 7) < 1.3 for count in first.values()) and len(first) == 7


def test_the_orders_follow_from_seed_and_caption_alone():
    again, other = TagSettings(True, 0, 0.0, 0).variants(TAGS), TagSettings(True, 0, 0.0, 1).variants(TAGS)
    assert SHUFFLED.variants(TAGS) == again != other


def test_the_first_tags_stay_where_they_are_and_are_never_left_out():
    for order in TagSettings(True, 2, 1.0, 0).variants(TAGS):
        assert order == "sks jeans, blue"
    for order in TagSettings(True, 2, 0.5, 0).variants(TAGS):
        assert order.startswith("sks jeans, blue") and len(set(order.split(", "))) == len(order.split(", "))


def test_tags_are_left_out_with_the_probability_asked_for_and_keep_their_order():
    left = 0
    for seed in range(1500):  # 16 x 6 tags each
        for order in TagSettings(False, 1, 0.1, seed).variants(TAGS):
            kept = order.split(", ")
            assert kept == [tag for tag in split_tags(TAGS) if tag in kept] and kept[0] == "sks jeans"
            left += 7 - len(kept)
    assert left / (1500 * TAG_ORDERS * 6) == pytest.approx(0.1, abs=0.003)


def test_a_caption_never_loses_its_last_tag():
    orders = TagSettings(False, 0, 1.0, 0).variants(TAGS)
    assert {len(order.split(", ")) for order in orders} == {1} and len(set(orders)) > 1


def test_a_list_in_which_nothing_can_change_is_kept_once():
    assert TagSettings(True, 9, 0.0, 0).variants(TAGS) == (TAGS,)


def picture(*captions: str, trigger: str | None = None) -> Picture:
    return Picture(Path("1.jpg"), 30, 40, (captions,), trigger, captions)


def test_a_picture_is_known_by_its_caption_as_written_and_sampled_from_the_orders():
    read = read_tags(picture(TAGS), SHUFFLED, short_captions=True)
    assert read.captions[0] == TAGS and read.caption_groups == (SHUFFLED.variants(TAGS),)
    assert read.whole_groups == (0,)


def test_the_trigger_stays_first_whether_the_caption_has_it_already_or_not():
    for caption in ("blue, folded, new", "sks, blue, folded, new"):
        read = read_tags(picture(caption, trigger="sks"), SHUFFLED, short_captions=False)
        assert read.captions[0] == "sks, blue, folded, new"
        assert all(order.startswith("sks, ") and len(order.split(", ")) == 4 for order in read.caption_groups[0])


def test_captions_that_are_no_tags_stay_as_they_are():
    plain = picture("A pair of jeans. It is new.")
    assert read_tags(plain, SHUFFLED, short_captions=True) is plain
    both = read_tags(picture(TAGS, "A pair of jeans. It is new."), SHUFFLED, short_captions=False)
    assert both.caption_groups[1] == ("A pair of jeans. It is new.",) and both.as_written == (TAGS,)

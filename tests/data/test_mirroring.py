"""Captions of mirrored pictures: sides are swapped and nothing else; what can be read is not mirrored."""

import random

import pytest

from data.mirroring import mirror_caption, why_not_mirrored

SWAPPED = [
    ("a pocket on the left", "a pocket on the right"),
    ("Left and RIGHT sleeve", "Right and LEFT sleeve"),
    ("a marker near the upper right corner", "a marker near the upper left corner"),
    ("an upper-left patch", "an upper-right patch"),
    ("the left-hand pocket, a right-handed catcher's mitt", "the right-hand pocket, a left-handed catcher's mitt"),
    ("the righthand cuff", "the lefthand cuff"),
    ("the leftmost and the Rightmost button", "the rightmost and the Leftmost button"),
    ("a toe that points leftward, then rightwards", "a toe that points rightward, then leftwards"),
    ("a left-facing shoe", "a right-facing shoe"),
    ("a left-side zip and the left's lace", "a right-side zip and the right's lace"),
    ("the right side of the coat", "the left side of the coat"),
    ("buttoned left over right", "buttoned right over left"),
    ("the left over the right front", "the right over the left front"),
    ("a lamp on the right behind the chair", "a lamp on the left behind the chair"),
    ("a shoe on the left next to a bag", "a shoe on the right next to a bag"),
    ("just left of the fly", "just right of the fly"),
    ("it is left of the fly", "it is right of the fly"),
    ("the upper-left open flap", "the upper-right open flap"),
    ("with left bare foot", "with right bare foot"),
    ("all right-facing arrows", "all left-facing arrows"),
    ("left.\nRight", "right.\nLeft"),
]
KEPT = [
    "a bright upright copyright mark on leftover cloth, alright",
    "legs bent at a right angle, two right angles, a right-angled hem",
    "the seams look all right",
    "the sleeve is just right",
    "Laid right side up, then right way round",
    "a right of way, right now",
    "the patch is right above the hem, the tab lies right next to it",
    "the collar is left open at the neck",
    "a shirt with its buttons left undone.",
    "cuffs left unbuttoned, hems left raw",
    "cloth left over, a thread left behind",
    "",
]


@pytest.mark.parametrize(("caption", "mirrored"), SWAPPED)
def test_sides_are_swapped_as_they_are_written(caption, mirrored):
    assert mirror_caption(caption) == mirrored
    assert mirror_caption(mirrored) == caption


@pytest.mark.parametrize("caption", KEPT)
def test_what_is_no_side_is_kept(caption):
    assert mirror_caption(caption) == caption


def test_a_caption_mirrored_twice_is_the_caption():
    words = "left right Left RIGHT lEFT left-hand rightmost all just is the on of over behind angle angled side up way"
    words = [*words.split(), "open", "untied", "above", "next to", "now", "foot", ",", ".", "-", "\n", "'s"]
    rng = random.Random(0)
    for _ in range(5000):
        caption = "".join(rng.choice(words) + rng.choice(["", " ", " ", " "]) for _ in range(rng.randint(1, 9)))
        assert mirror_caption(mirror_caption(caption)) == caption


@pytest.mark.parametrize(
    ("caption", "writing"),
    [
        ("a shirt with white text", "text"),
        ("A Logo on the chest", "Logo"),
        ("the letter A in red", "letter"),
        ("gold lettering", "lettering"),
        ("printed with the words be kind", "words"),
        ("the number 7 on the back", "number"),
        ("Roman numerals and a digit", "numerals"),
        ("a slogan or an inscription", "slogan"),
        ("a sign that reads stop", "sign"),
        ("a label that reads 501", "reads"),
        ("a badge reading 501", "badge reading"),
        ("two badges that say hello", "that say"),
        ("the tag says XL", "says"),
        ("an embroidered monogram", "monogram"),
        ("a brand name on the waistband", "brand name"),
        ("a number of letters", "letters"),
        ("the back of a newspaper", "newspaper"),
        ('a red tab, "LEVI\'S", on the pocket', '"LEVI\'S"'),
        ("a tab with “Wrangler” on it", "“Wrangler”"),
        ("a tab with 'Lee' on it", "'Lee'"),
    ],
)
def test_a_picture_with_something_to_read_is_known_by_its_caption(caption, writing):
    assert why_not_mirrored(caption) == writing


@pytest.mark.parametrize(
    "caption",
    [
        "A single pair of denim jeans laid flat on a white background, seen from the front.",
        "a number of buttons, a large number of rivets, no signs of wear",
        "in other words, a coarse texture on a textile with a contextual swordfish",
        "a writing desk with a digital lamp",
        'a belt 40" long and 2" wide',
        "the girls' and the boys' coats",
        "a designed label, a plain tag and a printed patch",
        '""',
        "",
    ],
)
def test_a_caption_without_writing_allows_mirroring(caption):
    assert why_not_mirrored(caption) is None

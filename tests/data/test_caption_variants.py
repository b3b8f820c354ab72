"""Shorter forms of a caption: its sentences, its first clause, its subject."""

import pytest

from data.caption_variants import caption_variants, first_sentence, suggest_prompts, without_announcement

LONG = (
    "A single pair of denim jeans laid flat on a white background, seen from the back. The blue denim is faded. "
    "The legs are spread apart."
)


def test_the_variants_are_the_first_sentence_its_first_clause_and_the_subject_with_and_without_determiner():
    first = "A single pair of denim jeans laid flat on a white background, seen from the back."
    assert caption_variants(LONG) == (
        (LONG,),
        (first, "A single pair of denim jeans laid flat on a white background"),
        ("A single pair of denim jeans",),
        ("denim jeans",),
        (f"{first} The blue denim is faded.", f"{first} The legs are spread apart."),
    )


@pytest.mark.parametrize(
    ("caption", "groups"),
    [
        ("A cat on a mat.", (("A cat on a mat.",), ("A cat", "cat"))),
        ("Two socks on a table.", (("Two socks on a table.",), ("Two socks",))),
        ("denim jeans", (("denim jeans",),)),
    ],
)
def test_a_single_sentence_is_chosen_at_least_every_other_time(caption, groups):
    assert caption_variants(caption) == groups


@pytest.mark.parametrize(
    ("caption", "subject"),
    [
        ("A red t-shirt, folded.", "red t-shirt"),
        ("Two socks on a table.", "Two socks"),
        ("The photograph of a cat with a hat.", "cat"),
        ("a pair of shoes", "shoes"),
        ("An apple.", "apple"),
        ("1,000 pins, 3.5 cm long.", "1,000 pins"),
        ("A blue, short-sleeved shirt laid flat.", "blue, short-sleeved shirt"),
        ("A large (XL) shirt", "large (XL) shirt"),
        ("A dog, sitting on a mat", "dog"),
        ("A dress, red, long, sleeveless.", "dress"),
        ("A dog, brown and white, runs through tall grass.", "dog"),
        ("a cat, high quality, sharp focus", "cat"),
        ("Dr. Martens boots on a table. They are black.", "Dr. Martens boots"),
        ("there is a pair of jeans that are laying on the ground", "jeans"),
        ("This is a photo of a cat.", "cat"),
        ("The image features a blue denim jacket.", "blue denim jacket"),
        ("In this picture, there are two dogs.", "two dogs"),
    ],
)
def test_the_subject_is_a_variant_without_its_determiner(caption, subject):
    assert subject in {form for group in caption_variants(caption) for form in group}


@pytest.mark.parametrize("caption", ["sks", "on a table", "   spaced   out  ", "猫が座っている。", "A.", "a", "..."])
def test_a_caption_of_any_kind_keeps_itself_first_and_no_form_is_empty_or_twice(caption):
    forms = [form for group in caption_variants(caption) for form in group]
    assert forms[0] == " ".join(caption.split())
    assert all(forms) and len(forms) == len(set(forms))


@pytest.mark.parametrize("caption", ["It lies on a table.", "There it is, on a table.", "This is it."])
def test_a_pronoun_is_no_subject(caption):
    assert not {"It", "it", "There", "This"} & {form for group in caption_variants(caption) for form in group}


def test_no_clause_ends_within_the_subject():
    forms = {form for group in caption_variants("A red, blue and green shirt on a table, folded.") for form in group}
    assert "A red, blue and green shirt on a table" in forms and "A red" not in forms


def test_the_subject_and_the_first_clause_are_suggested_as_prompts():
    assert suggest_prompts(LONG) == ["denim jeans", "A single pair of denim jeans laid flat on a white background"]
    assert suggest_prompts("denim jeans") == ["denim jeans"]


@pytest.mark.parametrize(
    ("caption", "clause"),
    [
        ("A cat on a mat, at 10:30 in the morning.", "A cat on a mat"),
        ("At 10:30 a cat lies there: it sleeps.", "At 10:30 a cat lies there"),
        ("denim jeans,blue,faded", "denim jeans"),
    ],
)
def test_the_first_clause_of_a_sentence_is_a_variant(caption, clause):
    assert clause in {form for group in caption_variants(caption) for form in group}


@pytest.mark.parametrize("caption", ['A shirt that reads "Hello, world".', "Jeans (blue, faded) on a table."])
def test_no_form_ends_within_quotes_or_brackets_at_a_comma(caption):
    forms = {form for group in caption_variants(caption) for form in group}
    assert not any("Hello" in form or "(blue" in form for form in forms - {caption})


def test_an_abbreviation_within_a_sentence_does_not_end_it():
    assert (
        first_sentence("A shirt of size 3.5 e.g. for children. It is blue.")
        == "A shirt of size 3.5 e.g. for children."
    )


@pytest.mark.parametrize(
    "announcement",
    [
        "Here is a detailed caption:",
        "Here's a short, factual caption in one sentence:",
        "Sure! Here is a caption for the image:",
        "Certainly. Here's a description of the image.",
        "Of course!",
        "Below is a suitable prompt:",
        "Caption:",
        "**Image description:**",
        "A detailed caption for this photo:",
        "The image shows:",
        "Here is your image:",
        "A detailed caption of the image is:",
        "The caption is:",
        "A suitable description could be as follows:",
        "Based on the image, here is a caption:",
        "Sure! From what I can see, the caption would be:",
        "I'd caption this as:",
        "I would describe the image as follows:",
    ],
)
def test_what_announces_a_caption_is_in_no_shorter_variant(announcement):
    caption = f"{announcement} A red car on a road. It is new."
    (whole,), *shorter = caption_variants(caption)
    assert whole == caption and tuple(shorter) == caption_variants("A red car on a road. It is new.")[1:] + (
        ("A red car on a road. It is new.",),
    )
    assert without_announcement(caption) == "A red car on a road. It is new."
    assert first_sentence(caption) == "A red car on a road." and suggest_prompts(caption)[0] == "red car"


@pytest.mark.parametrize(
    "caption",
    [
        "A label with a description: size 40",
        "This is a photo of a cat with a caption: hello",
        "The prompt on the screen reads: white text",
        "From above, a red car: it is new",
        "I am a sign: keep out",
        "A laptop showing a prompt: white text",
        "Caption:",
        "sure-footed goats on a rock",
        "The price tag: a white one",
    ],
)
def test_a_caption_about_captions_is_no_announcement(caption):
    assert without_announcement(caption) == caption


def test_here_is_no_subject():
    assert "red car" in caption_variants("Here is a red car on a road.")[1]

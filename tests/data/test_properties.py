"""What holds of bucket sizes, caption variants, mirrored captions and metadata rows, whatever the input."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.buckets import cropped_fraction, nearest_size
from data.caption_variants import caption_variants
from data.mirroring import mirror_caption
from metadata.image_files import METADATA
from metadata.reading import read_captions
from metadata.writer import write_captions

# The same examples every time, no limit on their time: a failure is a fault of the code and not of a busy machine.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=100, database=None)
repeatable = settings.get_profile("repeatable")

WORDS = """
left right Left RIGHT left-hand rightmost upper-left all just is on of the its over behind angle angled side up way
open untied above next to now foot a an single pair photo denim jeans shirt blue, red seen from There are it lies A.
It. Dr. 3.5 1,000 10:30 (XL) "Hello, world" – 猫 é , . : ; ( ) " ' ! ?
"""
words = st.sampled_from([*WORDS.split(), "\n", "  "])
captions = st.lists(words | st.text(max_size=4), max_size=25).map(" ".join)
# What a caption in metadata.jsonl may be: it has words in it, and no half characters.
written = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)


@repeatable
@given(ratio=st.floats(0.05, 20), steps=st.integers(4, 20), multiple=st.sampled_from([8, 32, 64]))
def test_a_bucket_has_about_the_area_that_was_asked_for_and_sides_that_the_model_takes(ratio, steps, multiple):
    resolution = steps * multiple
    height, width = nearest_size(ratio, resolution, multiple)
    assert height % multiple == width % multiple == 0 and min(height, width) >= multiple
    assert 0.5 < height * width / resolution**2 < 2


@repeatable
@given(ratio=st.floats(0.25, 4), steps=st.integers(4, 20), multiple=st.sampled_from([8, 32, 64]))
def test_a_picture_loses_less_than_one_step_of_its_shorter_side(ratio, steps, multiple):
    size = nearest_size(ratio, steps * multiple, multiple)
    assert 0 <= cropped_fraction(ratio, size) <= multiple / min(size)
    assert cropped_fraction(1 / ratio, size[::-1]) == pytest.approx(cropped_fraction(ratio, size))


@repeatable
@given(captions)
def test_a_caption_is_its_own_first_variant_and_no_variant_is_empty_or_there_twice(caption):
    groups = caption_variants(caption)
    variants = [variant for group in groups for variant in group]
    assert all(groups) and all(variants) and len(variants) == len(set(variants))
    assert variants[:1] == [" ".join(caption.split())] or not caption.split()


@repeatable
@given(captions)
def test_variants_say_nothing_that_the_caption_does_not_say(caption):
    words = " ".join(caption.split())
    first, *others = (variant for group in caption_variants(caption) for variant in group) if words else [""]
    assert first == words
    assert all(is_part_of(variant, words) for variant in others)


def is_part_of(variant: str, caption: str) -> bool:
    """In one piece, or in two: the first sentence and another one."""
    pieces = range(len(variant) + 1)
    return variant in caption or any(variant[:at] in caption and variant[at:] in caption for at in pieces)


@repeatable
@given(captions)
def test_a_caption_mirrored_twice_is_the_caption(caption):
    mirrored = mirror_caption(caption)
    assert mirror_caption(mirrored) == caption
    assert len(mirrored.split()) == len(caption.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(4):
        (folder / f"{number}.jpg").write_bytes(b"a picture")
    return folder


names = st.sampled_from([f"{number}.jpg" for number in range(4)])
rows = st.dictionaries(names, written | st.lists(written, min_size=1, max_size=3), min_size=1)


@repeatable
@given(rows=rows)
def test_captions_that_are_written_are_read_again(folder, rows):
    (folder / METADATA).unlink(missing_ok=True)
    assert write_captions(folder / METADATA, rows) == rows
    assert {row.file_name: row.captions for row in read_captions(folder)} == as_tuples(rows)


@repeatable
@given(
    before=st.dictionaries(names, written, min_size=1),
    spaces=st.sampled_from(["", " ", "  "]),
    end=st.sampled_from(["\n", "\r\n"]),
    ascii_only=st.booleans(),
    new=rows,
    existing=st.sampled_from(["keep", "fill", "replace"]),
)
def test_rows_of_other_pictures_stay_byte_for_byte(folder, before, spaces, end, ascii_only, new, existing):
    """Whatever their spaces, line ends, escapes and further keys; only 'replace' changes a caption."""
    replace = existing == "replace"
    lines = {
        name: json.dumps({"more": [1, {}], "text": text, "file_name": name}, ensure_ascii=ascii_only, separators=(
            f",{spaces}", f":{spaces}"
        ))
        for name, text in before.items()
    }  # fmt: skip
    (folder / METADATA).write_bytes("".join(line + end for line in lines.values()).encode())
    write_captions(folder / METADATA, new, existing)
    after = (folder / METADATA).read_bytes().split(end.encode())
    for number, (name, line) in enumerate(lines.items()):
        if name not in new or not replace:
            assert after[number] == line.encode()
        else:
            assert json.loads(after[number]) == {**json.loads(line), "text": new[name]}
    expected = {**before, **new} if replace else {**new, **before}
    assert {row.file_name: row.captions for row in read_captions(folder)} == as_tuples(expected)


def as_tuples(captions: dict[str, str | list[str]]) -> dict[str, tuple[str, ...]]:
    return {name: (text,) if isinstance(text, str) else tuple(text) for name, text in captions.items()}

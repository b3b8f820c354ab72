"""Caption lengths: captions are cut at the end of a sentence, and counted as training reads them."""

import pytest

from captioning.lengths import cut_words, describe_lengths, load_caption_tokenizer, whole_sentences
from runtime.errors import UserError
from runtime.paths import STARTER


@pytest.mark.parametrize(
    ("text", "most", "cut"),
    [
        ("A pair of jeans. It is blue.", None, "A pair of jeans. It is blue."),
        ("A pair of jeans. It is blue.", 7, "A pair of jeans. It is blue."),
        ("A pair of jeans. It is blue.", 6, "A pair of jeans."),
        ("A pair of jeans. It is blue.", 4, "A pair of jeans."),
        ("A pair of jeans, blue and worn", 4, "A pair of jeans"),
        ("A shirt (red, of silk) on white", 3, "A shirt (red"),
        ("A shirt – red", 3, "A shirt"),
        ("A 3.5 cm button on a shirt", 4, "A 3.5 cm button"),
        ('A shirt with "Yes!" on it. More.', 5, 'A shirt with "Yes!"'),
        ("two  spaces stay", 3, "two  spaces stay"),
    ],
)
def test_a_caption_is_cut_at_a_sentences_end_else_after_a_word_without_a_comma(text, most, cut):
    assert cut_words(text, most) == cut


def test_a_text_without_a_sentence_stays_whole():
    assert whole_sentences("blue jeans") == "blue jeans"
    assert whole_sentences("Blue jeans. They lie") == "Blue jeans."


def test_tokens_are_counted_with_both_marks_and_in_the_chunks_of_training():
    tokenizer = load_caption_tokenizer(str(STARTER))
    line = describe_lengths(tokenizer, ["shirt", "shirt " * 75, "shirt " * 76, "shirt " * 300], 3)
    assert "3 to 302, median 78" in line
    assert "2 in 1 chunk, 1 in 2 chunks, 1 in 3 chunks" in line
    assert line.endswith("cut: 1 (--max_token_chunks)")
    assert "cut" not in describe_lengths(tokenizer, ["shirt"], 3)


def test_a_tokenizer_is_found_in_a_pipeline_and_by_itself_and_its_absence_is_an_error():
    found = [load_caption_tokenizer(str(folder))("shirt").input_ids for folder in (STARTER, STARTER / "tokenizer")]
    assert found[0] == found[1] and len(found[0]) == 3
    for name in ("/no such model", str(STARTER / "unet")):
        with pytest.raises(UserError, match=f"--tokenizer {name}"):
            load_caption_tokenizer(name)

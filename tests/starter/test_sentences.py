"""Attributes in sentences of their own: captions, what is measured of them, and the training of the text encoder."""

import copy

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from transformers import CLIPTextConfig, CLIPTextModel

from measure_base import SENTENCES, in_sentence
from render_garments import COLOURS, sample_spec
from sentences import one_sentence, several_sentences
from teach_sentences import ATTRIBUTES, QUERIES, Readers, Student, random_attributes, reading_loss


def names_colour(text: str, spec) -> bool:
    return spec.colour in text.lower().replace(".", " ").replace(",", " ").split()


def test_one_sentence_and_several_name_the_same_attributes():
    for seed in range(120):
        rng, spec = np.random.default_rng(seed), sample_spec(seed)
        names = random_attributes(rng)
        texts = several_sentences(spec, names, rng, 60), one_sentence(spec, names, rng)
        assert "." not in texts[1]
        if spec.colour not in ("white", "black", spec.second):  # as the background and the marker are
            assert [names_colour(text, spec) for text in texts] == ["colour" in names] * 2, texts
        assert ["square" in text for text in texts] == [bool(spec.marker) and "marker" in names] * 2, texts
        if "kind" not in names:
            assert all(spec.kind not in text.lower().replace("sleeved", "") for text in texts), texts


def test_the_colour_stands_in_any_sentence_of_several():
    spec = sample_spec(7)
    places = set()
    for seed in range(60):
        sentences = several_sentences(spec, set(ATTRIBUTES), np.random.default_rng(seed), 90).split(". ")
        places.update(i for i, sentence in enumerate(sentences) if names_colour(sentence, spec))
    assert {0, 1, 5} <= places


@pytest.mark.parametrize("attribute", ["colour", "kind", "marker"])
@pytest.mark.parametrize("position", SENTENCES)
def test_a_measured_caption_has_nine_sentences_of_which_one_tells_the_attribute(attribute, position):
    for spec, caption in in_sentence(position, attribute, 12):
        sentences = caption.removesuffix(".").split(". ")
        assert len(sentences) == 9
        value = str(getattr(spec, attribute))
        assert value in sentences[position - 1]
        if attribute == "colour" and value != "white":
            assert not {*caption.replace(".", "").split()} & {*COLOURS} - {value, "white"}


def test_readers_give_what_the_cross_attention_of_the_unet_gives():
    torch.manual_seed(0)
    layer = Attention(query_dim=16, cross_attention_dim=12, heads=4, dim_head=4)
    queries, hidden = torch.randn(50, 16), torch.randn(3, 30, 12)
    rows = torch.from_numpy(np.random.default_rng(5).integers(50, size=QUERIES))
    expected = layer(queries[rows].expand(3, -1, -1), encoder_hidden_states=hidden)
    (read,) = Readers([layer], [queries])(hidden, np.random.default_rng(5))
    assert torch.allclose(read, expected, atol=1e-6)
    assert reading_loss([expected], [read]) < 1e-9 < reading_loss([expected], [read + 1])


def test_a_student_goes_on_from_its_state_as_if_it_had_never_stopped():
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, bos_token_id=18
    )
    whole = Student(CLIPTextModel(config))
    parts = copy.deepcopy(whole)
    ids = torch.tensor([[18, 3, 19]])

    def learn(student: Student, steps: int) -> None:
        for _ in range(steps):
            student.trainer.step(student.text(ids)[0].square().mean(), 0.5)

    learn(whole, 4)
    learn(parts, 2)
    resumed = Student(CLIPTextModel(config))
    resumed.load(parts.state())
    learn(resumed, 2)
    assert resumed.trainer.steps == 4
    for one, other in ((whole.text, resumed.text), (whole.averaged(), resumed.averaged())):
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)

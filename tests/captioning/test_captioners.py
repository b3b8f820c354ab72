"""Captioners: every family of models is prompted and decoded as its makers mean it; all weights are random."""

from pathlib import Path

import pytest
import torch
from transformers import (
    Blip2ForConditionalGeneration,
    BlipForConditionalGeneration,
    Florence2ForConditionalGeneration,
    Idefics3ForConditionalGeneration,
    LlavaForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
)

import tiny_captioners
from captioning.captioner_loading import load_captioner
from captioning.captioners import Chat
from runtime.errors import UserError, WorkError

CHATS = {
    "llava": (tiny_captioners.make_llava, LlavaForConditionalGeneration),
    "qwen": (tiny_captioners.make_qwen, Qwen2_5_VLForConditionalGeneration),
    "idefics3": (tiny_captioners.make_idefics3, Idefics3ForConditionalGeneration),
}
FAMILIES = {
    "blip": (tiny_captioners.make_blip, BlipForConditionalGeneration),
    "blip2-opt": (tiny_captioners.make_blip2, Blip2ForConditionalGeneration),
    "blip2-t5": (lambda folder: tiny_captioners.make_blip2(folder, True), Blip2ForConditionalGeneration),
    "florence2": (tiny_captioners.make_florence2, Florence2ForConditionalGeneration),
    **CHATS,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`folder(name)` is that family's model, made once."""
    root = tmp_path_factory.mktemp("captioners")

    def find(name: str) -> Path:
        return root / name if (root / name).exists() else FAMILIES[name][0](root / name)

    return find


def prompt_of(captioner) -> str:
    """The words that reach the model with a picture."""
    tokens = captioner.prepare_inputs(tiny_captioners.pictures()[:1])["input_ids"][0]
    return " ".join(captioner.processor.tokenizer.convert_ids_to_tokens(tokens.tolist()))


def words_of(captioner, text: str) -> str:
    return " ".join(captioner.processor.tokenizer.tokenize(text))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_found_from_the_config_and_a_batch_has_the_captions_of_single_pictures(folder, name):
    captioner = load_captioner(str(folder(name)), max_new_tokens=8)
    assert type(captioner.model) is FAMILIES[name][1] and captioner.model.dtype == torch.float32
    pictures = tiny_captioners.pictures()
    together = captioner.caption(pictures)
    assert together == [captioner.caption([picture])[0] for picture in pictures]
    assert len(set(together)) > 1, "the captions do not depend on the picture, so this test shows nothing"
    assert together == captioner.caption(pictures)


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("prompt", [None, "Question: what is it? Answer:"])
def test_a_chat_model_is_prompted_in_its_own_template_and_the_prompt_is_not_in_the_caption(folder, name, prompt):
    captioner = load_captioner(str(folder(name)), prompt, 8)
    question = words_of(captioner, prompt or Chat.default_prompt)
    heard = prompt_of(captioner)
    assert question in heard and "<unk>" not in question
    assert heard.startswith("<s> USER :") and heard.endswith("ASSISTANT :") and heard.count("<s>") == 1
    for caption in captioner.caption(tiny_captioners.pictures()):
        assert "USER" not in caption.split()[:1] and question not in caption and len(caption.split()) <= 8


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5"])
def test_blip2s_prompt_reaches_it_and_is_not_in_the_caption(folder, name):
    captioner = load_captioner(str(folder(name)), tiny_captioners.QUESTION, 8)
    assert prompt_of(captioner).endswith(words_of(captioner, tiny_captioners.QUESTION))
    pictures = tiny_captioners.pictures()
    captions = captioner.caption(pictures)
    assert not any("Question : what" in caption for caption in captions)
    assert captions == [captioner.caption([picture])[0] for picture in pictures]
    assert captions != load_captioner(str(folder(name)), None, 8).caption(pictures)


def test_florence_is_given_its_task_and_nothing_else_is_accepted(folder):
    task = "Describe with a paragraph what is shown in the image."
    captioner = load_captioner(str(folder("florence2")), None, 8)
    assert captioner.prompt == "<MORE_DETAILED_CAPTION>" and words_of(captioner, task) in prompt_of(captioner)
    captions = captioner.caption(tiny_captioners.pictures())
    assert not any("<" in caption or "Describe with" in caption for caption in captions)
    assert load_captioner(str(folder("florence2")), "<CAPTION>").prompt == "<CAPTION>"
    with pytest.raises(UserError, match="--prompt 'what is it.*<MORE_DETAILED_CAPTION>"):
        load_captioner(str(folder("florence2")), "what is it?")


def test_florences_padding_is_not_in_the_caption(folder):
    captioner = load_captioner(str(folder("florence2")), None, 8)
    tokenizer = captioner.processor.tokenizer
    said = torch.tensor([[2, 0, *tokenizer.convert_tokens_to_ids(["a", "blue"]), 2, 1, 1]])
    assert captioner.decode_captions({}, said) == ["a blue"]


def test_a_prompt_is_how_blips_caption_begins(tmp_path):
    captioner = load_captioner(str(tiny_captioners.make_blip(tmp_path / "blip", "blue")), "a photograph of", 1)
    assert captioner.caption(tiny_captioners.pictures()[:2]) == ["a photograph of blue"] * 2


def test_reasoning_and_unfinished_sentences_of_a_chat_model_are_not_in_the_caption(folder, monkeypatch):
    captioner = load_captioner(str(folder("llava")), None, 8)
    unended, ended = [7, 7], [7, 2]
    said = {
        '"A blue shirt."': (ended, "A blue shirt."),
        '"Yes" stands beside "no"': (ended, '"Yes" stands beside "no"'),
        "A blue shirt. It lies on": (unended, "A blue shirt."),
        "It is a shirt.</think> A shirt": (ended, "A shirt"),
        "<think>It is a shirt. It": (unended, ""),
    }
    tokens = torch.tensor([end for end, _ in said.values()])
    monkeypatch.setattr(type(captioner), "decode", lambda *_, **__: list(said))
    assert captioner.decode_captions({}, tokens) == [caption for _, caption in said.values()]
    captioner.processor.chat_template += "<think>"
    assert captioner.decode_captions({}, tokens) == [
        "",
        "",
        "",
        "A shirt",
        "",
    ]  # the others have not come to an answer
    assert "--max_new_tokens" in captioner.no_caption_message


def test_a_batch_that_is_too_large_for_the_memory_is_captioned_in_parts(folder, monkeypatch):
    captioner = load_captioner(str(folder("blip")), max_new_tokens=8)
    pictures, generate, sizes = tiny_captioners.pictures(), captioner.model.generate, []
    alone = [captioner.caption([picture])[0] for picture in pictures]

    def small(pixel_values, most=1, **settings):
        sizes.append(len(pixel_values))
        if len(pixel_values) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(pixel_values=pixel_values, **settings)

    monkeypatch.setattr(captioner.model, "generate", small)
    assert captioner.caption(pictures) == alone and sizes == [4, 2, 1, 1, 1, 1]
    assert captioner.caption(pictures) == alone and sizes[6:] == [1, 1, 1, 1]  # what it has learnt
    monkeypatch.setattr(captioner.model, "generate", lambda **inputs: small(**inputs, most=0))
    with pytest.raises(WorkError, match="not enough memory for a single picture"):
        captioner.caption(pictures)


def test_florence_uses_as_many_beams_as_its_own_config_says(folder, monkeypatch):
    settings = {}
    for name in ("florence2", "blip"):
        captioner = load_captioner(str(folder(name)), None, 4)
        generate = captioner.model.generate
        monkeypatch.setattr(
            captioner.model, "generate", lambda own=generate, **given: settings.update(given) or own(**given)
        )
        captioner.caption(tiny_captioners.pictures()[:1])
        assert settings.pop("do_sample") is False and settings.pop("num_beams", "its own") == (
            "its own" if name == "florence2" else 1
        )

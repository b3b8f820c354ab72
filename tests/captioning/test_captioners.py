"""captioners.py: every family of models is found, asked and read as its makers mean it; all weights are random."""

import json
import shutil
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
from captioning import captioners
from captioning.captioners import Chat, load_captioner
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


def asked(captioner) -> str:
    """The words that reach the model with a picture."""
    tokens = captioner.ask(tiny_captioners.pictures()[:1])["input_ids"][0]
    return " ".join(captioner.processor.tokenizer.convert_ids_to_tokens(tokens.tolist()))


def words_of(captioner, text: str) -> str:
    return " ".join(captioner.processor.tokenizer.tokenize(text))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_found_from_the_config_and_a_batch_says_what_single_pictures_say(folder, name):
    captioner = load_captioner(str(folder(name)), max_new_tokens=8)
    assert type(captioner.model) is FAMILIES[name][1] and captioner.model.dtype == torch.float32
    pictures = tiny_captioners.pictures()
    together = captioner.describe(pictures)
    assert together == [captioner.describe([picture])[0] for picture in pictures]
    assert len(set(together)) > 1, "what it says does not depend on the picture, so this test shows nothing"
    assert together == captioner.describe(pictures)


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("prompt", [None, "Question: what is it? Answer:"])
def test_a_chat_model_is_asked_in_its_own_template_and_the_question_is_not_in_the_caption(folder, name, prompt):
    captioner = load_captioner(str(folder(name)), prompt, 8)
    question = words_of(captioner, prompt or Chat.usual_prompt)
    heard = asked(captioner)
    assert question in heard and "<unk>" not in question
    assert heard.startswith("<s> USER :") and heard.endswith("ASSISTANT :") and heard.count("<s>") == 1
    for caption in captioner.describe(tiny_captioners.pictures()):
        assert "USER" not in caption.split()[:1] and question not in caption and len(caption.split()) <= 8


@pytest.mark.parametrize("name", ["blip2-opt", "blip2-t5"])
def test_blip2s_question_reaches_it_and_is_not_in_the_caption(folder, name):
    captioner = load_captioner(str(folder(name)), tiny_captioners.QUESTION, 8)
    assert asked(captioner).endswith(words_of(captioner, tiny_captioners.QUESTION))
    pictures = tiny_captioners.pictures()
    captions = captioner.describe(pictures)
    assert not any("Question : what" in caption for caption in captions)
    assert captions == [captioner.describe([picture])[0] for picture in pictures]
    assert captions != load_captioner(str(folder(name)), None, 8).describe(pictures)


def test_florence_is_given_its_task_and_nothing_else_is_accepted(folder):
    task = "Describe with a paragraph what is shown in the image."
    captioner = load_captioner(str(folder("florence2")), None, 8)
    assert captioner.prompt == "<MORE_DETAILED_CAPTION>" and words_of(captioner, task) in asked(captioner)
    captions = captioner.describe(tiny_captioners.pictures())
    assert not any("<" in caption or "Describe with" in caption for caption in captions)
    assert load_captioner(str(folder("florence2")), "<CAPTION>").prompt == "<CAPTION>"
    with pytest.raises(UserError, match="--prompt 'what is it.*<MORE_DETAILED_CAPTION>"):
        load_captioner(str(folder("florence2")), "what is it?")


def test_florence_fills_up_a_batch_with_nothing_that_is_read(folder):
    captioner = load_captioner(str(folder("florence2")), None, 8)
    tokenizer = captioner.processor.tokenizer
    said = torch.tensor([[2, 0, *tokenizer.convert_tokens_to_ids(["a", "blue"]), 2, 1, 1]])
    assert captioner.read({}, said) == ["a blue"]


def test_a_prompt_is_how_blips_caption_begins(tmp_path):
    captioner = load_captioner(str(tiny_captioners.make_blip(tmp_path / "blip", "blue")), "a photograph of", 1)
    assert captioner.describe(tiny_captioners.pictures()[:2]) == ["a photograph of blue"] * 2


def test_what_a_chat_model_thought_or_left_unfinished_is_not_in_the_caption(folder, monkeypatch):
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
    assert captioner.read({}, tokens) == [caption for _, caption in said.values()]
    captioner.processor.chat_template += "<think>"
    assert captioner.read({}, tokens) == ["", "", "", "A shirt", ""]  # the others have not come to an answer
    assert "--max_new_tokens" in captioner.no_words


def test_a_batch_that_a_gpu_has_no_memory_for_is_described_in_parts(folder, monkeypatch):
    captioner = load_captioner(str(folder("blip")), max_new_tokens=8)
    pictures, generate, sizes = tiny_captioners.pictures(), captioner.model.generate, []
    alone = [captioner.describe([picture])[0] for picture in pictures]

    def small(pixel_values, most=1, **settings):
        sizes.append(len(pixel_values))
        if len(pixel_values) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(pixel_values=pixel_values, **settings)

    monkeypatch.setattr(captioner.model, "generate", small)
    assert captioner.describe(pictures) == alone and sizes == [4, 2, 1, 1, 1, 1]
    assert captioner.describe(pictures) == alone and sizes[6:] == [1, 1, 1, 1]  # what it has learnt
    monkeypatch.setattr(captioner.model, "generate", lambda **inputs: small(**inputs, most=0))
    with pytest.raises(WorkError, match="not enough memory for a single picture"):
        captioner.describe(pictures)


@pytest.mark.parametrize("fails_in", ["from_pretrained", "to"])
def test_a_model_that_does_not_fit_into_the_memory_is_one_line(folder, monkeypatch, fails_in):
    def too_large(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(BlipForConditionalGeneration, fails_in, too_large)
    with pytest.raises(WorkError, match="^--model .*blip does not fit into the memory"):
        load_captioner(str(folder("blip")))


def test_pickles_are_read_only_when_asked_for(folder, tmp_path):
    pickled = shutil.copytree(folder("llava"), tmp_path / "pickled")
    model = LlavaForConditionalGeneration.from_pretrained(pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match="--allow_pickle"):
        load_captioner(str(pickled))
    assert load_captioner(str(pickled), allow_pickle=True).describe(tiny_captioners.pictures()[:1])


def config_folder(folder: Path, **config: object) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_florence_with_code_of_its_own_is_refused_with_the_name_of_the_one_that_works(tmp_path):
    own = {"AutoModelForCausalLM": "modeling_florence2.Florence2ForConditionalGeneration"}
    name = config_folder(tmp_path / "Florence-2-large", model_type="florence2", auto_map=own)
    for trusting in (False, True):
        with pytest.raises(UserError, match="florence-community/Florence-2-large"):
            load_captioner(name, trust_remote_code=trusting)


def test_code_that_comes_with_a_model_runs_only_by_flag(tmp_path):
    name = config_folder(tmp_path / "own", model_type="own", auto_map={"AutoConfig": "own.OwnConfig"})
    (tmp_path / "own" / "own.py").write_text("open('/proc/self/comm').read()\nraise OSError('it has run')")
    with pytest.raises(UserError, match="code of its own; --trust_remote_code runs it"):
        load_captioner(name)
    with pytest.raises(UserError, match="it has run"):
        load_captioner(name, trust_remote_code=True)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"model_type": "clip"}, "'clip', which captions no pictures"),
        ({"model_type": "llama"}, "'llama', which captions no pictures"),
        ({"model_type": "blip", "architectures": ["BlipForQuestionAnswering"]}, "'BlipForQuestionAnswering', which"),
        ({"model_type": "no such type"}, "cannot load a captioner"),
        ({}, "cannot load a captioner"),
    ],
)
def test_a_model_of_another_kind_is_refused(tmp_path, config, complaint):
    with pytest.raises(UserError, match=complaint):
        load_captioner(config_folder(tmp_path / "model", **config))


def test_a_model_without_a_chat_template_is_refused_before_its_weights_are_read(folder, tmp_path):
    silent = shutil.copytree(folder("llava"), tmp_path / "silent")
    (silent / "chat_template.jinja").unlink()
    (silent / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="has no chat template"):
        load_captioner(str(silent))


def test_a_chat_template_in_the_tokenizer_alone_will_do(folder, tmp_path):
    other = shutil.copytree(folder("llava"), tmp_path / "other")
    template = (other / "chat_template.jinja").read_text()
    (other / "chat_template.jinja").unlink()
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    pictures = tiny_captioners.pictures()
    expected = load_captioner(str(folder("llava")), None, 8).describe(pictures)
    assert load_captioner(str(other), None, 8).describe(pictures) == expected


def test_a_chat_template_that_cannot_be_used_is_one_line(folder, tmp_path):
    other = shutil.copytree(folder("llava"), tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ raise_exception('only text') }}")
    with pytest.raises(UserError, match="cannot load a captioner from --model .*other: only text"):
        load_captioner(str(other))


def test_florence_searches_with_as_many_beams_as_its_own_settings_say(folder, monkeypatch):
    settings = {}
    for name in ("florence2", "blip"):
        captioner = load_captioner(str(folder(name)), None, 4)
        generate = captioner.model.generate
        monkeypatch.setattr(
            captioner.model, "generate", lambda own=generate, **given: settings.update(given) or own(**given)
        )
        captioner.describe(tiny_captioners.pictures()[:1])
        assert settings.pop("do_sample") is False and settings.pop("num_beams", "its own") == (
            "its own" if name == "florence2" else 1
        )


@pytest.mark.parametrize(
    ("name", "said", "advice"),
    [
        (
            "google/gemma",
            "Access to it is gated.",
            "terms on https://huggingface.co/google/gemma, then `hf auth login`",
        ),
        ("google/gemma", "x\n401 Client Error: Unauthorized", "`hf auth login`"),
        ("google/gemma", "403 Client Error: Forbidden", "`hf auth login`"),
        ("google/gemma", "no connection to 140.131.1.1", "`hf download google/gemma`"),
        ("models/of mine", "not found", "no such folder, and a model of the hub is named owner/name"),
        ("./models/blip", "not found", "no such folder, and a model of the hub is named owner/name"),
    ],
)
def test_the_advice_suits_the_reason_why_a_model_cannot_be_had(monkeypatch, name, said, advice):
    def refuse(*_, **__):
        raise OSError(said)

    monkeypatch.setattr(captioners.PretrainedConfig, "get_config_dict", refuse)
    with pytest.raises(UserError) as caught:
        load_captioner(name)
    assert advice in str(caught.value)
    assert ("hf download" in str(caught.value)) == ("hf download" in advice)


def test_without_internet_it_is_said_how_to_get_a_model(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="hf download some/captioner.*CAPTIONER=some/captioner bash job.sh setup"):
        load_captioner("some/captioner")
    with pytest.raises(UserError, match="--model /no such folder"):
        load_captioner("/no such folder")

"""Loading a captioner: what is refused before its weights are read, and the advice where it cannot be had."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import BlipForConditionalGeneration, LlavaForConditionalGeneration

import tiny_captioners
from captioning import captioner_loading
from captioning.captioner_loading import load_captioner
from runtime.errors import UserError, WorkError


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    return tiny_captioners.make_llava(tmp_path_factory.mktemp("models") / "llava")


@pytest.mark.parametrize("fails_in", ["from_pretrained", "to"])
def test_a_model_that_does_not_fit_into_the_memory_is_one_line(tmp_path, monkeypatch, fails_in):
    def too_large(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    blip = tiny_captioners.make_blip(tmp_path / "blip")
    monkeypatch.setattr(BlipForConditionalGeneration, fails_in, too_large)
    with pytest.raises(WorkError, match="^--model .*blip does not fit into the memory"):
        load_captioner(str(blip))


def test_pickles_are_read_only_when_asked_for(llava, tmp_path):
    pickled = shutil.copytree(llava, tmp_path / "pickled")
    model = LlavaForConditionalGeneration.from_pretrained(pickled)
    (pickled / "model.safetensors").unlink()
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match="--allow_pickle"):
        load_captioner(str(pickled))
    assert load_captioner(str(pickled), allow_pickle=True).caption(tiny_captioners.pictures()[:1])


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
        ({"model_type": "clip"}, "'clip', which does not caption pictures"),
        ({"model_type": "llama"}, "'llama', which does not caption pictures"),
        ({"model_type": "blip", "architectures": ["BlipForQuestionAnswering"]}, "'BlipForQuestionAnswering', which"),
        ({"model_type": "no such type"}, "cannot load a captioner"),
        ({}, "cannot load a captioner"),
    ],
)
def test_a_model_of_another_kind_is_refused(tmp_path, config, complaint):
    with pytest.raises(UserError, match=complaint):
        load_captioner(config_folder(tmp_path / "model", **config))


def test_a_model_without_a_chat_template_is_refused_before_its_weights_are_read(llava, tmp_path):
    silent = shutil.copytree(llava, tmp_path / "silent")
    (silent / "chat_template.jinja").unlink()
    (silent / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="has no chat template"):
        load_captioner(str(silent))


def test_a_chat_template_in_the_tokenizer_alone_will_do(llava, tmp_path):
    other = shutil.copytree(llava, tmp_path / "other")
    template = (other / "chat_template.jinja").read_text()
    (other / "chat_template.jinja").unlink()
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    pictures = tiny_captioners.pictures()
    expected = load_captioner(str(llava), None, 8).caption(pictures)
    assert load_captioner(str(other), None, 8).caption(pictures) == expected


def test_a_chat_template_that_cannot_be_used_is_one_line(llava, tmp_path):
    other = shutil.copytree(llava, tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ raise_exception('only text') }}")
    with pytest.raises(UserError, match="cannot load a captioner from --model .*other: only text"):
        load_captioner(str(other))


@pytest.mark.parametrize(
    ("name", "said", "advice"),
    [
        ("google/gemma", "no connection to 140.131.1.1", "`hf download google/gemma`"),
        ("models/of mine", "not found", "no such folder, and a model of the hub is named owner/name"),
        ("./models/blip", "not found", "no such folder or file"),
    ],
)
def test_the_advice_suits_the_reason_why_a_model_cannot_be_had(monkeypatch, name, said, advice):
    def refuse(*_, **__):
        raise OSError(said)

    monkeypatch.setattr(captioner_loading.PretrainedConfig, "get_config_dict", refuse)
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

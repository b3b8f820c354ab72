"""The card of an uploaded result says what it is, and its code can be pasted."""

import ast
import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from runs.model_card import is_generated_card, make_model_card

RUN = {
    "base_model": "stable-diffusion-v1-5/stable-diffusion-v1-5", "trained": "UNet", "seed": 7, "steps": 600,
    "mixed_precision": "bf16", "sizes": [{"height": 576, "width": 448, "pictures": 3}],
    "example_prompts": ['a "blue" pair of jeans'], "arguments": {"learning_rate": 1e-5, "use_ema": True, "repeats": 1},
}  # fmt: skip


@pytest.fixture
def card_of(tmp_path):
    def write(**changes) -> str:
        (tmp_path / "run.json").write_text(json.dumps(RUN | changes))
        return make_model_card(tmp_path, "me/jeans")

    return write


def code_of(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


def test_the_card_names_the_base_and_settings_and_has_code_that_runs(card_of):
    card = card_of()
    data = ModelCard(card).data
    assert data.base_model == RUN["base_model"] and data.pipeline_tag == "text-to-image"
    assert "| learning_rate | 1e-05 |" in card and "| steps | 600 |" in card and "3 captioned pictures" in card
    ast.parse(code_of(card))
    assert 'from_pretrained("me/jeans"' in code_of(card) and "![" not in card


def test_a_loras_card_loads_it_on_its_base(card_of):
    card = card_of(trained="LoRA of rank 16")
    assert f'from_pretrained("{RUN["base_model"]}"' in card and 'load_lora_weights("me/jeans")' in card
    assert "lora" in ModelCard(card).data.tags


def test_a_prompt_with_quotes_is_a_valid_string_in_the_code(card_of):
    prompt = "\U0001f456 'blue' \"jeans\"\n\\ faded"
    called = ast.parse(code_of(card_of(example_prompts=[prompt])))
    assert prompt in [node.value for node in ast.walk(called) if isinstance(node, ast.Constant)]


def test_a_card_without_the_mark_is_not_a_generated_one(card_of, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(card_of(), encoding="utf-8")
    assert is_generated_card(path)
    path.write_text("# My jeans\n")
    assert not is_generated_card(path)


def test_epochs_are_left_out_where_max_train_steps_overrides_them(card_of):
    card = card_of(arguments={"epochs": 100, "max_train_steps": 50, "trigger": "a|b\nc"})
    assert "| epochs |" not in card_of(arguments={"epochs": 100, "samples": 4800})
    assert "| epochs |" not in card and "| max_train_steps | 50 |" in card and r"| trigger | a\|b c |" in card


def test_a_base_on_this_machine_is_named_without_its_path(card_of, tmp_path):
    card = card_of(base_model=str(tmp_path / "my base"))
    assert str(tmp_path) not in card and "**my base**" in card and ModelCard(card).data.base_model is None
    lora = card_of(base_model=str(tmp_path / "my base"), trained="LoRA of rank 16")
    assert 'from_pretrained("/path/to/my base"' in lora and str(tmp_path) not in lora


def test_the_last_validation_images_are_shown(card_of, tmp_path: Path):
    (tmp_path / "validation").mkdir()
    for name in ("step-000010-0.png", "step-000020-0.png", "step-000020-1.png"):
        (tmp_path / "validation" / name).touch()
    assert re.findall(r"validation/(\S+)\)", card_of()) == ["step-000020-0.png", "step-000020-1.png"]

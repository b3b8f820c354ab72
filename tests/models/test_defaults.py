"""Defaults from a model's folder: flags win over the file, the file wins over the script, mistakes in it are named."""

import json

import pytest

from models.defaults import merge_defaults, recommended_guidance_scale
from runtime.errors import UserError
from runtime.flags import FlagParser, YesNo, given_flags, positive_float


@pytest.fixture
def merged(tmp_path):
    def merge(values: object, *argv: str):
        parser = FlagParser("script.py", "A script.", "")
        parser.add_argument("--learning_rate", type=positive_float, default=1e-5)
        parser.add_argument("--max_grad_norm", type=positive_float, default=1.0)
        parser.add_argument("--use_ema", action=YesNo, default=False)
        parser.add_argument("--prior_prompts", action="append")
        parser.add_argument("--validation_prompts", nargs="+", action="extend")
        parser.add_argument("--output_dir")
        file = tmp_path / "training_defaults.json"
        file.write_text(values if isinstance(values, str) else json.dumps(values))
        return merge_defaults(parser, given_flags(parser, argv), file, {"output_dir"})

    return merge


def test_flags_win_over_the_file_and_the_file_over_the_script(merged):
    args = merged({"learning_rate": 3e-4, "use_ema": True}, "--learning_rate", "2e-4")
    assert (args.learning_rate, args.use_ema, args.max_grad_norm) == (2e-4, True, 1.0)
    assert args.origins["learning_rate"] == "flag"
    assert args.origins["use_ema"] == "training_defaults.json"
    assert args.origins["max_grad_norm"] == "default"


def test_a_flag_turns_off_what_the_file_turns_on(merged):
    assert merged({"use_ema": True}, "--no_use_ema").use_ema is False


def test_flags_replace_a_list_in_the_file(merged):
    assert merged({"prior_prompts": ["a shirt", "a skirt"]}).prior_prompts == ["a shirt", "a skirt"]
    assert merged({"prior_prompts": ["a shirt"]}, "--prior_prompts", "a hat").prior_prompts == ["a hat"]


def test_a_list_in_the_file_is_used_whole_for_a_flag_of_several_values(merged):
    assert merged({"validation_prompts": ["a shirt", "a skirt"]}).validation_prompts == ["a shirt", "a skirt"]
    several = ["--validation_prompts", "a", "b"]
    assert merged({"validation_prompts": ["a shirt"]}, *several).validation_prompts == ["a", "b"]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"learning_rat": 1}, "learning_rat"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"learning_rate": -1}, "learning_rate"),
        ({"use_ema": 3}, "use_ema"),
        ({"output_dir": "/etc"}, "output_dir"),
        (["learning_rate"], "one JSON object"),
        ("{", "not readable as JSON"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_the_file(merged, values, named):
    with pytest.raises(UserError, match=rf"training_defaults\.json.*{named}"):
        merged(values)


def test_the_guidance_scale_is_the_models_or_the_usual_one(tmp_path):
    assert recommended_guidance_scale(tmp_path) is None
    (tmp_path / "generation_defaults.json").write_text('{"guidance_scale": 4}')
    assert recommended_guidance_scale(tmp_path) == 4


@pytest.mark.parametrize("value", ['"much"', "-1", "null"])
def test_a_wrong_guidance_scale_is_named_with_its_file(tmp_path, value):
    (tmp_path / "generation_defaults.json").write_text(f'{{"guidance_scale": {value}}}')
    with pytest.raises(UserError, match="generation_defaults.json: guidance_scale"):
        recommended_guidance_scale(tmp_path)

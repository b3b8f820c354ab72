"""The page of a run and the example pictures as training makes them: by default, on the way, stopped and resumed."""

import json
import re
import shutil
from html import unescape
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageOps

from optimization.ema import NoEMA
from run_folder import losses, weights
from runs.commands import resume_command
from runs.validation_pictures import list_pictures, read_picture
from runtime.errors import Stopped
from train_text_to_image import parse_args
from training.summary import _settings as settings_of
from training.validation import Validator, affordable_steps

DEFAULTS = ["--validation_pictures", "--report"]  # which the fixture `train_run` turns off
USUAL = ["--max_train_steps", 4, "--learning_rate", 1e-3, "--seed", 0]


class StopAfter:
    """In the place of StopSignals: asked to stop once step 2 is done."""

    def __init__(self, run_folder):
        self.folder, self.note_saved = run_folder, lambda *_: None

    @property
    def asked(self):
        rows = self.folder / "metrics.jsonl"
        return rows.is_file() and len(rows.read_text().splitlines()) >= 1

    def exception_after(self, step, steps):
        return Stopped(f"SIGTERM: stopped after step {step} of {steps}")

    def defer(self):
        pass

    raise_at_once = defer


@pytest.mark.usefixtures("few_sampling_steps")
def test_pictures_and_page_change_no_weight_and_a_resumed_run_has_one_curve_and_one_page(
    train_run, tmp_path, monkeypatch
):
    """Three runs: some seconds."""
    monkeypatch.setattr("training.validation.MEASURING_SHARE", 2.0)  # measures and pictures after every step
    plain = train_run("plain", *USUAL)
    with pytest.raises(Stopped):
        train_run("out", *USUAL, *DEFAULTS, stop=StopAfter(tmp_path / "out"))
    stopped = (tmp_path / "out" / "report.html").read_text()
    assert "stopped" in stopped and "SIGTERM: stopped after step 2 of 4" in stopped
    assert "--max_train_steps 4" in stopped and "--learning_rate 0.001" in stopped  # the command that goes on
    (tmp_path / "out" / ".lock").unlink()  # ours until this process ends
    out = train_run("out", *USUAL, *DEFAULTS)
    assert all(torch.equal(weights(plain)[name], tensor) for name, tensor in weights(out).items())
    assert losses(out) == losses(plain)
    page, record = (out / "report.html").read_text(), json.loads((out / "run.json").read_text())
    assert "finished" in page and [start["after_step"] for start in record["starts"]] == [0, 2]
    assert "after step 2" in page and "from the base" in page and "steps</dt><dd>4" in page.lower()
    shown = [read_picture(path) for path in list_pictures(out)]
    prompts = record["example_prompts"][:2]
    assert [(p.step, p.prompt) for p in shown] == [(step, prompt) for step in range(5) for prompt in prompts]
    assert page.count('src="data:image/jpeg') == 5 * 2 + 3  # and the data set


@pytest.mark.usefixtures("few_sampling_steps")
def test_a_lora_has_a_page_and_without_pictures_it_has_none_of_them(train_run):
    out = train_run("out", *USUAL, "--lora_rank", 2, "--report")
    page = (out / "report.html").read_text()
    assert "LoRA of rank 2" in page and "export_checkpoint.py" in page and "What it generates" not in page


def test_nobody_needs_the_page_or_the_pictures_and_an_earlier_start_leaves_no_page_either(train_run, tmp_path):
    with pytest.raises(Stopped):
        train_run("out", *USUAL, "--report", stop=StopAfter(tmp_path / "out"))
    assert (tmp_path / "out" / "report.html").exists()
    (tmp_path / "out" / ".lock").unlink()  # ours until this process ends
    out = train_run("out", *USUAL)
    assert not (out / "report.html").exists() and not (out / "validation").exists()


def test_what_is_not_installed_costs_the_page_alone(train_run, monkeypatch, capsys):
    def missing(*_, **__):
        raise ModuleNotFoundError("No module named 'matplotlib'")

    monkeypatch.setattr("reporting.charts._matplotlib", missing)
    out = train_run("out", *USUAL, "--report")
    assert (out / "unet").is_dir() and not (out / "report.html").exists()
    assert capsys.readouterr().err.count("pip install Jinja2 matplotlib") == 1


def test_the_command_that_goes_on_and_the_settings_hold_no_token():
    given = ["--dataset", "my jeans", "--hub_token", "hf_secret", "--push_to_hub", "--no_short_captions",
             "--overwrite", "--validation_prompts", "a b", "c"]  # fmt: skip
    args = parse_args(given)
    command = resume_command(args, 1)
    assert "hf_secret" not in command and "hf_secret" not in str(settings_of(args))
    words = command.split("train_text_to_image.py ")[1]
    assert words == (
        "--dataset 'my jeans' --no_short_captions --validation_prompts 'a b' --validation_prompts c --push_to_hub"
    )
    assert resume_command(args, 4).startswith("accelerate launch --num_processes 4 ")


def test_several_data_sets_are_all_in_the_command_and_the_settings():
    args = parse_args(["--dataset", "a", "--dataset", "my jeans"])
    assert resume_command(args, 1).endswith(" --dataset a --dataset 'my jeans'")
    assert ("--dataset", "a · my jeans", "flag") in settings_of(args)


@pytest.mark.usefixtures("few_sampling_steps")
def test_the_page_tells_two_folders_pictures_apart_and_names_masks_repeats_and_cut_captions(
    train_run, captioned_folder, tmp_path
):
    first, second = captioned_folder, tmp_path / "second"
    shutil.copytree(first, second)
    picture = json.loads((second / "metadata.jsonl").read_text().splitlines()[0])
    with Image.open(second / picture["file_name"]) as image:
        Image.new("L", image.size, "white").save((second / picture["file_name"]).with_suffix(".mask.png"))
        ImageOps.invert(image.convert("RGB")).save(second / picture["file_name"])
    picture |= {"text": "red jeans " * 300, "repeats": 3}
    (second / "metadata.jsonl").write_text(json.dumps(picture) + "\n")
    out = train_run("out", *USUAL, "--dataset", second, "--report")
    page = unescape((out / "report.html").read_text())
    [header] = re.findall(r"trained on (.*?)</p>", page)
    assert first.name in header and second.name in header
    name = f"{second.name}/{picture['file_name']}"
    assert f"<h3><bdi>{name}</bdi>" in page and f"CUT at 225 tokens: {name}" in page
    assert page.count(">masked</span>") == page.count(">repeats 3</span>") == 1


# --- which steps have example pictures ------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "found"), [(4, {4}), (200, {0, 200}), (1200, {0, 300, 600, 900, 1200})])
def test_example_pictures_cost_at_most_a_tenth_but_the_last_are_always_there(steps, found):
    measured = {steps // 4, steps // 2, 3 * steps // 4, steps}
    assert affordable_steps(steps, 4, 2, measured) == found


def test_a_device_without_memory_for_example_pictures_goes_on_without_but_not_for_those_that_were_asked_for(capsys):
    def no_memory(unet, step):
        raise torch.OutOfMemoryError("CUDA out of memory")

    accelerator = SimpleNamespace(is_main_process=True)
    weights = SimpleNamespace(parameters=[], sync_to_model=lambda: None)
    state = SimpleNamespace(accelerator=accelerator, ema=NoEMA(), weights=weights, unwrapped=None)
    sampler = SimpleNamespace(generate=no_memory, asked=False)
    validator = Validator(state, None, sampler, set(), {2, 4})
    paused = torch.no_grad  # any context
    assert validator.generate(2, paused) == [] and validator.generate(4, paused) == []
    assert len(re.findall("memory", capsys.readouterr().out)) == 1
    asked = Validator(state, None, SimpleNamespace(generate=no_memory, asked=True), set(), {2})
    with pytest.raises(torch.OutOfMemoryError):
        asked.generate(2, paused)

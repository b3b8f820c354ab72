"""inference.py as it is used: files, names, sizes, seeds, and pictures that plain diffusers draws as well."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image

import inference
from errors import UserError
from generating import generate
from inference import parse_args
from models import load_noise_scheduler, load_unet, save_pipeline

SCRIPT = Path(inference.__file__)
QUICK = ["--steps", "3", "--guidance_scale", "4"]


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory) -> Path:
    """A folder as training leaves it."""
    folder = tmp_path_factory.mktemp("output") / "garments-12345678"
    folder.mkdir()
    save_pipeline(load_unet(tiny_model), tiny_model, folder, load_noise_scheduler(tiny_model))
    sizes = [{"height": 48, "width": 80, "pictures": 1}, {"height": 72, "width": 56, "pictures": 3}]
    run = {"finished": True, "finished_at": "2026-01-01", "sizes": sizes, "example_prompts": ["a red t-shirt"]}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


@pytest.fixture
def draw(trained, tmp_path):
    """Draws in this process: `draw(flag, value, ...)` returns the pictures' paths, oldest row first."""

    def draw(*flags: object, folder: str = "pictures", model: Path = trained) -> list[Path]:
        words = ["--model", model, "--output_dir", tmp_path / folder, *QUICK, *flags]
        generate(parse_args([str(word) for word in words]))
        return [tmp_path / folder / row["file_name"] for row in rows(tmp_path / folder)]

    return draw


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "images.jsonl").read_text().split("\n")[:-1]]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_the_script_draws_every_prompt_as_often_as_asked_and_records_it(trained, tmp_path):
    prompts = ["--prompt", "denim jeans", "--prompt", "A red t-shirt, laid flat!"]
    words = [*prompts, "--model", trained, "--num_images", 2, "--seed", 7, "--output_dir", tmp_path / "out", *QUICK]
    done = subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(trained) in done.stdout and "--model" in done.stdout
    names = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert [name[-10:] for name in names] == ["000007.png", "000008.png"] * 2
    assert names[0].startswith("a-red-t-shirt-laid-flat-") and names[2].startswith("denim-jeans-")
    assert {row["file_name"] for row in rows(tmp_path / "out")} == set(names)
    assert {(row["prompt"], row["seed"], row["steps"], row["guidance"]) for row in rows(tmp_path / "out")} == {
        (prompt, seed, 3, 4.0) for prompt in prompts[1::2] for seed in (7, 8)
    }
    assert Image.open(tmp_path / "out" / "contact_sheet.jpg").width > 56
    assert len(list((tmp_path / "out").iterdir())) == 6  # nothing half-written is left


def test_a_picture_is_the_one_that_plain_diffusers_draws(trained, draw):
    [path] = draw("--prompt", "denim jeans on white", "--num_images", 1, "--seed", 5)
    pipeline = StableDiffusionPipeline.from_pretrained(trained)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, use_karras_sigmas=True)
    settings = {"height": 72, "width": 56, "num_inference_steps": 3, "guidance_scale": 4.0}
    expected = pipeline("denim jeans on white", generator=torch.Generator().manual_seed(5), **settings).images[0]
    assert np.abs(pixels(path) - np.asarray(expected).astype(int)).max() <= 1


def test_the_batch_size_changes_no_picture(draw):
    flags = ["--prompt", "denim jeans", "--prompt", "the white " * 60, "--num_images", 3]
    alone, together = draw(*flags, "--batch_size", 1), draw(*flags, "--batch_size", 4, folder="together")
    assert [path.name for path in alone] == [path.name for path in together]
    for one, other in zip(alone, together, strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1


def test_picture_i_is_drawn_with_seed_plus_i(draw):
    three = draw("--prompt", "jeans", "--num_images", 3, "--seed", 10)
    [last] = draw("--prompt", "jeans", "--num_images", 1, "--seed", 12, folder="alone")
    assert last.name == three[2].name and np.abs(pixels(last) - pixels(three[2])).max() <= 1
    assert np.abs(pixels(three[0]) - pixels(three[1])).max() > 5


def test_the_same_picture_has_the_same_name_and_one_row_and_another_never_has_it(draw, tmp_path):
    usual = ["--prompt", "jeans", "--num_images", 1]
    changes = [[], ["--steps", 4], ["--guidance_scale", 5], ["--negative_prompt", "red"], ["--height", 48], []]
    for change in changes:
        draw(*usual, *change)
    assert len(rows(tmp_path / "pictures")) == len(list((tmp_path / "pictures").glob("*.png"))) == 5


def test_the_size_is_that_most_trained_on_unless_named(draw, capsys):
    assert Image.open(draw("--num_images", 1)[0]).size == (56, 72)
    assert Image.open(draw("--num_images", 1, "--width", 41, folder="wide")[0]).size == (40, 72)
    assert "41 x 72 px becomes 40 x 72" in capsys.readouterr().out


def test_a_model_that_was_not_trained_here_draws_at_its_own_size_and_needs_a_prompt(draw, tiny_model):
    assert Image.open(draw("--prompt", "jeans", "--num_images", 1, model=tiny_model)[0]).size == (64, 64)
    with pytest.raises(UserError, match="--prompt is needed"):
        parse_args(["--model", str(tiny_model)])


def test_without_a_prompt_the_captions_are_drawn(draw, tmp_path):
    draw("--num_images", 1)
    assert rows(tmp_path / "pictures")[0]["prompt"] == "a red t-shirt"


def test_an_empty_prompt_is_drawn_too(draw, tmp_path):
    """It shows what the model draws by itself."""
    [path] = draw("--prompt", "", "--num_images", 1)
    assert path.name.startswith("picture-") and path.exists() and rows(tmp_path / "pictures")[0]["prompt"] == ""


def test_without_a_model_the_newest_finished_run_is_taken_and_else_the_starter(monkeypatch, trained):
    monkeypatch.setattr(inference, "newest_finished_run", lambda: trained)
    assert parse_args([]).model == str(trained)
    monkeypatch.setattr(inference, "newest_finished_run", lambda: None)
    assert parse_args(["--prompt", "x"]).model == str(inference.STARTER)


def test_a_model_brings_its_own_defaults_and_flags_win_over_them(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "generation_defaults.json").write_text('{"guidance_scale": 3.5, "steps": 30}')
    args = parse_args(["--model", str(model), "--prompt", "x", "--steps", "12"])
    assert (args.guidance_scale, args.steps) == (3.5, 12)


def test_a_long_prompt_is_read_as_training_read_its_captions_and_the_cut_is_said(draw, trained, tmp_path, capsys):
    model = shutil.copytree(trained, tmp_path / "short")
    run = json.loads((model / "run.json").read_text())
    (model / "run.json").write_text(json.dumps({**run, "max_token_chunks": 1}))
    flags = ["--prompt", "the white " * 60, "--num_images", 1]
    [cut], [whole] = draw(*flags, model=model), draw(*flags, folder="whole")
    assert "only the first 75 of 120 tokens" in capsys.readouterr().out
    assert np.abs(pixels(cut) - pixels(whole)).max() > 1


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--model", "nobody/nothing"], "nobody/nothing"),
        (["--num_images", "0"], "--num_images"),
        (["--guidance_scale", "-1"], "--guidance_scale"),
        (["--height", "0"], "--height"),
    ],
)
def test_wrong_input_is_refused_by_name(monkeypatch, tmp_path, flags, named):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=named):
        generate(parse_args(["--prompt", "x", "--output_dir", str(tmp_path), *flags]))


def test_prompts_with_unusual_line_ends_keep_one_row(draw, tmp_path):
    for _ in range(2):
        draw("--prompt", "denim\u2028jeans\u0085", "--num_images", 1)
    assert [row["prompt"] for row in rows(tmp_path / "pictures")] == ["denim\u2028jeans\u0085"]


@pytest.mark.parametrize("content", ["{", "[]\n", "{}\n"])
def test_a_list_of_pictures_that_cannot_be_read_is_refused_before_anything_is_drawn(draw, tmp_path, content):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "images.jsonl").write_text(content)
    with pytest.raises(UserError, match="images.jsonl"):
        draw("--num_images", 1)
    assert not list((tmp_path / "pictures").glob("*.png"))


def test_a_folder_that_cannot_be_made_is_named(draw, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output_dir"):
        draw("--num_images", 1, folder="file/pictures")

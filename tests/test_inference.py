"""inference.py as it is used: files, names, sizes, seeds, and images that plain diffusers generates as well."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image

import inference
from background import INFERENCE, run_script
from generated_folder import QUICK, pixels, rows
from generation import image_generator
from generation.generate import generate
from inference import parse_args
from metadata.reading import read_captions
from models.lora import LORA_FILE
from models.samplers import SamplingSettings
from runtime.errors import UserError, WorkError


def test_the_script_generates_every_prompt_as_often_as_asked_and_records_it(finished_run, tmp_path):
    prompts = ["--prompt", "denim jeans", "--prompt", "A red t-shirt, laid flat!"]
    flags = ["--model", finished_run, "--num_images", 2, "--seed", 7, "--output_dir", tmp_path / "out", *QUICK]
    done = run_script(INFERENCE, *prompts, *flags)
    assert done.returncode == 0, done.stderr
    assert str(finished_run) in done.stdout
    names = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert [name[-10:] for name in names] == ["000007.png", "000008.png"] * 2
    assert names[0].startswith("a-red-t-shirt-laid-flat-") and names[2].startswith("denim-jeans-")
    assert {row["file_name"] for row in rows(tmp_path / "out")} == set(names)
    assert {(row["prompt"], row["seed"], row["steps"], row["guidance"]) for row in rows(tmp_path / "out")} == {
        (prompt, seed, 3, 4.0) for prompt in prompts[1::2] for seed in (7, 8)
    }
    assert Image.open(tmp_path / "out" / "contact_sheet.jpg").width > 56
    assert len(list((tmp_path / "out").iterdir())) == 6  # nothing half-written is left


def test_pictures_generated_together_keep_their_own_negative_prompts(images_of, tmp_path, monkeypatch):
    asked = []
    generate_latents = image_generator.generate_latents
    monkeypatch.setattr(
        image_generator, "generate_latents", lambda *what: asked.append(what) or generate_latents(*what)
    )
    lines = [{"prompt": "jeans", "negative_prompt": negative} for negative in ("red", "white")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    images_of("--prompts_file", tmp_path / "prompts.jsonl", "--num_images", 1, "--guidance_rescale", 0.3)
    [(_, _, _, conditions, settings, _)] = asked
    negatives, prompts = conditions.hidden_states.chunk(2)
    assert torch.equal(*prompts) and not torch.equal(*negatives)
    assert settings == SamplingSettings(steps=3, guidance_scale=4.0, guidance_rescale=0.3)


def test_which_weights_generate_is_what_was_asked_for(monkeypatch, tiny_model):
    def find(*asked):
        raise UserError(str(asked))

    monkeypatch.setattr("generation.generate.find_weights", find)
    flags = ["--checkpoint", "checkpoint-2", "--lora", "x", "--lora_scale", "0.5", "--prompt", "x"]
    flags += ["--lora", "y", "--lora_scale", "2"]
    with pytest.raises(UserError, match=r"'checkpoint-2', \['x', 'y'\], \[0\.5, 2\.0\], None, False\)"):
        generate(parse_args(["--model", str(tiny_model), *flags]))


def test_a_picture_is_the_one_that_plain_diffusers_generates(finished_run, images_of):
    [path] = images_of("--prompt", "denim jeans on white", "--num_images", 1, "--seed", 5)
    pipeline = StableDiffusionPipeline.from_pretrained(finished_run)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, use_karras_sigmas=True)
    settings = {"height": 72, "width": 56, "num_inference_steps": 3, "guidance_scale": 4.0}
    expected = pipeline("denim jeans on white", generator=torch.Generator().manual_seed(5), **settings).images[0]
    assert np.abs(pixels(path) - np.asarray(expected).astype(int)).max() <= 1


def test_the_batch_size_changes_no_picture(images_of):
    flags = ["--prompt", "denim jeans", "--prompt", "the white " * 60, "--num_images", 3]
    alone, together = (
        images_of(*flags, "--batch_size", 1),
        images_of(*flags, "--batch_size", 4, folder="together"),
    )
    assert [path.name for path in alone] == [path.name for path in together]
    for one, other in zip(alone, together, strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="on a CPU --compile needs a C++ compiler")
def test_a_compiled_unet_generates_the_same_picture(images_of):
    flags = ["--prompt", "denim jeans", "--num_images", 1]
    [plain], [compiled] = images_of(*flags), images_of(*flags, "--compile", folder="compiled")
    assert np.abs(pixels(plain) - pixels(compiled)).max() <= 1


def test_picture_i_is_generated_with_seed_plus_i(images_of):
    three = images_of("--prompt", "jeans", "--num_images", 3, "--seed", 10)
    [last] = images_of("--prompt", "jeans", "--num_images", 1, "--seed", 12, folder="alone")
    assert last.name == three[2].name and np.abs(pixels(last) - pixels(three[2])).max() <= 1
    assert np.abs(pixels(three[0]) - pixels(three[1])).max() > 5


def test_the_same_picture_has_the_same_name_and_one_row_and_another_never_has_it(images_of, tmp_path):
    usual = ["--prompt", "jeans", "--num_images", 1]
    changes = [[], ["--steps", 4], ["--guidance_scale", 5], ["--negative_prompt", "red"], ["--height", 48], []]
    for change in changes:
        images_of(*usual, *change)
    assert len(rows(tmp_path / "pictures")) == len(list((tmp_path / "pictures").glob("*.png"))) == 5


def test_the_size_is_that_most_trained_on_unless_named(images_of, capsys):
    assert Image.open(images_of("--num_images", 1)[0]).size == (56, 72)
    assert Image.open(images_of("--num_images", 1, "--width", 41, folder="wide")[0]).size == (40, 72)
    assert re.search("41 x 72 px.*40 x 72", capsys.readouterr().out)


def test_a_model_that_was_not_trained_here_generates_at_its_own_size_and_needs_a_prompt(images_of, tiny_model):
    assert Image.open(images_of("--prompt", "jeans", "--num_images", 1, model=tiny_model)[0]).size == (64, 64)
    with pytest.raises(UserError, match="--prompt"):
        parse_args(["--model", str(tiny_model)])


def test_without_a_prompt_the_captions_are_generated(images_of, tmp_path):
    images_of("--num_images", 1)
    assert rows(tmp_path / "pictures")[0]["prompt"] == "a red t-shirt"


def test_an_empty_prompt_is_generated_too(images_of, tmp_path):
    """It shows what the model generates by itself."""
    [path] = images_of("--prompt", "", "--num_images", 1)
    assert path.name.startswith("picture-") and path.exists() and rows(tmp_path / "pictures")[0]["prompt"] == ""


def test_without_a_model_the_newest_finished_run_is_taken_and_else_the_starter(monkeypatch, finished_run):
    monkeypatch.setattr(inference, "newest_finished_run", lambda: finished_run)
    assert parse_args([]).model == str(finished_run)
    monkeypatch.setattr(inference, "newest_finished_run", lambda: None)
    assert parse_args(["--prompt", "x"]).model == str(inference.STARTER)


def test_a_model_brings_its_own_defaults_and_flags_win_over_them(tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "generation_defaults.json").write_text('{"guidance_scale": 3.5, "steps": 30}')
    args = parse_args(["--model", str(model), "--prompt", "x", "--steps", "12"])
    assert (args.guidance_scale, args.steps) == (3.5, 12)


def test_a_run_that_is_not_finished_generates_with_its_bases_defaults(tiny_model, tmp_path):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    (base / "generation_defaults.json").write_text('{"guidance_scale": 3.5}')
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"base_model": str(base), "finished": False}))
    args = parse_args(["--model", str(tmp_path / "run"), "--checkpoint", "latest", "--prompt", "x"])
    assert args.guidance_scale == 3.5


def test_a_long_prompt_is_read_as_training_read_its_captions_and_the_cut_is_said(
    images_of, finished_run, tmp_path, capsys
):
    model = shutil.copytree(finished_run, tmp_path / "short")
    run = json.loads((model / "run.json").read_text())
    (model / "run.json").write_text(json.dumps({**run, "max_token_chunks": 1}))
    flags = ["--prompt", "the white " * 60, "--num_images", 1]
    [cut], [whole] = images_of(*flags, model=model), images_of(*flags, folder="whole")
    assert re.search("75 .*120 tokens", capsys.readouterr().out)
    assert np.abs(pixels(cut) - pixels(whole)).max() > 1


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--model", "nobody/nothing"], "nobody/nothing"),
        (["--num_images", "0"], "--num_images"),
        (["--guidance_scale", "-1"], "--guidance_scale"),
        (["--height", "0"], "--height"),
        (["--prompt", "caf\udce9"], "--prompt"),
        (["--negative_prompt", "caf\udce9"], "--negative_prompt"),
        (["--scheduler", "none"], "--scheduler"),
        (["--scheduler", "lcm", "--steps", "60"], "--steps 60.*--scheduler lcm"),
        (["--lora", "no/such-lora"], "--lora no/such-lora"),
        (["--lora", "x", "--lora", "y", "--lora_scale", "1"], "--lora_scale is missing"),
    ],
)
def test_wrong_input_is_refused_by_name(monkeypatch, tmp_path, flags, named):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=named):
        generate(parse_args(["--prompt", "x", "--output_dir", str(tmp_path), *flags]))


def test_prompts_with_unusual_line_ends_keep_one_row(images_of, tmp_path):
    for _ in range(2):
        images_of("--prompt", "denim\u2028jeans\u0085", "--num_images", 1)
    assert [row["prompt"] for row in rows(tmp_path / "pictures")] == ["denim\u2028jeans\u0085"]


@pytest.mark.parametrize("content", ["{", "[]\n", "{}\n"])
def test_a_list_of_pictures_that_cannot_be_read_is_refused_before_anything_is_generated(images_of, tmp_path, content):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "images.jsonl").write_text(content)
    with pytest.raises(UserError, match="images.jsonl"):
        images_of("--num_images", 1)
    assert not list((tmp_path / "pictures").glob("*.png"))


def test_a_folder_that_cannot_be_made_is_named(images_of, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--output_dir"):
        images_of("--num_images", 1, folder="file/pictures")


# --- prompts, models, files ------------------------------------------------------------------------------------------


def test_a_prompts_file_says_what_is_different_for_each(images_of, tmp_path):
    file = tmp_path / "prompts.jsonl"
    requests = [{"prompt": "denim jeans", "seed": 7, "num_images": 2, "steps": 2, "negative_prompt": "red"},
              {"text": "a red t-shirt", "guidance_scale": 1.0, "height": 48, "width": 48}]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, requests)))
    paths = images_of("--prompts_file", file, "--prompt", "the white", "--num_images", 1)
    generated = [
        (r["prompt"], r["seed"], r["steps"], r["guidance"], r["negative_prompt"]) for r in rows(paths[0].parent)
    ]
    assert generated == [
        ("the white", 0, 3, 4.0, ""),
        ("denim jeans", 7, 2, 4.0, "red"),
        ("denim jeans", 8, 2, 4.0, "red"),
        ("a red t-shirt", 0, 3, 1.0, ""),
    ]
    assert [Image.open(path).size for path in paths] == [(56, 72)] * 3 + [(48, 48)]
    flags = ["--prompt", "denim jeans", "--seed", 8, "--num_images", 1, "--steps", 2, "--negative_prompt", "red"]
    [alone] = images_of(*flags, folder="alone")
    assert alone.name == paths[2].name and np.abs(pixels(alone) - pixels(paths[2])).max() <= 1


def test_lines_of_other_programs_are_generated_as_they_say(images_of, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("# one\nred jeans --n blue --w 48 --h 48 --s 2 --d 5 --am 1\n--prompt (a skirt:1.3) --width 48")
    images_of("--prompts_file", file, "--num_images", 1, "--height", 48)
    said, found = capsys.readouterr().out, rows(tmp_path / "pictures")
    assert [(r["prompt"], r["negative_prompt"], r["seed"], r["steps"], r["width"], r["height"]) for r in found] == [
        ("red jeans", "blue", 5, 2, 48, 48),
        ("(a skirt:1.3)", "", 0, 3, 48, 48),
    ]
    assert said.count("--am 1 (line 2)") == 1 and said.count("not interpreted") == 1


def test_what_was_generated_is_generated_again_from_its_list(images_of, tmp_path):
    paths = images_of("--prompt", "jeans", "--num_images", 3, "--seed", 4, "--scheduler", "euler_a")
    again = images_of("--prompts_file", tmp_path / "pictures" / "images.jsonl", folder="again")
    assert [path.name for path in again] == [path.name for path in paths]
    for one, other in zip(paths, again, strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1


def test_a_picture_that_was_thrown_away_stops_no_later_run(images_of, tmp_path):
    usual = ["--prompt", "jeans", "--num_images", 2, "--write_metadata"]
    images_of(*usual)[0].unlink()
    images_of("--prompt", "the white", "--num_images", 1, "--write_metadata", "--resume")
    assert images_of(*usual, "--resume")[0].exists()
    assert len(read_captions(tmp_path / "pictures")) == 3


def test_latents_that_overflow_are_reported_and_no_black_picture_is_written(images_of, monkeypatch, tmp_path):
    not_finite = torch.full((1, 4, 36, 28), float("nan"))
    monkeypatch.setattr("generation.image_generator.generate_latents", lambda *_: not_finite)
    with pytest.raises(WorkError, match="--dtype bf16"):
        images_of("--prompt", "jeans", "--num_images", 1)
    assert not list((tmp_path / "pictures").glob("*.png"))


def test_pictures_are_a_data_set_where_that_is_asked_for(images_of, tmp_path):
    paths = images_of("--prompt", "denim jeans", "--num_images", 2, "--write_metadata", "--format", "jpg")
    captions = {row.file_name: row.captions for row in read_captions(tmp_path / "pictures")}
    assert captions == {path.name: ("denim jeans",) for path in paths} and paths[0].suffix == ".jpg"


def test_the_trigger_phrase_is_mentioned_where_a_prompt_lacks_it(images_of, finished_run, tmp_path, capsys):
    model = shutil.copytree(finished_run, tmp_path / "triggered")
    run = json.loads((model / "run.json").read_text())
    (model / "run.json").write_text(json.dumps({**run, "trigger": "sks"}))
    images_of("--prompt", "denim jeans", "--prompt", "sks, a skirt", "--num_images", 1, model=model)
    said = capsys.readouterr().out
    assert "1 of 2" in said and "trigger" in said and "sks" in said


def test_a_lora_brings_its_base_and_a_checkpoint_is_the_newest_runs(monkeypatch, finished_run, tmp_path):
    scales = ["--lora_scale", "0.5", "--lora_scale", "2"]
    args = parse_args(["--lora", str(finished_run), "--lora", "another", *scales, "--prompt", "x"])
    assert (args.model, args.lora, args.lora_scale) == (str(finished_run), ["another"], [0.5, 2.0])
    file = parse_args(["--lora", str(finished_run / LORA_FILE), "--prompt", "x"])
    assert (file.model, file.lora, file.lora_scale) == (str(finished_run), [], [])
    checkpoint = parse_args(["--lora", str(finished_run / "checkpoint-2"), "--prompt", "x"])
    assert (checkpoint.model, checkpoint.lora, checkpoint.checkpoint) == (str(finished_run), [], "checkpoint-2")
    monkeypatch.setattr(inference, "newest_run", lambda: finished_run)
    monkeypatch.setattr(inference, "newest_finished_run", lambda: tmp_path)
    assert parse_args(["--checkpoint", "latest"]).model == str(finished_run)


def test_a_lora_without_a_base_is_refused_where_the_newest_run_is_a_lora_itself(monkeypatch, tmp_path):
    (tmp_path / "run.json").write_text('{"trained": "LoRA of rank 4", "example_prompts": ["x"]}')
    monkeypatch.setattr(inference, "newest_finished_run", lambda: tmp_path)
    with pytest.raises(UserError, match="--lora elsewhere.safetensors: name its base with --model"):
        parse_args(["--lora", "elsewhere.safetensors"])


def test_bf16_generates_nearly_the_same_under_another_name(images_of):
    [exact], [rough] = (
        images_of("--prompt", "jeans", "--num_images", 1, "--dtype", d, folder=d) for d in ("fp32", "bf16")
    )
    assert exact.name != rough.name and 0 < np.abs(pixels(exact) - pixels(rough)).mean() < 12

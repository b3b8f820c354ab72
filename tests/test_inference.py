"""inference.py as it is used: files, names, sizes, seeds, and pictures that plain diffusers draws as well."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image

import inference
from background import INFERENCE, Background, finish, start
from data.metadata import read_captions
from generation import image_generator
from generation.generate import generate
from generation.image_generator import ImageGenerator
from inference import parse_args
from models.loading import load_noise_scheduler, load_unet, save_pipeline
from models.samplers import SamplingSettings
from runtime.errors import UserError, WorkError

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


def test_pictures_drawn_together_keep_their_own_negative_prompts(draw, tmp_path, monkeypatch):
    asked = []
    generate_latents = image_generator.generate_latents
    monkeypatch.setattr(
        image_generator, "generate_latents", lambda *what: asked.append(what) or generate_latents(*what)
    )
    lines = [{"prompt": "jeans", "negative_prompt": negative} for negative in ("red", "white")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    draw("--prompts_file", tmp_path / "prompts.jsonl", "--num_images", 1, "--guidance_rescale", 0.3)
    [(_, _, _, embeddings, settings, _)] = asked
    prompts, negatives = zip(*embeddings, strict=True)
    assert torch.equal(*prompts) and not torch.equal(*negatives)
    assert settings == SamplingSettings(steps=3, guidance_scale=4.0, guidance_rescale=0.3)


def test_which_weights_draw_is_what_was_asked_for(monkeypatch, tiny_model):
    def find(*asked):
        raise UserError(str(asked))

    monkeypatch.setattr("generation.generate.find_weights", find)
    flags = ["--checkpoint", "checkpoint-2", "--lora", "x", "--lora_scale", "0.5", "--prompt", "x"]
    with pytest.raises(UserError, match=r"'checkpoint-2', 'x', 0\.5\)"):
        generate(parse_args(["--model", str(tiny_model), *flags]))


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


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="on a CPU --compile needs a C++ compiler")
def test_a_compiled_unet_draws_the_same_picture(draw):
    flags = ["--prompt", "denim jeans", "--num_images", 1]
    [plain], [compiled] = draw(*flags), draw(*flags, "--compile", folder="compiled")
    assert np.abs(pixels(plain) - pixels(compiled)).max() <= 1


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


def test_a_run_that_is_not_finished_draws_with_its_bases_defaults(tiny_model, tmp_path):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    (base / "generation_defaults.json").write_text('{"guidance_scale": 3.5}')
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"base_model": str(base), "finished": False}))
    args = parse_args(["--model", str(tmp_path / "run"), "--checkpoint", "latest", "--prompt", "x"])
    assert args.guidance_scale == 3.5


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
        (["--prompt", "caf\udce9"], "--prompt"),
        (["--negative_prompt", "caf\udce9"], "--negative_prompt"),
        (["--scheduler", "none"], "--scheduler"),
        (["--scheduler", "lcm", "--steps", "60"], "--steps 60 with --scheduler lcm"),
        (["--lora", "no/such-lora"], "--lora no/such-lora"),
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


# --- resuming, stopping, sharing -------------------------------------------------------------------------------------


def test_resume_fills_the_gaps_alone(draw, trained, tmp_path):
    usual = ["--prompt", "jeans", "--num_images", 4]
    paths = draw(*usual)
    before = [(pixels(path), path.stat().st_mtime_ns) for path in paths]
    paths[1].unlink()
    paths[2].write_bytes(paths[2].read_bytes()[:-100])  # cut short by something else
    (tmp_path / "pictures" / "images.jsonl").unlink()
    assert draw(*usual, "--resume") == paths
    for index, (path, (old, written)) in enumerate(zip(paths, before, strict=True)):
        assert np.abs(pixels(path) - old).max() <= 1
        assert (path.stat().st_mtime_ns == written) == (index in (0, 3))


def test_after_kill_9_no_half_picture_is_left_and_resume_draws_the_rest(draw, trained, tmp_path):
    flags = ["--prompt", "jeans", "--num_images", 12, "--batch_size", 1, *QUICK]
    whole = draw(*flags)
    there, log = tmp_path / "killed", tmp_path / "log"
    words = ["--model", trained, "--output_dir", there, *flags]
    run = Background(log, *words, script=INFERENCE).until(lambda: len(list(there.glob("*.png"))) >= 2)
    assert run.kill().ended() == -signal.SIGKILL
    left = list(there.glob("*.png"))
    assert 2 <= len(left) < 12 and all(Image.open(path).load() for path in left)
    finish([Background(log, *words, "--resume", script=INFERENCE)])
    assert f"{len(left)} of them there already" in log.read_text()
    assert not list(there.glob(".*.part")) and len(rows(there)) == 12
    for path in whole:
        assert np.abs(pixels(path) - pixels(there / path.name)).max() <= 1


def test_a_signal_keeps_what_is_drawn_and_says_how_to_go_on(trained, tmp_path):
    there, log = tmp_path / "stopped", tmp_path / "log"
    words = ["--model", trained, "--output_dir", there, "--prompt", "jeans", "--num_images", 400, "--batch_size", 1]
    run = Background(log, *words, *QUICK, script=INFERENCE).until(lambda: len(list(there.glob("*.png"))) >= 3)
    assert run.send(signal.SIGINT).ended() == 75
    said = log.read_text().splitlines()[-1]
    drawn = list(there.glob("*.png"))
    assert said.startswith("SIGINT: stopped after") and "--resume" in said and "Traceback" not in log.read_text()
    assert 3 <= len(drawn) < 400 and {row["file_name"] for row in rows(there)} == {path.name for path in drawn}


def test_two_processes_share_the_list(draw, trained, tmp_path):
    flags = ["--prompt", "jeans", "--prompt", "the white", "--num_images", 3, "--batch_size", 2, *QUICK]
    alone = draw(*flags)
    there, log = tmp_path / "shared", tmp_path / "log"
    run = start(log, 2, "--model", trained, "--output_dir", there, *flags, script=INFERENCE)
    finish(run)
    assert sorted(path.name for path in there.glob("*.png")) == sorted(path.name for path in alone)
    assert [row["file_name"] for row in rows(there)] == [path.name for path in alone]
    for path in alone:
        assert np.abs(pixels(path) - pixels(there / path.name)).max() <= 1
    assert "6 pictures in" in log.read_text() and "pictures in" not in run[1].log.read_text()
    assert "3/3" in log.read_text()  # its half of them


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory. Tried"), MemoryError()])
def test_a_batch_that_does_not_fit_is_halved_and_the_pictures_are_the_same(draw, monkeypatch, capsys, error):
    """It fails in the second of three steps, when the sampler has begun to remember."""
    usual, step = ["--prompt", "jeans", "--num_images", 5], DPMSolverMultistepScheduler.step
    expected = draw(*usual)

    def small(self, model_output, t, sample, **more):
        if len(sample) > 1 and self.step_index == 1:
            raise error
        return step(self, model_output, t, sample, **more)

    monkeypatch.setattr(DPMSolverMultistepScheduler, "step", small)
    drawn = draw(*usual, folder="less")
    said = capsys.readouterr().out
    assert "4 pictures at once: going on with 2" in said and said.count("2 pictures at once: going on with 1") == 1
    for one, other in zip(drawn, expected, strict=True):
        assert one.name == other.name and np.abs(pixels(one) - pixels(other)).max() <= 1


def test_one_picture_that_does_not_fit_is_a_line(draw, monkeypatch):
    def never(self, batch):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(ImageGenerator, "generate_images", never)
    with pytest.raises(WorkError, match="56 x 72 px; a smaller --width"):
        draw("--prompt", "jeans", "--num_images", 2)


def test_a_full_disk_is_told_and_not_taken_for_done(draw, monkeypatch, tmp_path):
    monkeypatch.setattr(Image.Image, "save", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(WorkError, match="No space left"):
        draw("--prompt", "jeans", "--num_images", 1)
    assert not list((tmp_path / "pictures").glob("*.png"))


# --- prompts, models, files ------------------------------------------------------------------------------------------


def test_a_prompts_file_says_what_is_different_for_each(draw, tmp_path):
    file = tmp_path / "prompts.jsonl"
    wishes = [{"prompt": "denim jeans", "seed": 7, "num_images": 2, "steps": 2, "negative_prompt": "red"},
              {"text": "a red t-shirt", "guidance_scale": 1.0, "height": 48, "width": 48}]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, wishes)))
    paths = draw("--prompts_file", file, "--prompt", "the white", "--num_images", 1)
    told = [(r["prompt"], r["seed"], r["steps"], r["guidance"], r["negative_prompt"]) for r in rows(paths[0].parent)]
    assert told == [
        ("the white", 0, 3, 4.0, ""),
        ("denim jeans", 7, 2, 4.0, "red"),
        ("denim jeans", 8, 2, 4.0, "red"),
        ("a red t-shirt", 0, 3, 1.0, ""),
    ]
    assert [Image.open(path).size for path in paths] == [(56, 72)] * 3 + [(48, 48)]
    [alone] = draw("--prompt", "denim jeans", "--seed", 8, "--num_images", 1, "--steps", 2, "--negative_prompt", "red",
                   folder="alone")  # fmt: skip
    assert alone.name == paths[2].name and np.abs(pixels(alone) - pixels(paths[2])).max() <= 1


def test_what_was_drawn_is_drawn_again_from_its_list(draw, tmp_path):
    paths = draw("--prompt", "jeans", "--num_images", 3, "--seed", 4, "--scheduler", "euler_a")
    again = draw("--prompts_file", tmp_path / "pictures" / "images.jsonl", folder="again")
    assert [path.name for path in again] == [path.name for path in paths]
    for one, other in zip(paths, again, strict=True):
        assert np.abs(pixels(one) - pixels(other)).max() <= 1


def test_a_picture_that_was_thrown_away_stops_no_later_run(draw, tmp_path):
    usual = ["--prompt", "jeans", "--num_images", 2, "--write_metadata"]
    draw(*usual)[0].unlink()
    draw("--prompt", "the white", "--num_images", 1, "--write_metadata", "--resume")
    assert draw(*usual, "--resume")[0].exists()
    assert len(read_captions(tmp_path / "pictures")) == 3


def test_numbers_that_overflow_are_told_and_no_black_picture_is_written(draw, monkeypatch, tmp_path):
    not_finite = torch.full((1, 4, 36, 28), float("nan"))
    monkeypatch.setattr("generation.image_generator.generate_latents", lambda *_: not_finite)
    with pytest.raises(WorkError, match="--dtype bf16"):
        draw("--prompt", "jeans", "--num_images", 1)
    assert not list((tmp_path / "pictures").glob("*.png"))


def test_pictures_are_a_data_set_where_that_is_asked_for(draw, tmp_path):
    paths = draw("--prompt", "denim jeans", "--num_images", 2, "--write_metadata", "--format", "jpg")
    captions = {row.file_name: row.captions for row in read_captions(tmp_path / "pictures")}
    assert captions == {path.name: ("denim jeans",) for path in paths} and paths[0].suffix == ".jpg"


def test_the_trigger_phrase_is_mentioned_where_a_prompt_lacks_it(draw, trained, tmp_path, capsys):
    model = shutil.copytree(trained, tmp_path / "triggered")
    run = json.loads((model / "run.json").read_text())
    (model / "run.json").write_text(json.dumps({**run, "trigger": "sks"}))
    draw("--prompt", "denim jeans", "--prompt", "sks, a skirt", "--num_images", 1, model=model)
    assert "1 of 2 prompts lack the trigger phrase that the model was trained with: sks" in capsys.readouterr().out


def test_a_lora_brings_its_base_and_a_checkpoint_is_the_newest_runs(monkeypatch, trained, tmp_path):
    args = parse_args(["--lora", str(trained), "--lora_scale", "0.5", "--prompt", "x"])
    assert (args.model, args.lora, args.lora_scale) == (str(trained), None, 0.5)
    checkpoint = parse_args(["--lora", str(trained / "checkpoint-2"), "--prompt", "x"])
    assert (checkpoint.model, checkpoint.lora, checkpoint.checkpoint) == (str(trained), None, "checkpoint-2")
    monkeypatch.setattr(inference, "newest_run", lambda: trained)
    monkeypatch.setattr(inference, "newest_finished_run", lambda: tmp_path)
    assert parse_args(["--checkpoint", "latest"]).model == str(trained)


def test_bf16_draws_nearly_the_same_under_another_name(draw):
    [exact], [rough] = (draw("--prompt", "jeans", "--num_images", 1, "--dtype", d, folder=d) for d in ("fp32", "bf16"))
    assert exact.name != rough.name and 0 < np.abs(pixels(exact) - pixels(rough)).mean() < 12

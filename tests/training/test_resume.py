"""A run that is stopped anywhere and started again ends with the same bits as one that was not."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from background import Background, count_rows, finish, kill, start
from captioned_folder import write_captioned_folder
from run_folder import assert_same_bits, assert_same_tensors, losses, rows
from runtime.errors import Stopped, UserError
from runtime.stopping import StopSignals

STEPS = 12
USUAL = ["--max_train_steps", STEPS, "--learning_rate", 1e-3, "--checkpointing_steps", 2]
USUAL += ["--dataloader_num_workers", 0]
FULL = [
    "--use_ema", "--gradient_accumulation_steps", 2, "--train_batch_size", 2, "--random_flip", "--random_affine", 0.1,
    "--prior_images", 2, "--caption_dropout", 0.3, "--validation_split", 0.2, "--validation_steps", 6,
    "--validation_prompts", "jeans", "--checkpoints_total_limit", 3,
]  # fmt: skip
PURE = ["--mixed_precision", "pure_bf16", "--optimizer", "adafactor", "--train_batch_size", 2, "--use_ema"]
LORA = ["--lora_rank", 2, "--train_batch_size", 2, "--random_flip"]


@pytest.fixture(autouse=True)
def nothing_goes_on():
    yield
    for run in Background.started:
        run.kill()


@pytest.fixture(scope="session")
def two_shapes(tmp_path_factory) -> Path:
    """Five pictures, two of them landscape: batches of two sizes. One has a mask."""
    from PIL import Image

    captions = {
        f"{i}.png": f"denim jeans laid flat, the {side} pocket" for i, side in enumerate(["left", "right"] * 3)
    }
    captions.pop("5.png")
    folder = write_captioned_folder(tmp_path_factory.mktemp("shapes") / "data", captions)
    for name in ("1.png", "3.png"):
        with Image.open(folder / name) as image:
            image.rotate(90, expand=True).save(folder / name)
    Image.linear_gradient("L").resize((48, 64)).save(folder / "0.mask.png")
    return folder


@pytest.fixture
def command(tiny_model, two_shapes, tmp_path):
    """The flags of a run into tmp_path / name."""

    def flags(name: str, *more: object) -> list[object]:
        base, out = ["--pretrained_model_name_or_path", tiny_model], ["--output_dir", tmp_path / name]
        where = [*base, "--dataset", two_shapes, *out]
        return [*where, "--no_validation_pictures", "--no_report", "--resume_from_checkpoint", "latest", *USUAL, *more]

    return flags


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("kind", "kills", "processes"),
    [(FULL, 3, 1), (LORA, 2, 1), (FULL, 2, 2), ([*LORA, "--mixed_precision", "bf16"], 1, 2), (PURE, 1, 2)],
    ids=["full", "LoRA", "full, two processes", "LoRA in bf16, two processes", "pure bf16, two processes"],
)
def test_a_run_that_was_killed_anywhere_ends_with_the_same_bits(command, tmp_path, kind, kills, processes):
    rng, log = random.Random(str(kind)), tmp_path / "log"
    finish(start(log, processes, *command("whole", *kind)))
    for _ in range(kills):
        more, delay = rng.randint(1, 3), rng.uniform(0, 0.2)
        enough = min(count_rows(tmp_path / "cut") + more, STEPS - 1)
        run = start(log, processes, *command("cut", *kind))
        run[0].until(lambda enough=enough: count_rows(tmp_path / "cut") >= enough)
        run[0].for_at_most(delay)  # random: whatever the kill meets, the end is the same
        assert kill(run)
    finish(start(log, processes, *command("cut", *kind)))
    assert_same_bits(tmp_path / "whole", tmp_path / "cut", STEPS)
    assert not list((tmp_path / "cut").rglob(".*"))


@pytest.fixture(scope="module")
def whole_lora(tiny_model, two_shapes, tmp_path_factory) -> Path:
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "out"
    where = ["--pretrained_model_name_or_path", tiny_model, "--dataset", two_shapes, "--output_dir", out]
    finish(start(out.with_name("log"), 1, *where, *USUAL, *LORA))
    return out


@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_ends_the_run_after_its_step_and_the_same_command_goes_on(command, tmp_path, whole_lora, number):
    log, out = tmp_path / "log", tmp_path / "out"
    flags = [*LORA, "--checkpointing_steps", 5]
    run = Background(log, *command("out", *flags)).until(lambda: count_rows(out) >= 2).send(number)
    assert run.ended() == 75
    done = count_rows(out)
    assert 2 <= done < STEPS and (out / f"checkpoint-{done}" / "manifest.json").is_file()
    assert f"{number.name}: stopped after step {done} of {STEPS}, saved in checkpoint-{done}" in log.read_text()
    finish(start(log, 1, *command("out", *flags)))
    assert f"going on after step {done}" in log.read_text()
    assert losses(out) == losses(whole_lora)
    assert_same_tensors(whole_lora, out, "pytorch_lora_weights.safetensors")


@pytest.mark.multiprocess
def test_one_signalled_process_stops_both_at_the_same_step(command, tmp_path):
    log, out = tmp_path / "log", tmp_path / "out"
    first, second = start(log, 2, *command("out", *LORA))
    first.until(lambda: count_rows(out) >= 2)
    second.send(signal.SIGUSR1)
    assert (first.ended(), second.ended()) == (75, 75), log.read_text()
    assert f"stopped after step {count_rows(out)} of" in log.read_text()


@pytest.mark.multiprocess
@pytest.mark.parametrize("survivor", [0, 1])
def test_a_process_whose_peer_dies_ends_with_a_line_and_does_not_hang(command, tmp_path, survivor):
    log, out = tmp_path / "log", tmp_path / "out"
    both = start(log, 2, *command("out", *LORA))
    both[0].until(lambda: count_rows(out) >= 2)
    both[1 - survivor].kill()
    assert both[survivor].ended() == 1
    assert "another process of this run" in both[survivor].log.read_text()


@pytest.mark.multiprocess
def test_two_runs_at_once_share_a_cache(command, tmp_path, whole_lora):
    runs = {}
    for name in ("one", "two"):
        flags = [*LORA, "--latents_cache_dir", tmp_path / "shared"]
        runs[name] = start(tmp_path / f"log {name}", 1, *command(name, *flags))
    for name, processes in runs.items():
        finish(processes)
        assert losses(tmp_path / name) == losses(whole_lora)


@pytest.mark.multiprocess
@pytest.mark.parametrize("what", ["pictures", "captions"])
def test_a_signal_while_encoding_ends_at_once_and_leaves_nothing_half_written(tiny_model, tmp_path, what):
    captions = {f"{i}.jpg": f"a red t-shirt, number {i}" for i in range(400)}
    folder = write_captioned_folder(tmp_path / "many", captions)
    log, out = tmp_path / "log", tmp_path / "out"
    flags = ["--pretrained_model_name_or_path", tiny_model, "--dataset", folder, "--output_dir", out]
    flags += ["--max_train_steps", 1, "--validation_steps", 100]
    encoded = out / "cache" / "pictures"
    run = Background(log, *flags).until(lambda: f"encoding {what}" in log.read_text()).send(signal.SIGTERM)
    assert run.ended() == 75
    assert "SIGTERM" in log.read_text() and "Traceback" not in log.read_text()
    kept = {path.name: path.stat().st_mtime_ns for path in encoded.glob("*.safetensors")}
    assert (kept or what == "pictures") and not list(encoded.glob(".*")) and count_rows(out) == 0
    assert Background(log, *flags).ended() == 0
    assert all((encoded / name).stat().st_mtime_ns == written for name, written in kept.items())


@pytest.mark.usefixtures("few_sampling_steps")
def test_a_signal_while_prompts_are_generated_waits_for_them_and_nothing_is_half_written(
    train_run, monkeypatch, tmp_path
):
    from PIL import Image

    from training.validation import ValidationSampler

    real = ValidationSampler.generate

    def signalled(self, unet, step):
        if step:  # not with the base's pictures
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, unet, step)

    monkeypatch.setattr(ValidationSampler, "generate", signalled)
    with StopSignals() as stop, pytest.raises(Stopped, match="stopped after step 2 of 4"):
        train_run("out", "--max_train_steps", 4, "--validation_steps", 2, "--validation_prompts", "jeans", stop=stop)
    out = tmp_path / "out"
    assert (out / "checkpoint-2" / "manifest.json").is_file() and rows(out)[-1]["train_fixed_loss"]
    pictures = sorted((out / "validation").iterdir())
    assert [picture.name for picture in pictures] == ["step-000000-0.png", "step-000002-0.png"]
    assert all(Image.open(picture).load() for picture in pictures)


@pytest.mark.multiprocess
def test_a_run_of_two_processes_goes_on_with_one_and_the_other_way(command, tmp_path):
    log = tmp_path / "log"
    half = ["--max_train_steps", STEPS // 2, "--lr_scheduler", "constant", "--train_batch_size"]
    whole = ["--max_train_steps", STEPS, "--lr_scheduler", "constant", "--train_batch_size"]
    one, two = (1, 4), (2, 2)
    for name, first, then in (("alone", one, one), ("fewer", two, one), ("more", one, two)):
        for length, (processes, batch) in ((half, first), (whole, then)):
            finish(start(log, processes, *command(name, *length, batch)))
    assert losses(tmp_path / "fewer") == pytest.approx(losses(tmp_path / "alone"), abs=1e-4)
    assert losses(tmp_path / "more") == pytest.approx(losses(tmp_path / "alone"), abs=1e-4)


# --- what is refused, and what is reported --------------------------------------------------------------------------


def test_a_changed_run_is_refused_with_the_list_of_what_differs(train_run, tmp_path):
    train_run("out", "--max_train_steps", 1, "--seed", 1)
    other = write_captioned_folder(tmp_path / "other", {"1.png": "a red t-shirt"})
    with pytest.raises(UserError) as refused:
        train_run("out", "--max_train_steps", 1, "--learning_rate", 1e-4, "--seed", 2, dataset=other)
    said = str(refused.value)
    assert "learning_rate: 1e-05 there, 0.0001 here" in said and "seed_asked: 1 there, 2 here" in said
    assert "other pictures, masks, repeats" in said and "--overwrite" in said and "base model" not in said


def test_overwrite_that_was_killed_does_not_mix_two_runs(train_run, monkeypatch):
    """Killed after the old run's run.json is gone: its checkpoints count as another run's."""
    out = train_run("out", "--max_train_steps", 3, "--checkpointing_steps", 2)
    (out / "run.json").unlink()
    with pytest.raises(UserError, match="checkpoint-2 is not of this run"):
        train_run("out", "--max_train_steps", 2, "--learning_rate", 1e-4)
    assert (out / "checkpoint-2").is_dir()


def test_a_lora_that_overwrites_a_whole_model_leaves_no_part_of_it(train_run):
    train_run("out", "--max_train_steps", 1)
    out = train_run("out", "--max_train_steps", 1, "--lora_rank", 2, "--overwrite")
    assert not (out / "unet").exists() and not (out / "model_index.json").exists()


def test_the_average_goes_on_exactly_after_a_skipped_step(train_run, monkeypatch):
    from training import train as training

    real = training.diffusion_loss

    def spoil(first: int) -> None:
        taken = [first]

        def spoiled(unet, objective, batch):
            taken[0] += 1
            return real(unet, objective, batch) * (float("nan") if taken[0] == 2 else 1)

        monkeypatch.setattr(training, "diffusion_loss", spoiled)

    usual = ["--use_ema", "--checkpointing_steps", 2, "--lr_scheduler", "constant", "--seed", 1]
    spoil(0)
    whole = train_run("whole", "--max_train_steps", 6, *usual)
    spoil(0)
    train_run("out", "--max_train_steps", 3, *usual)
    spoil(2)
    assert_same_bits(whole, train_run("out", "--max_train_steps", 6, *usual), 6)


def test_overwrite_begins_anew_where_another_run_was(train_run):
    train_run("out", "--max_train_steps", 3, "--checkpointing_steps", 2)
    out = train_run("out", "--max_train_steps", 2, "--learning_rate", 1e-4, "--overwrite")
    assert len(rows(out)) == 2 and not list(out.glob("checkpoint-*"))
    assert json.loads((out / "run.json").read_text())["arguments"]["learning_rate"] == 1e-4


def test_a_dry_run_with_overwrite_removes_nothing(train_run):
    out = train_run("out", "--max_train_steps", 2, "--checkpointing_steps", 2)
    train_run("out", "--max_train_steps", 2, "--learning_rate", 1e-4, "--overwrite", "--dry_run")
    assert (out / "checkpoint-2").is_dir() and len(rows(out)) == 2


def test_a_flipped_bit_is_found_and_the_checkpoint_before_is_taken(train_run, capsys):
    usual = ["--checkpointing_steps", 2, "--lr_scheduler", "constant", "--seed", 1]
    whole = train_run("whole", "--max_train_steps", 8, *usual)
    out = train_run("out", "--max_train_steps", 6, *usual)
    weights = out / "checkpoint-6" / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    train_run("out", "--max_train_steps", 8, *usual)
    said = capsys.readouterr().out
    assert "checkpoint-6 cannot be used (unet/diffusion_pytorch_model.safetensors is damaged" in said
    assert "going on after step 4" in said
    assert losses(out) == losses(whole)


def test_a_half_written_checkpoint_is_named_and_removed(train_run, capsys):
    usual = ["--checkpointing_steps", 2, "--lr_scheduler", "constant"]
    out = train_run("out", "--max_train_steps", 2, *usual)
    shutil.copytree(out / "checkpoint-2", out / ".partial-4")
    train_run("out", "--max_train_steps", 3, *usual)
    assert ".partial-4 was being written" in capsys.readouterr().out and not (out / ".partial-4").exists()


def test_a_checkpoint_of_another_folder_is_taken_only_from_the_same_run(train_run, tmp_path):
    usual = ["--checkpointing_steps", 2, "--lr_scheduler", "constant"]
    train_run("first", "--max_train_steps", 2, *usual)
    there = ["--resume_from_checkpoint", tmp_path / "first" / "checkpoint-2"]
    out = train_run("second", "--max_train_steps", 3, *usual, *there)
    assert [row["step"] for row in rows(out)] == [3]
    with pytest.raises(UserError, match="another run's:\n  learning_rate"):
        train_run("third", "--max_train_steps", 3, *usual, *there, "--learning_rate", 1e-4)


def test_a_command_that_names_a_checkpoint_goes_on_when_it_is_repeated_and_does_not_rewind(
    train_run, tmp_path, capsys
):
    usual = ["--checkpointing_steps", 2, "--lr_scheduler", "constant"]
    train_run("first", "--max_train_steps", 2, *usual)
    there = ["--resume_from_checkpoint", tmp_path / "first" / "checkpoint-2"]
    train_run("out", "--max_train_steps", 6, *usual, *there)
    out = train_run("out", "--max_train_steps", 8, *usual, *there)
    assert "checkpoint-2 before, and goes on from checkpoint-6" in capsys.readouterr().out
    assert [row["step"] for row in rows(out)] == [3, 4, 5, 6, 7, 8]
    train_run("out", "--max_train_steps", 9, *usual, "--resume_from_checkpoint", "checkpoint-4")
    said = capsys.readouterr().out
    assert all(f"removes checkpoint-{later}, which lies after step 4" in said for later in (6, 8))


def test_a_command_that_names_a_checkpoint_goes_on_when_that_has_been_pruned(train_run):
    usual = ["--checkpointing_steps", 2, "--lr_scheduler", "constant", "--checkpoints_total_limit", 2]
    train_run("out", "--max_train_steps", 2, *usual)
    again = [*usual, "--resume_from_checkpoint", "checkpoint-2"]
    out = train_run("out", "--max_train_steps", 6, *again)
    assert not (out / "checkpoint-2").exists()
    assert len(rows(train_run("out", "--max_train_steps", 8, *again))) == 8


def test_a_checkpoint_to_begin_from_is_never_overlooked(train_run, tmp_path):
    out = train_run("out", "--max_train_steps", 2, "--checkpointing_steps", 2)
    other = ["--max_train_steps", 4, "--learning_rate", 1e-4, "--overwrite", "--resume_from_checkpoint"]
    with pytest.raises(UserError, match="no such folder"):
        train_run("out", *other, tmp_path / "nowhere")
    with pytest.raises(UserError, match="--overwrite would remove it"):
        train_run("out", *other, "checkpoint-2")
    assert (out / "checkpoint-2").is_dir()


def test_overwrite_removes_another_run_and_not_the_same(train_run, capsys):
    flags = ["--max_train_steps", 2, "--checkpointing_steps", 2, "--lr_scheduler", "constant", "--overwrite"]
    train_run("out", *flags)
    out = train_run("out", *flags, "--max_train_steps", 3)
    assert "--overwrite removes only another" in capsys.readouterr().out and len(rows(out)) == 3


def test_a_model_that_was_not_trained_here_is_not_overwritten(train_run, tiny_model, tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").write_text("somebody's")
    with pytest.raises(UserError, match="holds a model that was not trained here"):
        train_run("lora", "--max_train_steps", 1)
    shutil.copytree(tiny_model, tmp_path / "out")
    with pytest.raises(UserError, match="holds a model that was not trained here"):
        train_run("out", "--max_train_steps", 1)
    assert json.loads((train_run("out", "--max_train_steps", 1, "--overwrite") / "run.json").read_text())["finished"]


# --- two at once ----------------------------------------------------------------------------------------------------


@pytest.mark.multiprocess
def test_a_second_run_into_the_same_folder_is_refused_by_name(command, tmp_path):
    out, long = tmp_path / "out", [*LORA, "--max_train_steps", 100_000]
    first = Background(tmp_path / "log", *command("out", *long)).until(lambda: count_rows(out) >= 1)
    second = Background(tmp_path / "log2", *command("out", *long))
    assert second.ended() == 2
    assert f"process {first.pid} on this host trains into it" in (tmp_path / "log2").read_text()
    before = count_rows(out)
    assert first.until(lambda: count_rows(out) > before).send(signal.SIGTERM).ended() == 75


@pytest.mark.multiprocess
def test_two_runs_that_share_a_cache_do_not_spoil_it(command, tmp_path):
    shared = ["--latents_cache_dir", tmp_path / "cache", "--lr_scheduler", "constant"]
    both = [Background(tmp_path / f"log{name}", *command(name, *LORA, *shared)) for name in "ab"]
    assert [run.ended() for run in both] == [0, 0]
    assert Background(tmp_path / "log", *command("alone", *LORA, "--lr_scheduler", "constant")).ended() == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b") == losses(tmp_path / "alone")
    assert not list((tmp_path / "cache").rglob(".*"))


def test_a_reading_process_that_dies_is_one_line_and_no_hang(train_run, monkeypatch, capsys):
    from runtime.errors import exit_with
    from training import encoding

    monkeypatch.setattr(encoding, "load_pixel_values", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(SystemExit) as ended:
        exit_with(lambda: train_run("out", "--max_train_steps", 1, "--dataloader_num_workers", 2))
    assert ended.value.code == 1
    assert "--dataloader_num_workers" in capsys.readouterr().err.splitlines()[-1]

"""What changes under a run ends it with a checkpoint and the name of what changed; the same command goes on."""

import os
import shutil
from pathlib import Path

import pytest

from background import Background, count_rows, start
from captioned_folder import write_captioned_folder
from run_folder import assert_same_tensors, losses, rows
from runtime.errors import InputChanged, WorkError
from training import train as training
from training.encoding import LatentCache

STEPS = 6
USUAL = ["--max_train_steps", STEPS, "--learning_rate", 1e-3, "--seed", 0, "--train_batch_size", 3]
LORA = ["--lora_rank", 2, "--lr_scheduler", "constant"]


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_captioned_folder(tmp_path / "data")


@pytest.fixture
def after_step(monkeypatch):
    """`after_step(n, change)` calls `change()` once, when step `n` (from 1) is computed and not yet logged."""

    def choose(number: int, change) -> None:
        real, taken = training.train_step, [0]

        def step(*arguments):
            result = real(*arguments)
            taken[0] += 1
            if taken[0] == number:
                change()
            return result

        monkeypatch.setattr(training, "train_step", step)

    return choose


def checkpoint_of(out: Path) -> int:
    """The step of the only checkpoint."""
    [checkpoint] = out.glob("checkpoint-*")
    assert (checkpoint / "manifest.json").is_file()
    return int(checkpoint.name.removeprefix("checkpoint-"))


@pytest.fixture(params=["--cache", "--no_cache"])
def whole(request, train_run, folder) -> tuple[Path, list]:
    """A run that nothing happened to, and its flags."""
    flags = [*USUAL, *LORA, request.param]
    return train_run("whole", *flags, dataset=folder), flags


@pytest.mark.parametrize("whole", ["--cache"], indirect=True)
def test_encodings_that_vanish_are_named_and_made_again_by_the_same_command(train_run, tmp_path, after_step, whole):
    (expected, flags), out = whole, tmp_path / "out"
    after_step(2, lambda: shutil.rmtree(out / "cache"))
    with pytest.raises(WorkError, match=r"\.safetensors: no such file any more.*saved in checkpoint-\d") as ended:
        train_run("out", *flags, dataset=tmp_path / "data")
    assert "\n" not in str(ended.value) and 2 <= len(rows(out)) == checkpoint_of(out) <= 3
    train_run("out", *flags, dataset=tmp_path / "data")
    assert losses(out) == losses(expected)


def delete(picture: Path) -> None:
    picture.unlink()


def spoil(picture: Path) -> None:
    picture.write_bytes(b"rubbish")


def replace(picture: Path) -> None:
    """By another of the same size in bytes, with the old times."""
    before = picture.stat()
    content = bytearray(picture.read_bytes())
    content[-10] ^= 1
    picture.write_bytes(content)
    os.utime(picture, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = [(delete, "no such file any more"), (spoil, "another picture"), (replace, "another picture")]


@pytest.mark.parametrize("whole", ["--no_cache"], indirect=True)
@pytest.mark.parametrize(("change", "fault"), CHANGES, ids=["deleted", "rubbish", "replaced"])
def test_a_picture_that_changes_is_named_and_never_trained_on(
    train_run, tmp_path, folder, after_step, whole, change, fault
):
    (expected, flags), out, picture = whole, tmp_path / "out", folder / "11 (2).JPG"
    before = picture.read_bytes()
    after_step(2, lambda: change(picture))
    with pytest.raises(WorkError, match=rf"11 \(2\)\.JPG: {fault}.*step 2 of 6, saved in checkpoint-2"):
        train_run("out", *flags, dataset=folder)
    assert checkpoint_of(out) == len(rows(out)) == 2
    picture.write_bytes(before)
    train_run("out", *flags, dataset=folder)
    assert losses(out) == losses(expected)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("change", "fault"), CHANGES, ids=["deleted", "rubbish", "replaced"])
def test_a_picture_that_changes_while_it_is_encoded_is_named_and_not_kept(
    train_run, tmp_path, folder, monkeypatch, workers, change, fault
):
    real = LatentCache.store

    def store(self, images, *arguments):
        change(folder / "11 (3).JPG")  # its content is known by now
        return real(self, images, *arguments)

    monkeypatch.setattr(LatentCache, "store", store)
    with pytest.raises(InputChanged, match=rf"11 \(3\)\.JPG: {fault}") as ended:
        train_run("out", *USUAL, "--dataloader_num_workers", workers, dataset=folder)
    assert "\n" not in str(ended.value)
    assert len(list((tmp_path / "out" / "cache" / "latents").iterdir())) == 2


def test_held_out_pictures_are_read_before_the_first_step_and_may_go(train_run, tmp_path, folder, after_step):
    held_out = write_captioned_folder(tmp_path / "held out", {"a.png": "a red t-shirt"})
    after_step(1, lambda: shutil.rmtree(held_out))
    flags = [*USUAL, *LORA, "--no_cache", "--validation_dir", held_out, "--validation_steps", 2]
    out = train_run("out", *flags, dataset=folder)
    assert [row["step"] for row in rows(out) if "val_loss" in row] == [2, 4, 6]


@pytest.mark.parametrize("whole", ["--cache", "--no_cache"], indirect=True)
def test_an_output_folder_that_is_moved_is_named_and_no_step_is_lost(train_run, tmp_path, after_step, whole):
    (expected, flags), out = whole, tmp_path / "out"
    after_step(2, lambda: shutil.move(out, tmp_path / "moved"))
    with pytest.raises(WorkError, match="/out: moved or removed.*checkpoint-[23]"):
        train_run("out", *flags, dataset=tmp_path / "data")
    assert checkpoint_of(out) in (2, 3)
    train_run("out", *flags, dataset=tmp_path / "data")
    assert_same_tensors(expected, out, "pytorch_lora_weights.safetensors")


def test_an_output_folder_that_is_moved_before_the_first_step_is_named(train_run, tmp_path, folder, monkeypatch):
    real, out = LatentCache.store, tmp_path / "out"

    def store(self, *arguments):
        shutil.move(out, tmp_path / "moved")
        return real(self, *arguments)

    monkeypatch.setattr(LatentCache, "store", store)
    with pytest.raises(WorkError, match="/out: moved or removed"):
        train_run("out", *USUAL, dataset=folder)


@pytest.mark.multiprocess
def test_a_picture_that_one_process_cannot_read_ends_both_after_the_same_step(tiny_model, folder, tmp_path):
    log, out = tmp_path / "log", tmp_path / "out"
    where = ["--pretrained_model_name_or_path", tiny_model, "--dataset", folder, "--output_dir", out]
    both = start(log, 2, *where, *LORA, "--no_cache", "--max_train_steps", 100_000, "--train_batch_size", 1)
    both[0].until(lambda: count_rows(out) >= 2)
    (folder / "11 (1).JPG").unlink()
    assert [process.ended() for process in both] == [1, 1]
    assert checkpoint_of(out) == count_rows(out)
    for process in both:
        said = process.log.read_text()
        assert "11 (1).JPG: no such file any more" in said and "Traceback" not in said


@pytest.fixture(autouse=True)
def nothing_goes_on():
    yield
    for run in Background.started:
        run.kill()

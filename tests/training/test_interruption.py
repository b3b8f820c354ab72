"""What changes under a run ends it with a checkpoint and the name of what changed; the same command goes on."""

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from background import TRAIN, Background, count_rows, start
from captioned_folder import write_captioned_folder
from run_folder import assert_same_tensors, losses, rows
from runtime.errors import InputChanged, WorkError
from runtime.locking import _start_time, this_process
from training import samples
from training import train as training
from training.encoding import PictureCache
from training.metrics import MetricsLog

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


@pytest.mark.parametrize("whole", ["--cache"], indirect=True)
def test_a_damaged_shard_ends_the_run_by_its_name_and_is_made_again_alone(train_run, tmp_path, after_step, whole):
    (expected, flags), out = whole, tmp_path / "out"
    shard = []

    def damage() -> None:
        [path] = (out / "cache" / "pictures").iterdir()
        content = path.read_bytes()
        begin = 8 + int.from_bytes(content[:8], "little")
        path.write_bytes(content[:begin] + bytes(byte ^ 1 for byte in content[begin:]))
        shard.append(path)

    after_step(2, damage)
    with pytest.raises(WorkError, match=r"shard-\w+\.safetensors: damaged.*saved in checkpoint-\d"):
        train_run("out", *flags, dataset=tmp_path / "data")
    captions = {path: path.stat().st_mtime_ns for path in (out / "cache" / "captions").iterdir()}
    assert not shard[0].exists()
    train_run("out", *flags, dataset=tmp_path / "data")
    assert losses(out) == losses(expected) and shard[0].exists()
    assert captions == {path: path.stat().st_mtime_ns for path in (out / "cache" / "captions").iterdir()}


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
    real = PictureCache.store

    def store(self, *arguments):
        change(folder / "11 (3).JPG")  # its content is known by now
        return real(self, *arguments)

    monkeypatch.setattr(PictureCache, "store", store)
    with pytest.raises(InputChanged, match=rf"11 \(3\)\.JPG: {fault}") as ended:
        train_run("out", *USUAL, "--dataloader_num_workers", workers, dataset=folder)
    assert "\n" not in str(ended.value)
    [shard] = (tmp_path / "out" / "cache" / "pictures").iterdir()
    assert len(load_file(shard)) == 2


def test_held_out_pictures_are_read_before_the_first_step_and_may_go(train_run, tmp_path, folder, after_step):
    held_out = write_captioned_folder(tmp_path / "held out", {"a.png": "a red t-shirt"})
    after_step(1, lambda: shutil.rmtree(held_out))
    flags = [*USUAL, *LORA, "--no_cache", "--validation_dir", held_out, "--validation_steps", 2]
    out = train_run("out", *flags, dataset=folder)
    assert [row["step"] for row in rows(out) if "val_loss" in row] == [2, 4, 6]


@pytest.mark.parametrize("whole", ["--cache", "--no_cache"], indirect=True)
def test_an_output_folder_that_is_moved_is_followed_with_its_rows_and_no_step_is_lost(
    train_run, tmp_path, after_step, whole
):
    (expected, flags), out, moved = whole, tmp_path / "out", tmp_path / "moved"

    def move() -> None:
        shutil.move(out, moved)
        out.mkdir()  # whatever is there now is nobody's to write into

    after_step(2, move)
    with pytest.raises(WorkError, match="/out: moved to .*/moved .*--output_dir .*/moved.*checkpoint-[23]"):
        train_run("out", *flags, dataset=tmp_path / "data")
    assert not list(out.iterdir()) and checkpoint_of(moved) == len(rows(moved)) >= 2
    (moved / ".lock").unlink()  # ours until this process ends
    train_run("moved", *flags, dataset=tmp_path / "data")
    assert losses(moved) == losses(expected)
    assert_same_tensors(expected, moved, "pytorch_lora_weights.safetensors")


def test_an_output_folder_that_is_removed_is_made_again_with_its_lock_for_a_checkpoint(
    train_run, tmp_path, folder, after_step
):
    out = tmp_path / "out"
    after_step(2, lambda: shutil.rmtree(out))
    with pytest.raises(WorkError, match="/out: removed.*checkpoint-[23]"):
        train_run("out", *USUAL, *LORA, dataset=folder)
    assert checkpoint_of(out) in (2, 3) and json.loads((out / ".lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(("left", "said"), [(".lock", "on this host"), ("run.json", "another run's folder")])
def test_another_run_that_has_taken_the_place_of_a_removed_folder_is_left_alone(
    train_run, tmp_path, folder, after_step, left, said
):
    out = tmp_path / "out"
    content = json.dumps({**this_process(), "pid": os.getppid(), "started": _start_time(os.getppid())})

    def replace_folder() -> None:
        shutil.rmtree(out)
        out.mkdir()
        (out / left).write_text(content)

    after_step(2, replace_folder)
    with pytest.raises(WorkError, match=f"{said}.*removed|removed.*{said}"):
        train_run("out", *USUAL, *LORA, "--no_cache", dataset=folder)
    assert (out / left).read_text() == content and not list(out.glob("checkpoint-*"))


def test_an_output_folder_that_is_moved_before_the_first_step_is_named(train_run, tmp_path, folder, monkeypatch):
    real, out = PictureCache.store, tmp_path / "out"

    def store(self, *arguments):
        shutil.move(out, tmp_path / "moved")
        return real(self, *arguments)

    monkeypatch.setattr(PictureCache, "store", store)
    with pytest.raises(WorkError, match="/out: moved to .*/moved"):
        train_run("out", *USUAL, dataset=folder)


def test_rows_that_find_no_folder_any_more_go_where_it_was_moved(train_run, tmp_path, folder, monkeypatch):
    real, out, moved = MetricsLog.write, tmp_path / "out", tmp_path / "moved"

    def write(self, row):
        if row.step == 3:
            shutil.move(out, moved)
        return real(self, row)

    monkeypatch.setattr(MetricsLog, "write", write)
    with pytest.raises(WorkError, match="/out: moved to .*/moved .*checkpoint-3"):
        train_run("out", *USUAL, *LORA, "--no_cache", dataset=folder)
    assert checkpoint_of(moved) == len(rows(moved)) == 3 and not out.exists()


@pytest.mark.parametrize(("error", "shown"), [(KeyError("a bug"), KeyError), (OSError(5, "I/O error"), WorkError)])
def test_batches_that_cannot_be_made_end_the_run_with_a_checkpoint(
    train_run, tmp_path, folder, after_step, monkeypatch, error, shown
):
    def fail(*_):
        raise error

    after_step(2, lambda: monkeypatch.setattr(samples, "make_batch", fail))
    with pytest.raises(shown) as ended:
        train_run("out", *USUAL, *LORA, "--no_cache", dataset=folder)
    said = [str(ended.value), *getattr(ended.value, "__notes__", [])]
    assert checkpoint_of(tmp_path / "out") == 2 and "checkpoint-2" in said[-1]


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


FAILING = """import os, runpy, sys
from pathlib import Path
from training import samples

real, fail = samples.make_batch, Path(sys.argv[0]).with_name("fail")

def make_batch(*arguments):
    if os.environ["RANK"] == "1" and fail.exists():
        raise RuntimeError("the reader broke")
    return real(*arguments)

samples.make_batch = make_batch
runpy.run_path({train!r}, run_name="__main__")
"""


@pytest.mark.multiprocess
def test_a_bug_where_one_process_makes_batches_costs_no_step_and_is_named_by_all(tiny_model, folder, tmp_path):
    log, out, script = tmp_path / "log", tmp_path / "out", tmp_path / "failing.py"
    script.write_text(FAILING.format(train=str(TRAIN)))
    where = ["--pretrained_model_name_or_path", tiny_model, "--dataset", folder, "--output_dir", out]
    both = start(log, 2, *where, *LORA, "--max_train_steps", 100_000, "--train_batch_size", 1, script=script)
    both[0].until(lambda: count_rows(out) >= 2)
    (tmp_path / "fail").touch()
    assert [process.ended() for process in both] == [1, 1]
    assert checkpoint_of(out) == count_rows(out)
    main, other = (process.log.read_text() for process in both)
    assert "error: another process failed: RuntimeError: the reader broke" in main and "checkpoint-" in main
    assert "Traceback" in other and "Traceback" not in main and "Connection" not in main


@pytest.fixture(autouse=True)
def nothing_goes_on():
    yield
    for run in Background.started:
        run.kill()

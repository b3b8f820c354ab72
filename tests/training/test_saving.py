"""A disk that is full costs no steps: the run gives up with a checkpoint, and its result is whole or not there."""

import errno
import shutil
from types import SimpleNamespace

import pytest

from models import loading
from run_folder import assert_same_tensors, losses, rows
from runs.disk_space import MARGIN, RESERVE, DiskSpace, hold_reserve, release_reserve
from runs.records import read_run
from runtime.errors import WorkError
from runtime.files import write_error
from training import metrics, saving, validation

FULL = OSError(errno.ENOSPC, "No space left on device")
USUAL = ["--max_train_steps", 6, "--learning_rate", 1e-3, "--checkpointing_steps", 100, "--seed", 0]
NUMBERS = r"needs .*B, .*B are free.*"  # of a message


@pytest.fixture
def refuse(monkeypatch):
    """`refuse(module, name, calls)`: these calls (from 1) of the function end as on a full disk."""

    def patch(module, name, calls, error=FULL) -> None:
        real, made = getattr(module, name), []

        def refusing(*args, **settings):
            made.append(args)
            if len(made) in calls:
                raise error
            return real(*args, **settings)

        monkeypatch.setattr(module, name, refusing)

    return patch


def goes_on_as_if_nothing_had_been(train_run, name, *flags) -> None:
    whole, out = (train_run(run, *USUAL, *flags) for run in ("whole", name))
    assert losses(out) == losses(whole) and [row["step"] for row in rows(out)] == list(range(1, 7))
    assert_same_tensors(whole, out, "unet/*.safetensors")
    assert not list(out.glob(".*"))


def test_rows_that_cannot_be_written_end_the_run_with_a_checkpoint_of_the_last_step(train_run, tmp_path, refuse):
    refuse(metrics, "append_whole", calls=[4, 5])  # step 4, and once more before the run gives up
    with pytest.raises(WorkError, match=rf"out: metrics\.jsonl .*{NUMBERS}checkpoint-4"):
        train_run("out", *USUAL)
    assert len(rows(tmp_path / "out")) == 4 and not (tmp_path / "out" / RESERVE).exists()
    goes_on_as_if_nothing_had_been(train_run, "out")


def test_where_not_even_the_checkpoint_can_be_written_one_line_says_so(train_run, tmp_path, refuse):
    refuse(metrics, "append_whole", calls=range(4, 100))
    refuse(saving, "save_checkpoint", calls=[1])
    with pytest.raises(WorkError, match=r"metrics\.jsonl .*step 4 could not be saved .*no checkpoint"):
        train_run("out", *USUAL)
    assert len(rows(tmp_path / "out")) == 3 and not (tmp_path / "out" / "checkpoint-4").exists()


def test_a_checkpoint_is_worth_more_than_its_rows(train_run, refuse):
    whole = train_run("whole", *USUAL)
    refuse(metrics, "append_whole", calls=[4, 5])
    with pytest.raises(WorkError, match=r"metrics\.jsonl .*goes on from checkpoint-4"):
        train_run("out", *USUAL)
    (whole.parent / "out" / ".lock").unlink()  # ours until this process ends
    out = train_run("out", *USUAL)
    assert losses(out) == losses(whole)
    assert_same_tensors(whole, out, "unet/*.safetensors")


def test_validation_pictures_that_cannot_be_written_cost_no_step_and_no_loss(
    train_run, tmp_path, refuse, few_sampling_steps
):
    flags = ["--validation_prompts", "jeans", "--validation_steps", 3]
    error = write_error(tmp_path / "out" / "validation", "step-000003-0.png", FULL, "more than 1 kB")
    refuse(validation, "save_image", [2], error)
    with pytest.raises(WorkError, match=rf"step-000003-0\.png .*{NUMBERS}checkpoint-3"):
        train_run("out", *USUAL, *flags)
    assert "train_fixed_loss" in rows(tmp_path / "out")[2]
    goes_on_as_if_nothing_had_been(train_run, "out", *flags)


@pytest.mark.parametrize("kind", [["--use_ema"], ["--lora_rank", 2]], ids=["EMA", "LoRA"])
def test_a_result_that_cannot_be_written_leaves_a_checkpoint_of_the_last_step(train_run, tmp_path, refuse, kind):
    refuse(saving, "_move_content", [1])
    with pytest.raises(WorkError, match=rf"out: the result .*{NUMBERS}checkpoint-6"):
        train_run("out", *USUAL, *kind)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"cache", "metrics.jsonl", "run.json", "checkpoint-6", ".lock"}
    (tmp_path / "out" / ".lock").unlink()  # ours until this process ends
    goes_on_as_if_nothing_had_been(train_run, "out", *kind)


def test_whatever_fails_at_the_end_the_line_says_where_the_trained_weights_are(
    train_run, tmp_path, refuse, monkeypatch
):
    refuse(loading, "_save_other_parts", [1, 2], RuntimeError("no such part"))
    with pytest.raises(WorkError, match="could not be saved: no such part; .*whole in checkpoint-6"):
        train_run("out", *USUAL)
    assert not list((tmp_path / "out").glob("unet*"))
    monkeypatch.setattr(saving, "_save_last_checkpoint", lambda *args: None)  # as where only the result has room
    with pytest.raises(WorkError, match="no such part; the trained UNet is whole in .*tight/unet-6"):
        train_run("tight", *USUAL)
    assert_same_tensors(tmp_path / "out" / "checkpoint-6" / "unet", tmp_path / "tight" / "unet-6", "*.safetensors")


def test_an_earlier_result_stays_whole_until_the_next_one_is(train_run, tmp_path, refuse):
    out = train_run("out", *USUAL, "--checkpointing_steps", 6)
    before = shutil.copytree(out / "unet", tmp_path / "before")
    refuse(saving, "_move_content", [1])
    with pytest.raises(WorkError, match="the result"):
        train_run("out", *USUAL, "--checkpointing_steps", 6, "--max_train_steps", 8)
    assert_same_tensors(before, out / "unet", "*.safetensors")


def test_a_whole_result_leaves_no_checkpoint_that_was_not_asked_for(train_run):
    out = train_run("out", *USUAL)
    assert read_run(out)["finished"] and not list(out.glob("checkpoint-*")) and not list(out.glob(".*"))


def test_the_checkpoint_of_the_last_step_does_not_take_the_room_of_the_result(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(saving, "_save_checkpoint", lambda *args: written.append(args))
    run = SimpleNamespace(folder=tmp_path, space=DiskSpace(checkpoint=1000, kept=0, needed=0, free=0, result=500))
    for free, tried in ((400, 1), (600, 1), (1600, 2)):  # with 600 only the result fits
        monkeypatch.setattr(saving.shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        saving._save_last_checkpoint(run, None, 6)
        assert len(written) == tried


# --- The reserve ----------------------------------------------------------------------------------------------------


def test_the_reserve_takes_the_room_of_a_checkpoint_and_gives_it_back(tmp_path):
    space = DiskSpace(checkpoint=5 << 20, kept=1, needed=0, free=0)
    hold_reserve(tmp_path, space)
    if not (tmp_path / RESERVE).exists():
        pytest.skip("this file system gives no room that is not written")
    assert (tmp_path / RESERVE).stat().st_blocks * 512 >= (5 << 20) + MARGIN
    release_reserve(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_reserve_leaves_room_for_the_result(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path).free
    hold_reserve(tmp_path, DiskSpace(checkpoint=1000, kept=1, needed=0, free=0, result=free))
    assert not list(tmp_path.iterdir())

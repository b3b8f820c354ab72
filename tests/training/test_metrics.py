"""The start table, metrics.jsonl and the estimate."""

import json
import re
import resource
import threading
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from runtime.errors import WriteError
from runtime.progress import format_duration
from training import metrics
from training.metrics import MetricsLog, StepResult, keep_rows
from training.metrics import _ignore_tensorboard as ignore_tensorboard
from training.summary import _origins_line as origins_line

NORM = torch.tensor(1.0)


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def log_of(folder, first_step=0, read_every=1, is_main=True, track=lambda row, step: None) -> MetricsLog:
    """Of a run of 12 steps of 6 pictures."""
    run = SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cpu"), log=track),
        plan=SimpleNamespace(steps=12, samples_per_step=6),
        resume=SimpleNamespace(first_step=first_step),
        folder=folder,
        is_main=is_main,
        epoch_after=lambda step: step / 3,
        learning_rate_at=lambda step: 1e-5,
    )
    log = MetricsLog(run)
    log.read_every = read_every
    return log


def take(log: MetricsLog, step: int, loss: torch.Tensor, measured: dict | None = None) -> None:
    """As the training loop does it."""
    log.add(step, StepResult(loss, NORM))
    log.add_measured(measured or {})
    if log.is_due(step):
        write(log)


def write(log: MetricsLog) -> None:
    for row in log.collect_rows():
        log.write(row)


@pytest.mark.parametrize("read_every", [1, 5, 100])
def test_there_is_one_row_for_each_step_however_seldom_losses_are_read(tmp_path, read_every):
    log = log_of(tmp_path, read_every=read_every)
    for step in range(1, 13):
        take(log, step, torch.tensor(step * 0.5))
    write(log)
    log.close()
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 13))
    assert [row["train_loss"] for row in rows(tmp_path)] == [step * 0.5 for step in range(1, 13)]
    keys = {"step", "epoch", "train_loss", "lr", "images_per_second", "peak_memory_gb"}
    assert all(row.keys() == keys and row["images_per_second"] > 0 for row in rows(tmp_path))


def test_rows_are_on_disk_after_flush_not_only_at_the_end(tmp_path):
    log = log_of(tmp_path, read_every=100)
    take(log, 1, torch.tensor(1.0))
    write(log)
    assert len(rows(tmp_path)) == 1


def test_a_loss_kept_for_later_is_not_the_tensor_that_goes_on_changing(tmp_path):
    log, loss = log_of(tmp_path, read_every=2), torch.tensor(1.0, requires_grad=True)
    take(log, 1, loss * 2)
    take(log, 2, loss * 3)
    assert [row["train_loss"] for row in rows(tmp_path)] == [2.0, 3.0]


def test_a_resumed_run_drops_the_rows_it_will_write_again_and_a_line_cut_in_two(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"step": {step}}}\n' for step in range(1, 8)) + '{"step": 8, "tr'
    )
    log = log_of(tmp_path, first_step=4)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]
    take(log, 5, torch.tensor(1.0))
    write(log)
    log.close()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]


def test_only_the_main_process_writes(tmp_path):
    log = log_of(tmp_path, is_main=False)
    for step in range(1, 13):
        take(log, step, torch.tensor(1.0))
    write(log)
    log.close()
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("read_every", [1, 10])
def test_after_the_first_steps_it_says_once_how_long_it_will_take(tmp_path, capsys, read_every):
    log = log_of(tmp_path, read_every=read_every)
    for step in range(1, 13):
        take(log, step, torch.tensor(1.0))
    write(log)
    log.close()
    assert capsys.readouterr().out.count("a step: about") == 1


def test_in_a_log_file_the_bar_is_not_printed_again_at_each_step(tmp_path, capsys):
    log = log_of(tmp_path)
    for step in range(1, 13):
        take(log, step, torch.tensor(1.0))
    write(log)
    log.close()
    said = capsys.readouterr().err
    assert said.count("training:") <= 4 and "12/12" in said and "loss=1.0000" in said


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "1 s"), (45, "45 s"), (600, "10 min"), (7200, "2.0 h")])
def test_durations_are_in_the_unit_one_would_say(seconds, text):
    assert format_duration(seconds) == text


def test_values_are_listed_by_where_they_come_from():
    origins = {"epochs": "flag", "use_ema": "file", "seed": "flag"}
    assert origins_line({"epochs": 3, "use_ema": True, "seed": 1}, origins, "flag") == "epochs=3 seed=1"
    assert origins_line({}, {}, "flag") == "none"
    assert origins_line({"prior_prompts": ["a", "b"]}, {"prior_prompts": "file"}, "file") == "prior_prompts=(2)"


def test_keeping_rows_of_a_run_without_any_makes_an_empty_file(tmp_path):
    keep_rows(tmp_path / "metrics.jsonl", 0)
    assert rows(tmp_path) == []


def test_a_non_finite_loss_is_null_in_its_row(tmp_path):
    log = log_of(tmp_path, read_every=2)
    take(log, 1, torch.tensor(1.0))
    take(log, 2, torch.tensor(float("nan")))
    assert [row["train_loss"] for row in rows(tmp_path)] == [1.0, None]


def test_a_tracker_is_given_each_row_with_its_step(tmp_path):
    tracked = []
    log = log_of(tmp_path, track=lambda row, step: tracked.append((step, row)))
    take(log, 1, torch.tensor(1.0), {"val_loss": 0.5})
    log.close()
    [(step, row)] = tracked
    assert step == 1 and row["train_loss"] == 1.0 and row["val_loss"] == 0.5 and "step" not in row
    assert rows(tmp_path)[0]["val_loss"] == 0.5


def test_a_tracker_that_fails_is_left_out_from_then_on_and_said_once(tmp_path, capsys):
    def fail(row, step):
        if log.run.accelerator.trackers:
            raise OSError(28, "No space left on device")

    log = log_of(tmp_path, track=fail)
    log.run.accelerator.trackers = ["tensorboard"]
    for step in range(1, 4):
        take(log, step, torch.tensor(1.0))
    assert len(rows(tmp_path)) == 3 and log.run.accelerator.trackers == []
    [warning] = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "--report_to" in warning and "No space left" in warning


def test_a_tracker_whose_folder_cannot_be_made_does_not_end_the_run(train_run, tmp_path, capsys):
    pytest.importorskip("tensorboard")
    (tmp_path / "file").touch()
    out = train_run(
        "out", "--max_train_steps", 1, "--report_to", "tensorboard", "--logging_dir", tmp_path / "file" / "x"
    )
    assert len(rows(out)) == 1 and "--report_to" in capsys.readouterr().err


def test_the_thread_of_a_tracker_that_fails_prints_no_traceback():
    said = []
    hook = ignore_tensorboard(said.append)
    own = threading.Thread()
    trackers = type("Writer", (threading.Thread,), {"__module__": "tensorboard.summary.writer"})()
    for thread in (own, trackers):
        hook(SimpleNamespace(thread=thread))
    assert [args.thread for args in said] == [own]


def test_rows_that_the_disk_refuses_are_written_when_there_is_room_again(tmp_path, monkeypatch):
    log, append = log_of(tmp_path), metrics.append_whole

    def refuse(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(metrics, "append_whole", refuse)
    take(log, 1, torch.tensor(1.0))
    with pytest.raises(WriteError, match=r"metrics\.jsonl .*needs .* free"):
        log.flush()
    monkeypatch.setattr(metrics, "append_whole", append)
    take(log, 2, torch.tensor(1.0))
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


def test_half_a_row_never_stays_in_the_file(tmp_path):
    file = tmp_path / "rows"
    file.write_text("whole\n")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            metrics.append_whole(file, "the next row\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_text() == "whole\n"


def test_the_time_that_measuring_takes_is_not_the_steps(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def wait(seconds: float) -> None:
        clock[0] += seconds

    monkeypatch.setattr("training.metrics.synchronize", lambda: wait(2))  # steps that the device still works on
    log = log_of(tmp_path)
    with log.paused():
        wait(100)
    take(log, 1, torch.tensor(1.0))
    assert rows(tmp_path)[0]["images_per_second"] == 3  # 6 pictures in 2 s


def test_the_bar_shows_a_smoothed_loss(tmp_path, capsys):
    log = log_of(tmp_path)
    for step in range(1, 13):
        take(log, step, torch.tensor(1.0 if step < 12 else 9.0))
    write(log)
    log.close()
    assert "loss=1.4000" in capsys.readouterr().err


def test_pictures_reach_the_trackers_in_the_order_of_their_steps_and_are_named_on_the_console(tmp_path, capsys):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    told: list[tuple] = []

    def log_images(pictures: dict, step: int) -> None:
        told.append(("pictures", step, *pictures["validation/0"].shape))

    log = log_of(tmp_path, read_every=4, track=lambda row, step: told.append(("row", step)))
    tracker = SimpleNamespace(name="wandb", log_images=log_images)
    log.run.accelerator.trackers = [tracker, SimpleNamespace(name="one without pictures")]
    log.add_pictures(0, [tmp_path / "a.png"])
    for step in range(1, 5):
        log.add_pictures(step, [tmp_path / "a.png"] * 2 if step == 3 else [])
        take(log, step, torch.tensor(1.0))
    log.close()
    base, third = ("pictures", 0, 1, 8, 8, 3), ("pictures", 3, 1, 8, 8, 3)
    assert told == [base, ("row", 1), ("row", 2), third, ("row", 3), ("row", 4)]
    said = capsys.readouterr().out
    assert re.search(r"step 0: .*a\.png\n", said) and re.search(r"step 3: .*a\.png and 1 more\n", said)

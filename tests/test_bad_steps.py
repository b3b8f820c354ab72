"""Losses that are no numbers are skipped before the weights are touched, named, counted, and too many end the run."""

import json

import pytest
import torch

import training
from errors import WorkError
from run_folder import rows, weights

USUAL = ["--learning_rate", 1e-3, "--seed", 0, "--train_batch_size", 2]


@pytest.fixture
def spoil(monkeypatch):
    """`spoil(steps)` makes the loss of these steps (from 1) infinite."""

    def choose(*steps: int) -> None:
        taken, real = [0], training.diffusion_loss

        def spoiled(unet, objective, batch):
            taken[0] += 1
            losses = real(unet, objective, batch)
            return losses * float("inf") if taken[0] in steps else losses

        monkeypatch.setattr(training, "diffusion_loss", spoiled)

    return choose


def test_a_bad_step_is_named_skipped_and_counted(train_run, spoil, capsys):
    spoil(2)
    out = train_run("out", "--max_train_steps", 3, *USUAL)
    said = capsys.readouterr().out
    assert "step 2: the loss is inf" in said and "skipped; its pictures: 11 (" in said
    assert [row["train_loss"] is None for row in rows(out)] == [False, True, False]
    assert json.loads((out / "run.json").read_text())["skipped_steps"] == 1
    assert all(tensor.isfinite().all() for tensor in weights(out).values())


def test_a_skipped_step_leaves_weights_and_average_as_they_were(train_run, spoil):
    flags = [*USUAL, "--use_ema", "--checkpointing_steps", 1, "--lr_scheduler", "constant"]
    spoil(2)
    out = train_run("out", "--max_train_steps", 2, *flags)
    for part in ("unet", "unet_ema"):
        before, after = weights(out / "checkpoint-1", part), weights(out / "checkpoint-2", part)
        assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_too_many_in_a_row_end_the_run_and_the_last_checkpoint_is_good(train_run, spoil, tmp_path):
    spoil(3, 4, 6, 7, 8)
    flags = ["--max_train_steps", 9, *USUAL, "--checkpointing_steps", 2, "--max_bad_steps", 3]
    with pytest.raises(WorkError, match=r"step 8: .* 3 of them in a row \(--max_bad_steps\)"):
        train_run("out", *flags)
    assert len(rows(tmp_path / "out")) == 7
    checkpoint = weights(tmp_path / "out" / "checkpoint-6")
    assert all(tensor.isfinite().all() for tensor in checkpoint.values())

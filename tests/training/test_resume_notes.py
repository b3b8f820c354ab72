"""What a run that goes on says of how it differs from one that was never stopped."""

import json
import re

import torch


def test_more_steps_go_on_and_what_the_schedule_does_is_reported(train_run, capsys):
    train_run("out", "--max_train_steps", 4, "--checkpointing_steps", 4)
    train_run("out", "--max_train_steps", 8, "--checkpointing_steps", 4)
    assert re.search(r"4 steps.* 8\b.*cosine", capsys.readouterr().out)


def test_a_run_that_goes_on_with_other_cpu_threads_says_that_the_last_bits_may_differ(train_run, monkeypatch, capsys):
    threads, flags = torch.get_num_threads(), ["--checkpointing_steps", 1, "--lr_scheduler", "constant"]
    train_run("out", "--max_train_steps", 1, *flags)
    train_run("out", "--max_train_steps", 2, *flags)
    assert "CPU threads" not in capsys.readouterr().out
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 3)
    out = train_run("out", "--max_train_steps", 3, *flags)
    said = capsys.readouterr().out
    assert f"OMP_NUM_THREADS={threads} keeps them" in said and "going on after step 2" in said
    record = json.loads((out / "run.json").read_text())
    assert record["cpu_threads"] == threads + 3
    del record["cpu_threads"]  # as of a version that did not know it
    (out / "run.json").write_text(json.dumps(record))
    train_run("out", "--max_train_steps", 4, *flags)
    said = capsys.readouterr().out
    assert "CPU threads" not in said and "going on after step 3" in said


def test_a_run_of_a_version_that_kept_captions_in_fp32_says_what_moved(train_run, capsys):
    flags = ["--checkpointing_steps", 1, "--lr_scheduler", "constant"]
    out = train_run("out", "--max_train_steps", 1, *flags)
    record = json.loads((out / "run.json").read_text())
    assert record.pop("text_dtype") == "float16"
    (out / "run.json").write_text(json.dumps(record))
    train_run("out", "--max_train_steps", 2, *flags, "--no_cache")
    assert "float" not in capsys.readouterr().out
    train_run("out", "--max_train_steps", 3, *flags)
    said = capsys.readouterr().out
    assert "kept in float32 before, now in float16" in said and "going on after step 2" in said

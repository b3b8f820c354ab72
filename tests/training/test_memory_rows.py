"""What a run says of GPU memory: foretold before a weight is loaded, and which flags help where it does not fit."""

import re

import pytest
import torch

from runtime.errors import WorkError
from train_text_to_image import build_parser, parse_args
from training import memory_rows
from training.memory_rows import plan_memory
from training.setup import prepare_run

CARDS = "in 8 GB", "in 12 GB", "in 16 GB", "in 24 GB", "in 48 GB", "in 80 GB"
MB = 10**6


@pytest.fixture
def prepared(tiny_model, captioned_folder, tmp_path):
    """A prepared run of these flags."""

    def prepare(*flags: object):
        usual = ["--pretrained_model_name_or_path", tiny_model, "--dataset", captioned_folder]
        words = [*usual, "--output_dir", tmp_path / "out", *flags]
        return prepare_run(parse_args([str(word) for word in words]))

    return prepare


@pytest.fixture
def gpu_of(monkeypatch):
    """Pretends that the run has a GPU of that many bytes, none of which CUDA's context takes."""

    def pretend(room: int) -> None:
        monkeypatch.setattr(memory_rows, "CONTEXT_BYTES", 0)
        monkeypatch.setattr(memory_rows, "gpu_bytes", lambda run: room)

    return pretend


@pytest.fixture(autouse=True)
def all_optimizers(monkeypatch):
    monkeypatch.setattr("training.setup.find_optimizer_class", lambda *_: None)  # bitsandbytes may be missing


def total(run) -> int:
    return plan_memory(run).forecast.total


def test_a_dry_run_without_timing_foretells_memory_and_loads_no_weight(train_run, monkeypatch, capsys):
    def refuse(*_, **__):
        raise AssertionError("a weight is loaded")

    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", refuse)
    monkeypatch.setattr("training.train.encode_dataset", refuse)
    out = train_run("out", "--use_ema", "--dry_run", "--no_timing")
    printed = capsys.readouterr().out
    assert re.search(r"^GPU memory +[\d.]+ GB, of which weights [\d.]+, optimizer [\d.]+, EMA [\d.]+", printed, re.M)
    assert re.search(r"^GPU context +about 1.5 GB", printed, re.M)
    rows = [line for line in printed.splitlines() if all(card in line for card in CARDS)]
    assert rows[0].startswith("largest batch") and "--gradient_checkpointing" in rows[1]
    assert not out.exists()


def test_fp16_is_foretold_where_there_is_no_gpu(train_run, capsys):
    train_run("out", "--mixed_precision", "fp16", "--dry_run", "--no_timing")
    assert re.search(r"^GPU memory +[\d.]+ GB", capsys.readouterr().out, re.M)


def test_only_a_dry_run_or_a_gpu_foretells_anything(prepared, gpu_of):
    run = prepared()
    assert memory_rows.memory_rows(run) == []
    gpu_of(10**12)
    [(name, line)] = memory_rows.memory_rows(run)
    assert name == "GPU memory" and "activations" in line


def test_the_largest_batch_leaves_room_for_prior_images(prepared):
    """Half as many of the base's own pictures join each step."""
    alone, joined = (memory_rows.memory_rows(prepared("--dry_run", *more)) for more in ((), ("--prior_images", 4)))
    batches = [int(dict(rows)["largest batch"].split(" in ")[0]) for rows in (alone, joined)]
    assert batches[1] == pytest.approx(batches[0] * 2 / 3, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--train_batch_size", 8),
        ("--use_ema", "--mixed_precision", "bf16"),
        ("--mixed_precision", "pure_bf16"),
        ("--use_8bit_adam", "--mixed_precision", "bf16"),
    ],
)
def test_a_run_that_will_not_fit_names_flags_that_exist_and_make_it_fit(prepared, gpu_of, flags):
    run = prepared(*flags)
    room = total(run) * 3 // 4
    gpu_of(room)
    rows = memory_rows.memory_rows(run)
    at = [name for name, _ in rows].index("WILL NOT FIT")
    named = [line.split(":")[0] for _, line in rows[at + 1 :]]
    assert named
    for advised in named:
        known = {option for action in build_parser()._actions for option in action.option_strings}
        assert {word for word in advised.split() if word.startswith("--")} <= known
        assert total(prepared(*flags, *advised.split())) <= room, advised


@pytest.mark.slow
def test_several_flags_are_named_where_none_is_enough_and_no_needless_one(prepared, gpu_of):
    flags = "--train_batch_size", 4, "--use_ema"
    both = total(prepared("--train_batch_size", 1, "--gradient_checkpointing", "--use_ema"))
    gpu_of(both)
    [line] = memory_rows.advice(prepared(*flags), both)
    advised = line.split(":")[0].split()
    assert len([word for word in advised if word.startswith("--")]) > 1 and "--offload_ema" not in advised
    assert total(prepared(*flags, *advised)) <= both
    gpu_of(1)
    [line] = memory_rows.advice(prepared(*flags), 1)
    assert line.endswith("a lower --resolution")


def test_out_of_memory_names_what_takes_less(train_run, monkeypatch, gpu_of):
    gpu_of(10**12)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("training.train.diffusion_loss", full)
    with pytest.raises(
        WorkError, match=r"Tried to allocate.*--gradient_checkpointing: [\d.]+ GB; --optimizer adamw8bit"
    ):
        train_run("out", "--max_train_steps", 1)


def test_a_unet_that_cannot_be_foretold_may_still_train(prepared, monkeypatch):
    def fail(_):
        raise NotImplementedError("no meta kernel\nof this")

    monkeypatch.setattr(memory_rows, "trace_step", fail)
    assert memory_rows.memory_rows(prepared("--dry_run")) == [("GPU memory", "cannot be foretold (no meta kernel)")]


def test_another_failure_stays_what_it_is(train_run, monkeypatch):
    def fail(*_):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr("training.train.diffusion_loss", fail)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train_run("out", "--max_train_steps", 1)

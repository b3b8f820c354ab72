"""--optimizer and --mixed_precision pure_bf16 through the real trainer: resumed to the bit, saved as always."""

import pytest
import torch

from run_folder import assert_same_bits, rows, weights
from runs.records import fingerprint_run
from runtime.errors import UserError
from tiny_model import make_tiny_model
from train_text_to_image import parse_args

USUAL = ["--learning_rate", 1e-3, "--train_batch_size", 2, "--seed", 0, "--lr_scheduler", "constant"]
CHOICES = [
    ["--optimizer", "adafactor"],
    ["--optimizer", "adafactor", "--mixed_precision", "bf16"],
    ["--optimizer", "adafactor", "--lora_rank", 2],
    ["--optimizer", "adafactor", "--mixed_precision", "pure_bf16", "--use_ema"],
    ["--mixed_precision", "pure_bf16", "--use_ema"],
    ["--mixed_precision", "pure_bf16", "--gradient_accumulation_steps", 2],
]


@pytest.mark.parametrize("flags", CHOICES, ids=lambda flags: " ".join(map(str, flags)))
def test_six_steps_and_six_more_end_with_the_bits_of_twelve(train_run, flags):
    saved = [*USUAL, *flags, "--checkpointing_steps", 6, "--validation_steps", 6]
    whole = train_run("whole", *saved, "--max_train_steps", 12)
    train_run("parts", *saved, "--max_train_steps", 6)
    parts = train_run("parts", *saved, "--max_train_steps", 12)
    assert_same_bits(whole, parts, 12)


@pytest.mark.slow
def test_bf16_weights_and_adafactor_learn_as_fp32_and_adamw_do(train_run, tmp_path):
    """tests/README.md has the same with the starter."""
    base = make_tiny_model(tmp_path / "base", "v_prediction")
    usual = ["--max_train_steps", 60, "--learning_rate", 3e-3, "--seed", 0, "--validation_steps", 30]
    full = rows(train_run("full", *usual, model=base))
    for optimizer in ("adamw", "adafactor"):
        flags = ["--mixed_precision", "pure_bf16", "--optimizer", optimizer]
        half = rows(train_run(optimizer, *usual, *flags, model=base))
        assert half[-1]["train_fixed_loss"] < 1.03 * full[-1]["train_fixed_loss"]
        assert half[-1]["train_fixed_loss"] < 0.95 * half[29]["train_fixed_loss"]


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_pure_bf16_trains_bf16_weights_and_its_result_is_fp32(train_run, optimizer):
    flags = ["--mixed_precision", "pure_bf16", "--optimizer", optimizer, "--checkpointing_steps", 2]
    out = train_run("out", *USUAL, *flags, "--max_train_steps", 2)
    assert {tensor.dtype for tensor in weights(out / "checkpoint-2").values()} == {torch.bfloat16}
    result = weights(out)
    assert {tensor.dtype for tensor in result.values()} == {torch.float32}
    assert all(torch.equal(tensor.float(), result[name]) for name, tensor in weights(out / "checkpoint-2").items())


def test_the_average_of_bf16_weights_is_kept_and_saved_in_fp32(train_run):
    flags = ["--mixed_precision", "pure_bf16", "--use_ema", "--checkpointing_steps", 4, "--max_train_steps", 4]
    out = train_run("out", *USUAL, *flags)
    average = weights(out / "checkpoint-4", "unet_ema")
    assert {tensor.dtype for tensor in average.values()} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in average.values())
    assert all(torch.equal(tensor, average[name]) for name, tensor in weights(out).items())


def arguments(*flags: str, model=None):
    return parse_args(["--dataset", "x", *(["--pretrained_model_name_or_path", str(model)] if model else []), *flags])


def test_the_old_name_of_the_8_bit_optimizer_is_the_new_one():
    for flags in (["--use_8bit_adam"], ["--optimizer", "adamw8bit"], ["--use_8bit_adam", "--optimizer", "adamw8bit"]):
        args = arguments(*flags)
        assert (args.optimizer, args.use_8bit_adam) == ("adamw8bit", True)
    assert (arguments().optimizer, arguments().use_8bit_adam) == ("adamw", False)


def test_the_fingerprint_knows_an_optimizer_by_one_name_alone():
    def fingerprint(*flags: str) -> str:
        return fingerprint_run({"arguments": vars(arguments(*flags))})

    before = {name: value for name, value in vars(arguments()).items() if name != "optimizer"}
    assert fingerprint() == fingerprint("--optimizer", "adamw") == fingerprint_run({"arguments": before})
    before["use_8bit_adam"] = True
    assert fingerprint("--optimizer", "adamw8bit") == fingerprint_run({"arguments": before}) != fingerprint()
    assert fingerprint("--optimizer", "adafactor") not in (fingerprint(), fingerprint("--use_8bit_adam"))


def test_a_flag_wins_over_the_models_own_optimizer_by_either_name(tmp_path):
    (tmp_path / "training_defaults.json").write_text('{"use_8bit_adam": true}')
    assert arguments(model=tmp_path).optimizer == "adamw8bit"
    args = arguments("--optimizer", "adafactor", model=tmp_path)
    assert (args.optimizer, args.use_8bit_adam) == ("adafactor", False)
    (tmp_path / "training_defaults.json").write_text('{"optimizer": "adamw8bit"}')
    assert arguments("--no_use_8bit_adam", model=tmp_path).optimizer == "adamw"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--use_8bit_adam", "--optimizer", "adafactor"], "--optimizer adafactor and --use_8bit_adam"),
        (["--no_use_8bit_adam", "--optimizer", "adamw8bit"], "--optimizer adamw8bit and --no_use_8bit_adam"),
        (["--mixed_precision", "pure_bf16", "--optimizer", "adamw8bit"], "adamw or adafactor"),
        (["--mixed_precision", "pure_bf16", "--lora_rank", "4"], "take bf16"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(flags, named):
    with pytest.raises(UserError, match=named):
        arguments(*flags)

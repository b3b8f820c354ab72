"""--compile: the same run, to rounding, with everything that changes the UNet; what is saved has plain names.

The blocks go through torch.compile without code generation (`aot_eager`), which takes seconds; one test generates it.
"""

import shutil

import pytest
import torch

from models import compiling
from run_folder import assert_same_bits, losses, weights
from runs.records import NOT_IN_FINGERPRINT
from runtime.errors import UserError
from tiny_model import tiny_unet
from train_text_to_image import parse_args
from training.validation import FixedNoiseLoss

USUAL = ["--learning_rate", 1e-3, "--train_batch_size", 2, "--seed", 0, "--lr_scheduler", "constant"]
WITH = {
    "two sizes": [],
    "checkpointing": ["--gradient_checkpointing"],
    "bf16": ["--mixed_precision", "bf16", "--use_ema"],
    "pure_bf16": ["--mixed_precision", "pure_bf16", "--optimizer", "adafactor"],
    "LoRA": ["--lora_rank", 2],
}


@pytest.fixture
def without_code(monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def two_shapes(tmp_path_factory):
    """Three pictures, one of them landscape."""
    from PIL import Image

    from captioned_folder import write_captioned_folder

    folder = write_captioned_folder(tmp_path_factory.mktemp("shapes") / "data")
    file = min(folder.glob("*.JPG"))
    with Image.open(file) as image:
        image.rotate(90, expand=True).save(file)
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("without_code")
@pytest.mark.parametrize("flags", WITH.values(), ids=WITH)
def test_a_compiled_run_is_the_same_run_and_resumes_to_the_same_bits(train_run, two_shapes, flags, capsys):
    saved = [*USUAL, *flags, "--checkpointing_steps", 3, "--validation_steps", 3]
    plain = train_run("plain", *saved, "--max_train_steps", 6, dataset=two_shapes)
    whole = train_run("whole", *saved, "--max_train_steps", 6, "--compile", dataset=two_shapes)
    assert "compiling took" in capsys.readouterr().out
    train_run("parts", *saved, "--max_train_steps", 3, "--compile", dataset=two_shapes)
    parts = train_run("parts", *saved, "--max_train_steps", 6, "--compile", dataset=two_shapes)
    assert_same_bits(whole, parts, 6)
    assert losses(whole) == pytest.approx(losses(plain), rel=0.02 if "bf16" in str(flags) else 1e-4)
    files = [path.relative_to(plain) for path in plain.glob("**/*.safetensors") if "cache" not in path.parts]
    assert files == [path.relative_to(whole) for path in whole.glob("**/*.safetensors") if "cache" not in path.parts]


@pytest.mark.slow
@pytest.mark.usefixtures("without_code")
def test_what_is_compiled_keeps_its_names_and_the_validation_uses_it(train_run, tiny_model, monkeypatch):
    compiled_calls = []
    measure = FixedNoiseLoss.measure

    def noted(self, unet, *arguments):
        compiled_calls.append(any(module._compiled_call_impl for module in unet.modules()))
        return measure(self, unet, *arguments)

    monkeypatch.setattr(FixedNoiseLoss, "measure", noted)
    out = train_run("out", *USUAL, "--max_train_steps", 1, "--compile")
    assert weights(out).keys() == weights(tiny_model).keys() and compiled_calls == [True]


@pytest.mark.slow
@pytest.mark.usefixtures("without_code")
def test_the_repeated_blocks_are_compiled_once_for_sizes_that_change():
    unet = tiny_unet()
    compiling.compile_blocks(unet)
    names = {type(module).__name__ for module in unet.modules() if module._compiled_call_impl}
    assert names == set(compiling.REPEATED_BLOCKS)
    seconds = [compiling.compile_seconds()]
    for height, width in ((8, 8), (12, 8), (8, 10), (16, 12), (12, 20)):
        unet(torch.randn(2, 4, height, width), torch.tensor([5]), torch.randn(2, 77, 16))
        seconds.append(compiling.compile_seconds())
    assert seconds[0] < seconds[1] < seconds[2] <= seconds[3] == seconds[4] == seconds[5]


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="on a CPU --compile needs a C++ compiler")
def test_generated_code_learns_as_the_plain_unet_does(train_run, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(compiling, "REPEATED_BLOCKS", ("BasicTransformerBlock",))  # all of them take minutes
    plain, compiled = (
        train_run(name, *USUAL, "--max_train_steps", 3, *flags) for name, flags in (("a", []), ("b", ["--compile"]))
    )
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)


def test_it_changes_no_fingerprint_and_needs_a_compiler(train_run, monkeypatch):
    assert "compile" in NOT_IN_FINGERPRINT and not parse_args(["--dataset", "x"]).compile
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="--compile needs a C"):
        train_run("out", *USUAL, "--compile")

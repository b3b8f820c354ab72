"""What diffusers' own tests of its example script ask of it, asked of ours with the flags they use.

One thing differs on purpose: a run resumed at or past its last step trains nothing (theirs takes one step too many).
"""

import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from train_text_to_image import parse_args
from training.train import train

USUAL = """--resolution 64 --center_crop --random_flip --train_batch_size 1 --gradient_accumulation_steps 1
--learning_rate 5.0e-04 --scale_lr --lr_scheduler constant --lr_warmup_steps 0 --seed=0"""


@pytest.fixture
def run(tiny_model, captioned_folder, tmp_path):
    def run(flags: str) -> Path:
        where = ["--pretrained_model_name_or_path", tiny_model, "--dataset_name", captioned_folder]
        train(parse_args([*map(str, where), "--output_dir", str(tmp_path / "out"), *USUAL.split(), *flags.split()]))
        return tmp_path / "out"

    return run


def checkpoints(folder: Path) -> set[str]:
    return {name for name in os.listdir(folder) if "checkpoint" in name}


def generates(pipeline: StableDiffusionPipeline) -> bool:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline("a prompt", num_inference_steps=1, height=64, width=64).images[0].size == (64, 64)


@pytest.mark.parametrize("ema", ["", "--use_ema"])
def test_checkpoints_are_written_usable_and_resumed_from_by_name(run, tiny_model, ema):
    out = run(f"--max_train_steps 4 --checkpointing_steps=2 {ema}")
    assert generates(StableDiffusionPipeline.from_pretrained(out, safety_checker=None))
    assert checkpoints(out) == {"checkpoint-2", "checkpoint-4"}
    unet = UNet2DConditionModel.from_pretrained(out, subfolder="checkpoint-2/unet")
    assert generates(
        StableDiffusionPipeline.from_pretrained(tiny_model, unet=unet, safety_checker=None).to(unet.dtype)
    )
    shutil.rmtree(out / "checkpoint-2")
    run(f"--max_train_steps 2 --checkpointing_steps=1 --resume_from_checkpoint=checkpoint-4 {ema}")
    assert generates(StableDiffusionPipeline.from_pretrained(out, safety_checker=None))
    assert checkpoints(out) == {"checkpoint-4"}


def test_the_limit_on_checkpoints_holds(run):
    out = run("--max_train_steps 6 --checkpointing_steps=2 --checkpoints_total_limit=2")
    assert checkpoints(out) == {"checkpoint-4", "checkpoint-6"}


def test_a_limit_that_comes_later_removes_several(run):
    out = run("--max_train_steps 4 --checkpointing_steps=2")
    assert checkpoints(out) == {"checkpoint-2", "checkpoint-4"}
    run(
        "--max_train_steps 8 --checkpointing_steps=2 --resume_from_checkpoint=checkpoint-4 --checkpoints_total_limit=2"
    )
    assert checkpoints(out) == {"checkpoint-6", "checkpoint-8"}
    assert generates(StableDiffusionPipeline.from_pretrained(out, safety_checker=None))


def test_a_lora_run_keeps_the_limit_and_its_file_loads(run, tiny_model):
    lora = "--lora_rank 4 --num_validation_images=0 --checkpointing_steps=2"
    out = run(f"{lora} --max_train_steps 4")
    run(f"{lora} --max_train_steps 8 --resume_from_checkpoint=checkpoint-4 --checkpoints_total_limit=2")
    assert checkpoints(out) == {"checkpoint-6", "checkpoint-8"}
    assert (out / "pytorch_lora_weights.safetensors").is_file()
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    pipeline.load_lora_weights(out)
    assert generates(pipeline.to(torch.float32))

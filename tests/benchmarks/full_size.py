"""Stable Diffusion's size through the real script: random weights, a few steps, save; prints time and peak memory.

python tests/benchmarks/full_size.py
python tests/benchmarks/full_size.py --flags= --flags="--mixed_precision bf16" --flags=--gradient_checkpointing
python tests/benchmarks/full_size.py --model xl --resolution 512 \\
    --flags "--lora_rank 16 --mixed_precision bf16 --gradient_checkpointing"

A line for each --flags. Takes a few minutes each, 16 GB of memory (20 GB with --use_ema) and 8 GB of disk in the
temporary folder (TMPDIR).
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "text_to_image"), str(ROOT / "tests"), str(ROOT / "tests" / "benchmarks")]


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, output = Path(folder) / args.model, Path(folder) / "out"
        print("making the model ...", flush=True)
        # In a process of its own, so that its memory does not count.
        subprocess.run([sys.executable, __file__, "--model", args.model, "--make_model", model], check=True)
        for flags in args.flags or [""]:
            command = [
                sys.executable, ROOT / "text_to_image" / "train_text_to_image.py",
                "--pretrained_model_name_or_path", model, "--dataset", args.dataset, "--output_dir", output,
                "--resolution", args.resolution, "--max_train_steps", args.steps, "--train_batch_size", "1",
                "--no_validation_pictures", "--no_report", *shlex.split(flags),
            ]  # fmt: skip
            started = time.perf_counter()
            subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
            report(flags, time.perf_counter() - started, output, args.resolution)
            shutil.rmtree(output)  # some settings make the same run: the next one must not find it finished


def report(flags: str, seconds: float, output: Path, resolution: int) -> None:
    """One line for README: the whole script's time, its memory, and the time of the last step alone."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    memory = json.loads((output / "run.json").read_text())["peak_memory_gb"]
    print(
        f"{flags or 'defaults'}: {resolution} px, batch 1, {len(rows)} steps: {seconds:.0f} s in all, "
        f"{1 / rows[-1]['images_per_second']:.1f} s for the last step, {memory:.1f} GB at most",
        flush=True,
    )


def make_model(folder: Path) -> None:
    """SD 1.5's layer sizes (UNet of 859.5 M parameters) with random weights, in fp16 as it is usually kept."""
    import torch
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from runtime.paths import STARTER
    from tiny_model import sd_scheduler

    torch.set_default_dtype(torch.float16)
    stages = (128, 256, 512, 512)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=stages,
        layers_per_block=2,
        sample_size=512,
    )
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer.from_pretrained(STARTER / "tokenizer"),
        unet=UNet2DConditionModel(sample_size=64, cross_attention_dim=768),
        scheduler=sd_scheduler("epsilon"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)


def parse_args() -> argparse.Namespace:
    description, *details = __doc__.split("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog="\n\n".join(details), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--dataset", type=Path, default=ROOT / "dataset", help="captioned pictures (default: dataset/)"
    )
    parser.add_argument("--model", choices=("sd15", "xl"), default="sd15", help="whose size (default: sd15)")
    parser.add_argument("--resolution", type=int, default=256, help="pixels (default: 256)")
    parser.add_argument("--steps", type=int, default=2, help="optimisation steps (default: 2)")
    parser.add_argument("--flags", action="append", help="further flags of the script, in one word; repeatable")
    parser.add_argument("--make_model", type=Path, help="only write the model into this folder")
    return parser.parse_args()


if __name__ == "__main__":
    asked = parse_args()
    if asked.make_model and asked.model == "xl":
        import torch
        from one_file_size import make_xl

        make_xl(asked.make_model, torch.float16)
    elif asked.make_model:
        make_model(asked.make_model)
    else:
        main()

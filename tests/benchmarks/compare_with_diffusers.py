"""Our trainer beside diffusers' example: steps per second of whole runs, and the loss of the UNets that come out.

python tests/benchmarks/compare_with_diffusers.py --script diffusers/examples/text_to_image/train_text_to_image.py
python tests/benchmarks/compare_with_diffusers.py --script … --model sd15 --resolution 256 --batch 1 --steps 4 \\
    --rounds_only          (the model: tests/benchmarks/full_size.py --make_model sd15)

`speed` runs both with square crops, no random affine and all else at its default; `equal` takes from ours what
theirs does not have (short captions, dropout, stored encodings, the cosine) and compares what was learned on 64 fixed
triples of picture, noise and timestep. Runs alternate, each number is the median.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[1:1] = [str(ROOT / "text_to_image")]

from data.images import load_pixel_values  # noqa: E402
from data.random_numbers import keyed_generator  # noqa: E402
from metadata.reading import read_captions  # noqa: E402
from models.conditions import Conditions, whole_picture  # noqa: E402
from models.loading import (  # noqa: E402
    load_noise_scheduler,
    load_prompt_encoder,
    load_unet,
    load_vae,
    quiet_libraries,
)
from runtime.paths import STARTER  # noqa: E402
from training.objective import Objective, diffusion_loss  # noqa: E402
from training.samples import Batch  # noqa: E402

OURS = ROOT / "text_to_image" / "train_text_to_image.py"
EQUAL = ["--no_short_captions", "--caption_dropout", "0", "--no_cache", "--max_token_chunks", "1", "--no_use_ema"]
TRIPLES = 64


def run(script: Path, args: argparse.Namespace, precision: str, to: Path, further: list[str]) -> float:
    """Trains and returns the seconds of the whole run, start and saving included."""
    command = [
        script, "--pretrained_model_name_or_path", args.model, "--train_data_dir", args.dataset, "--output_dir", to,
        "--resolution", args.resolution, "--center_crop", "--train_batch_size", args.batch, "--seed", 0,
        "--max_train_steps", args.steps, "--learning_rate", args.learning_rate, "--lr_scheduler", "constant",
        "--lr_warmup_steps", 0, "--mixed_precision", precision, "--checkpointing_steps", 10**6, *further,
    ]  # fmt: skip
    begun = time.perf_counter()
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{script} failed:\n{done.stderr[-3000:]}")
    return time.perf_counter() - begun


@torch.no_grad()
def fixed_loss(unet_folder: Path, args: argparse.Namespace) -> float:
    """The mean loss on TRIPLES fixed (picture, noise, timestep), the same for every UNet."""
    base, rows = Path(args.model), read_captions(args.dataset)
    unet, vae, noise_scheduler = load_unet(unet_folder).eval(), load_vae(base), load_noise_scheduler(base)
    text, size = load_prompt_encoder(base, 1).encode([row.captions[0] for row in rows]), args.resolution
    pixels = torch.stack([load_pixel_values(row.path(args.dataset), args.resolution, args.resolution) for row in rows])
    latents = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    total = 0.0
    for i in range(TRIPLES):
        picture, timestep = i % len(rows), (2 * i + 1) * len(noise_scheduler) // (2 * TRIPLES)
        noise = torch.randn(latents[:1].shape, generator=keyed_generator(0, "benchmark", i))
        one = slice(picture, picture + 1)
        conditions = Conditions.join(text[one], [whole_picture(size, size)])
        batch = Batch(latents[one], noise, noise, torch.tensor([timestep]), conditions)
        total += diffusion_loss(unet, Objective(noise_scheduler), batch).item() / TRIPLES
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", type=Path, required=True, help="diffusers' train_text_to_image.py")
    parser.add_argument("--model", type=Path, default=STARTER, help="a pipeline folder")
    parser.add_argument("--dataset", type=Path, default=ROOT / "dataset", help="a captioned folder")
    parser.add_argument("--resolution", type=int, default=128, help="pixels, of the square both train on")
    parser.add_argument("--batch", type=int, default=4, help="pictures at once")
    parser.add_argument("--steps", type=int, default=100, help="optimisation steps of each run")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="constant")
    parser.add_argument("--precisions", nargs="+", default=["no", "bf16"], help="no, bf16")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, alternating")
    parser.add_argument("--rounds_only", action="store_true", help="speed alone, nothing about the loss")
    args = parser.parse_args()
    quiet_libraries()
    plain = ["--prior_images", "0", "--random_affine", "0", "--no_use_ema"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        for precision in args.precisions:
            seconds: dict[str, list[float]] = {"theirs": [], "ours": []}
            for turn in range(args.rounds):
                seconds["theirs"].append(run(args.script, args, precision, out / f"theirs-{precision}-{turn}", []))
                seconds["ours"].append(run(OURS, args, precision, out / f"ours-{precision}-{turn}", plain))
            rates = {who: args.steps / statistics.median(took) for who, took in seconds.items()}
            print(json.dumps({
                "precision": precision, "steps_per_second": {who: round(rate, 3) for who, rate in rates.items()},
                "ours_to_theirs": round(rates["ours"] / rates["theirs"], 2),
            }), flush=True)  # fmt: skip
            if args.rounds_only:
                continue
            # In bf16 this compares our bf16 copy of fp32 weights with their autocast.
            equal = out / f"equal-{precision}"
            run(OURS, args, precision, equal, [*plain, *EQUAL])
            places = {"base": Path(args.model), "ours": equal, "theirs": out / f"theirs-{precision}-0"}
            losses = {who: round(fixed_loss(place, args), 5) for who, place in places.items()}
            print(json.dumps({"precision": precision, "fixed_noise_loss": losses}), flush=True)


if __name__ == "__main__":
    main()

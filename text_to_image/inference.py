"""Draws pictures with a Stable Diffusion model: the newest that was trained
here, or any other by name.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from errors import UserError, exit_with, require_packages
from flags import FlagParser, given_flags, non_negative_float, positive_int, seed
from model_defaults import GENERATION_DEFAULTS, GUIDANCE_SCALE, STARTER, merge_defaults
from runs import newest_finished_run, read_run

EXAMPLES = """\
  python text_to_image/inference.py --prompt "denim jeans"

  python text_to_image/inference.py --num_images 16 --seed 100 \\
    --prompt "A single pair of denim jeans laid flat on a white background" \\
    --prompt "denim jeans" --negative_prompt "blurred"

  python text_to_image/inference.py --prompt "denim jeans" \\
    --model stable-diffusion-v1-5/stable-diffusion-v1-5 --height 768 --width 512
"""
SAMPLES = Path(__file__).resolve().parents[1] / "Generated_sample"
NOT_FROM_THE_MODEL = {"batch_size", "height", "model", "num_images", "output_dir", "prompt", "seed", "width"}


def build_parser() -> FlagParser:
    parser = FlagParser("inference.py [--prompt TEXT] [flags]", __doc__, EXAMPLES)
    add_everyday_flags(parser.add_argument_group("everyday"))
    add_drawing_flags(parser.add_argument_group("how they are drawn"))
    return parser


def add_everyday_flags(group) -> None:
    group.add_argument(
        "--prompt", action="append", metavar="TEXT",
        help="what to draw, repeatable (default: the captions' first sentences, where the model was trained here)",
    )  # fmt: skip
    group.add_argument(
        "--model", metavar="MODEL",
        help="a diffusers folder or a hub id (default: the newest finished run in output/, else the starter)",
    )  # fmt: skip
    group.add_argument(
        "--num_images", type=positive_int, default=4, metavar="N", help="pictures of each prompt (default: 4)"
    )
    group.add_argument(
        "--seed", type=seed, default=0, metavar="N",
        help="picture i of a prompt (from 0) is drawn with seed N + i (default: 0)",
    )  # fmt: skip
    group.add_argument(
        "--output_dir", type=Path, default=SAMPLES, metavar="FOLDER",
        help="where pictures, images.jsonl and contact_sheet.jpg go (default: Generated_sample/ of this repository)",
    )  # fmt: skip


def add_drawing_flags(group) -> None:
    group.add_argument("--steps", type=positive_int, default=25, metavar="N", help="denoising steps (default: 25)")
    group.add_argument(
        "--guidance_scale", type=non_negative_float, default=GUIDANCE_SCALE, metavar="X",
        help=f"how closely to follow the prompt; 1 or less: no guidance, half the time (default: {GUIDANCE_SCALE})",
    )  # fmt: skip
    group.add_argument(
        "--negative_prompt", default="", metavar="TEXT", help="what to steer away from (default: nothing)"
    )
    group.add_argument("--height", type=positive_int, metavar="PX", help="(default: the size most trained on)")
    group.add_argument("--width", type=positive_int, metavar="PX", help="(default: the size most trained on)")
    group.add_argument(
        "--batch_size", type=positive_int, default=4, metavar="N",
        help="pictures at once: memory and speed, not the result (default: 4)",
    )  # fmt: skip


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, checked, with the model and the prompts filled in; `origins` says where each comes from."""
    parser = build_parser()
    given = given_flags(parser, argv)
    model = given.get("model") or str(newest_finished_run() or STARTER)
    run = read_run(Path(model).expanduser()) or {}
    prompts = given.get("prompt") or run.get("example_prompts")
    if not prompts:
        raise UserError(f"--prompt is needed: {model} was not trained here, so there is no caption to draw")
    known = {**given, "model": model, "prompt": prompts}
    return merge_defaults(parser, known, Path(model).expanduser() / GENERATION_DEFAULTS, NOT_FROM_THE_MODEL)


def main() -> None:
    args = parse_args()
    require_packages()
    from generating import generate

    generate(args)


if __name__ == "__main__":
    exit_with(main)

"""Draws pictures with a Stable Diffusion model: the newest that was trained
here, or any other by name.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from generation.request_list import GenerationRequest, read_requests
from models.defaults import GENERATION_DEFAULTS, GUIDANCE_SCALE, merge_defaults
from models.samplers import DEFAULT_SAMPLER, SAMPLERS
from runs.records import newest_finished_run, newest_run, read_run
from runtime.errors import UserError, exit_with, require_packages
from runtime.flags import (
    FlagParser,
    YesNo,
    expanded_path,
    given_flags,
    non_negative_float,
    positive_int,
    seed_int,
    utf8_text,
    zero_to_one,
)
from runtime.paths import GENERATED, STARTER
from runtime.stopping import StopSignals

EXAMPLES = """\
  python text_to_image/inference.py --prompt "denim jeans"

  python text_to_image/inference.py --num_images 16 --seed 100 \\
    --prompt "A single pair of denim jeans laid flat on a white background" \\
    --prompt "denim jeans" --negative_prompt "blurred"

  python text_to_image/inference.py --prompts_file dataset/metadata.jsonl \\
    --num_images 80 --resume --write_metadata --output_dir synthetic

  python text_to_image/inference.py --prompt "denim jeans" \\
    --model stable-diffusion-v1-5/stable-diffusion-v1-5 --height 768 --width 512

  python text_to_image/inference.py --prompt "denim jeans" --checkpoint latest
"""
FROM_THE_MODEL = {"guidance_rescale", "guidance_scale", "negative_prompt", "scheduler", "steps"}


def build_parser() -> FlagParser:
    parser = FlagParser("inference.py [--prompt TEXT] [flags]", __doc__, EXAMPLES)
    add_everyday_flags(parser.add_argument_group("everyday"))
    add_model_flags(parser.add_argument_group("what draws"))
    add_drawing_flags(parser.add_argument_group("how they are drawn"))
    add_speed_flags(parser.add_argument_group("speed and memory"))
    add_file_flags(parser.add_argument_group("files"))
    return parser


# fmt: off


def add_everyday_flags(group) -> None:
    flag = group.add_argument
    flag("--prompt", action="append", type=utf8_text, metavar="TEXT",
         help="what to draw, repeatable (default, where the model was trained here: short forms of a caption, and "
              "three captions)")
    flag("--prompts_file", type=expanded_path, metavar="FILE",
         help="more prompts: a text file with one a line; or *.jsonl with a prompt (or text) in each row and, as it "
              "likes, negative_prompt, seed, steps, guidance_scale, num_images, height, width; a data set's "
              "metadata.jsonl is one")
    flag("--model", metavar="MODEL",
         help="a run's folder, any diffusers folder or a hub id (default: the newest finished run in output/, else "
              "the starter)")
    flag("--num_images", type=positive_int, default=4, metavar="N", help="pictures of each prompt (default: 4)")
    flag("--seed", type=seed_int, default=0, metavar="N",
         help="picture i of a prompt (from 0) is drawn with seed N + i (default: 0)")
    flag("--output_dir", type=expanded_path, default=GENERATED, metavar="FOLDER",
         help="where pictures, images.jsonl and contact_sheet.jpg go (default: Generated_sample/ of this repository)")
    flag("--resume", action=YesNo, default=False,
         help="draw only the pictures that are not there yet (default: draw all)")


def add_model_flags(group) -> None:
    flag = group.add_argument
    flag("--checkpoint", metavar="NAME",
         help="a checkpoint of the run in --model: checkpoint-100, or latest; its averaged weights where it has some, "
              "else or as checkpoint-100/unet the weights themselves (default: the run's result)")
    flag("--lora", metavar="FOLDER",
         help="a LoRA on the model: a folder, a .safetensors file or a hub id (default: none)")
    flag("--lora_scale", type=non_negative_float, default=1.0, metavar="X",
         help="how strongly the LoRA counts; 0: not at all (default: 1)")


def add_drawing_flags(group) -> None:
    flag = group.add_argument
    flag("--steps", type=positive_int, default=25, metavar="N", help="denoising steps (default: 25)")
    flag("--scheduler", choices=SAMPLERS, default=DEFAULT_SAMPLER, metavar="NAME",
         help=f"{', '.join(SAMPLERS)} (default: {DEFAULT_SAMPLER})")
    flag("--guidance_scale", type=non_negative_float, default=GUIDANCE_SCALE, metavar="X",
         help=f"how closely to follow the prompt; 1 or less: no guidance, half the time (default: {GUIDANCE_SCALE})")
    flag("--guidance_rescale", type=zero_to_one, default=0.0, metavar="X",
         help="against the glare of strong guidance, for models with zero terminal SNR: 0.7; 0: off (default: 0)")
    flag("--negative_prompt", type=utf8_text, default="", metavar="TEXT",
         help="what to steer away from (default: nothing)")
    flag("--height", type=positive_int, metavar="PX", help="(default: the size most trained on)")
    flag("--width", type=positive_int, metavar="PX", help="(default: the size most trained on)")
    flag("--safety_checker", action=YesNo, default=True,
         help="where the model brings one, a picture it objects to is black and named (default: yes)")


def add_speed_flags(group) -> None:
    flag = group.add_argument
    flag("--batch_size", type=auto_or_positive_int, default="auto", metavar="N",
         help="pictures at once: memory and speed, not the result; halved where memory does not suffice (default: "
              "auto: 16 on a GPU, 4 on a CPU)")
    flag("--dtype", choices=("fp16", "bf16", "fp32"), metavar="NAME",
         help="fp16, bf16 or fp32, of the UNet and the text encoder (default: fp16 on a GPU, fp32 on a CPU)")
    flag("--compile", action=YesNo, default=False,
         help="torch.compile the UNet: minutes at first, then faster; for hundreds of pictures (default: no)")


def add_file_flags(group) -> None:
    flag = group.add_argument
    flag("--format", choices=("png", "jpg"), default="png", metavar="NAME",
         help="png, or jpg: a tenth of the size, not the exact pixels (default: png)")
    flag("--write_metadata", action=YesNo, default=False,
         help="also write metadata.jsonl, so that the folder is a data set to train on (default: no)")


# fmt: on


def auto_or_positive_int(text: str) -> str | int:
    return text if text == "auto" else positive_int(text)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, checked, with the model filled in, and `wishes`: what is to be drawn.

    `origins` says where each value comes from. UserError.
    """
    parser = build_parser()
    given = given_flags(parser, argv)
    known = {**given, **choose_model(given)}
    folder = Path(known["model"]).expanduser()
    run = read_run(folder) or {}
    wishes = [GenerationRequest(prompt) for prompt in given.get("prompt", ())]
    wishes += read_requests(given["prompts_file"]) if "prompts_file" in given else ()
    wishes = wishes or [GenerationRequest(prompt) for prompt in run.get("example_prompts", ())]
    if not wishes:
        raise UserError(f"--prompt is needed: {folder} was not trained here, so there is no caption to draw")
    names = vars(parser.parse_args([]))
    file = defaults_file(folder, run)
    return merge_defaults(parser, {**known, "wishes": wishes}, file, set(names) - FROM_THE_MODEL)


def choose_model(given: dict) -> dict[str, str | None]:
    """--model, and --lora and --checkpoint where they follow from it: without a model the newest run that is finished
    or, for a checkpoint, the newest; a LoRA that was trained here brings its own."""
    model, lora, checkpoint = (given.get(name) for name in ("model", "lora", "checkpoint"))
    if model is None and lora is not None:
        folder = Path(lora).expanduser()
        if read_run(folder):
            return {"model": lora, "lora": None, "checkpoint": checkpoint}
        if read_run(folder.parent):
            return {"model": str(folder.parent), "lora": None, "checkpoint": folder.name}
    newest = newest_run if checkpoint else newest_finished_run
    return {"model": model or str(newest() or STARTER), "lora": lora, "checkpoint": checkpoint}


def defaults_file(folder: Path, run: dict) -> Path:
    """What the model recommends; a run that is not finished has only its base's."""
    own, base = folder / GENERATION_DEFAULTS, Path(run.get("base_model", "")) / GENERATION_DEFAULTS
    return base if run and not own.is_file() else own


def main() -> None:
    args = parse_args()
    require_packages()
    with StopSignals("before the first picture") as stop:
        from generation.generate import generate

        generate(args, stop)


if __name__ == "__main__":
    exit_with(main)

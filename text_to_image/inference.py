"""Generates pictures with a Stable Diffusion model: the newest one that was
trained here, or any other by name.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from generation.request_list import GenerationRequest, PromptsFile, read_requests
from models.defaults import GENERATION_DEFAULTS, GUIDANCE_SCALE, XL_GUIDANCE_SCALE, merge_defaults
from models.samplers import DEFAULT_SAMPLER, SAMPLERS
from runs.records import RESULT_FILES, is_lora, newest_finished_run, newest_run, read_run
from runtime.errors import UserError, exit_with, require_packages
from runtime.flags import (
    FlagParser,
    YesNo,
    absolute_path,
    expanded_path,
    filled_text,
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

  python text_to_image/inference.py --prompt "denim jeans" --checkpoint all
"""
ALL = "all"  # of --checkpoint
# The flags that generation_defaults.json in a model's folder may set.
MODEL_MAY_SET = {"guidance_rescale", "guidance_scale", "negative_prompt", "scheduler", "steps"}


def build_parser() -> FlagParser:
    parser = FlagParser("inference.py [--prompt TEXT] [flags]", __doc__, EXAMPLES)
    add_everyday_flags(parser.add_argument_group("everyday"))
    add_model_flags(parser.add_argument_group("model"))
    add_sampling_flags(parser.add_argument_group("sampling"))
    add_speed_flags(parser.add_argument_group("speed and memory"))
    add_file_flags(parser.add_argument_group("files"))
    return parser


# fmt: off


def add_everyday_flags(group: argparse._ArgumentGroup) -> None:
    flag = group.add_argument
    flag("--prompt", action="append", type=utf8_text, metavar="TEXT",
         help="what the pictures show; may be given several times (default: for a model trained here, captions of its "
              "data set and short forms of one)")
    flag("--prompts_file", type=expanded_path, metavar="FILE",
         help="more prompts: a text file with one prompt per line (kohya's and AUTOMATIC1111's options are read), or "
              "a *.jsonl file with a prompt (or text) in each row; a row may also set negative_prompt, seed, steps, "
              "scheduler, guidance_scale, guidance_rescale, num_images, height and width; the metadata.jsonl or "
              "metadata.csv of a data set works too")
    flag("--model", type=filled_text, metavar="MODEL",
         help="the folder of a training run, a folder in diffusers' format, a hub id, or one .safetensors file "
              "(default: the newest finished run in output/, else the starter model)")
    flag("--num_images", type=positive_int, default=4, metavar="N", help="pictures per prompt (default: 4)")
    flag("--seed", type=seed_int, default=0, metavar="N",
         help="seed of a prompt's first picture; the next ones have N+1, N+2, ... (default: 0)")
    flag("--output_dir", type=expanded_path, default=GENERATED, metavar="FOLDER",
         help="for the pictures, their list, index.html and the sheet (default: Generated_sample/ in this repository)")
    flag("--resume", action=YesNo, default=False,
         help="generate only the pictures that are not in --output_dir yet (default: all of them)")


def add_model_flags(group: argparse._ArgumentGroup) -> None:
    flag = group.add_argument
    flag("--checkpoint", type=filled_text, metavar="NAME",
         help="a checkpoint of the run in --model, such as checkpoint-100 or latest, with its EMA weights if it has "
              "them; checkpoint-100/unet uses the other weights; all compares each checkpoint and the result "
              "(default: the run's result)")
    flag("--embedder", type=filled_text, metavar="MODEL",
         help="with --checkpoint all: also measure likeness to the training pictures by the features of this vision "
              "model, a folder or hub id of DINOv2 or CLIP, and with CLIP likeness to the prompt (default: none)")
    flag("--lora", action="append", type=filled_text, metavar="FOLDER",
         help="a LoRA for the model: a folder, a .safetensors file or a hub id; may be given several times, they add "
              "up (default: none)")
    flag("--lora_scale", action="append", type=non_negative_float, metavar="X",
         help="strength of the LoRA, 0 turns it off; with several --lora one for each, in the same order (default: 1)")
    flag("--tokenizer", type=absolute_path, metavar="FOLDER",
         help="the tokenizer of a --model that is one file: its folder, or one with a tokenizer/ in it (default: "
              "CLIP's, from the hub)")
    flag("--allow_pickle", action="store_true",
         help="convert a --model whose weights are pickles, which can hold code, into output/converted/; a .ckpt file "
              "too (default: refuse it)")


def add_sampling_flags(group: argparse._ArgumentGroup) -> None:
    flag = group.add_argument
    flag("--steps", type=positive_int, default=25, metavar="N", help="denoising steps (default: 25)")
    flag("--scheduler", choices=SAMPLERS, default=DEFAULT_SAMPLER, metavar="NAME",
         help=f"{', '.join(SAMPLERS)} (default: {DEFAULT_SAMPLER})")
    flag("--guidance_scale", type=non_negative_float, metavar="X",
         help="how closely to follow the prompt; 1 or less turns guidance off and takes half the time (default: the "
              f"model's, else {GUIDANCE_SCALE}, XL {XL_GUIDANCE_SCALE})")
    flag("--guidance_rescale", type=zero_to_one, default=0.0, metavar="X",
         help="reduces overexposure by strong guidance, 0 to 1; 0.7 suits models with zero terminal SNR, 0 turns it "
              "off (default: 0)")
    flag("--negative_prompt", type=utf8_text, default="", metavar="TEXT",
         help="what the pictures should not show; needs guidance (default: empty)")
    flag("--height", type=positive_int, metavar="PX",
         help="in pixels (default: of the size that the run trained on most, else the model's own)")
    flag("--width", type=positive_int, metavar="PX",
         help="in pixels (default: as --height)")
    flag("--safety_checker", action=YesNo, default=True,
         help="use the model's safety checker, if it has one: a picture that it flags is replaced by a black one and "
              "listed (default: yes)")


def add_speed_flags(group: argparse._ArgumentGroup) -> None:
    flag = group.add_argument
    flag("--batch_size", type=auto_or_positive_int, default="auto", metavar="N",
         help="pictures generated at once; changes memory and speed, not the pictures; halved when memory runs out "
              "(default: auto, which is 16 on a GPU and 4 on a CPU)")
    flag("--dtype", choices=("fp16", "bf16", "fp32"), metavar="NAME",
         help="precision of the UNet and the text encoder: fp16, bf16 or fp32 (default: fp16 on a GPU, fp32 on a CPU)")
    flag("--compile", action=YesNo, default=False,
         help="compile the UNet with torch.compile: takes minutes, then each step is faster; pays off for hundreds of "
              "pictures (default: no)")


def add_file_flags(group: argparse._ArgumentGroup) -> None:
    flag = group.add_argument
    flag("--format", choices=("png", "jpg"), default="png", metavar="NAME",
         help="png, or jpg for files of a tenth of the size with slightly changed pixels (default: png)")
    flag("--write_metadata", action=YesNo, default=False,
         help="also write metadata.jsonl, which makes the folder a data set to train on (default: no)")


# fmt: on


def auto_or_positive_int(text: str) -> str | int:
    return text if text == "auto" else positive_int(text)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags, checked, with the model filled in.

    `requests` holds the prompts, `prompt_notes` lines about what of their file is not used, `origins` where each value
    is from, `model_named` whether a flag names the model. `lora` and `lora_scale` are lists.

    Raises UserError for wrong flags, prompts or defaults of the model.
    """
    parser = build_parser()
    given: dict[str, Any] = given_flags(parser, argv)
    model_named = bool(given.keys() & {"model", "lora"})
    if 0 < len(given.get("lora_scale", ())) < len(given.get("lora", ())):
        raise UserError("--lora_scale is missing for some of the --lora: give one for each, in the same order")
    if given.get("embedder") and given.get("checkpoint") != ALL:
        raise UserError("--embedder measures the pictures of --checkpoint all; add that, or leave it out")
    given |= choose_model(given)
    folder = Path(given["model"]).expanduser()
    run = read_run(folder) or {}
    given["requests"], given["prompt_notes"] = choose_requests(given, run)
    names = vars(parser.parse_args([]))
    args = merge_defaults(parser, given, defaults_file(folder, run), set(names) - MODEL_MAY_SET)
    lists = {"lora": args.lora or [], "lora_scale": args.lora_scale or []}
    return argparse.Namespace(**{**vars(args), **lists}, model_named=model_named)


def choose_requests(given: dict[str, Any], run: dict[str, Any]) -> PromptsFile:
    """The prompts of the flags and of --prompts_file, else those that the run suggests."""
    file = read_requests(given["prompts_file"]) if "prompts_file" in given else PromptsFile([], [])
    requests = [GenerationRequest(prompt) for prompt in given.get("prompt", ())] + file.requests
    requests = requests or [GenerationRequest(prompt) for prompt in run.get("example_prompts", ())]
    if not requests:
        raise UserError(f"--prompt is needed: {given['model']} was not trained here, so it suggests no prompts")
    return PromptsFile(requests, file.notes)


def choose_model(given: dict[str, Any]) -> dict[str, Any]:
    """--model, with the --lora and --checkpoint that follow from it.

    Without --model: the run that made the first --lora, else the newest finished run (with --checkpoint: the newest
    run), else the starter model.
    """
    model, lora, checkpoint = (given.get(name) for name in ("model", "lora", "checkpoint"))
    if model is None and lora:
        name = lora[0] if Path(lora[0]).name not in RESULT_FILES else str(Path(lora[0]).parent)
        folder = Path(name).expanduser()
        if read_run(folder):
            return {"model": name, "lora": lora[1:], "checkpoint": checkpoint}
        if not folder.is_file() and read_run(folder.parent):
            return {"model": str(folder.parent), "lora": lora[1:], "checkpoint": folder.name}
    newest = None if model else (newest_run if checkpoint else newest_finished_run)()
    if lora and newest and is_lora(read_run(newest) or {}):
        raise UserError(f"--lora {lora[0]}: name its base with --model; the newest run is a LoRA itself")
    return {"model": model or str(newest or STARTER), "lora": lora, "checkpoint": checkpoint}


def defaults_file(folder: Path, run: dict[str, Any]) -> Path:
    """generation_defaults.json of the model; an unfinished run has none yet, so its base's."""
    own, base = folder / GENERATION_DEFAULTS, Path(run.get("base_model", "")) / GENERATION_DEFAULTS
    return base if run and not own.is_file() else own


def main() -> None:
    args = parse_args()
    require_packages()
    with StopSignals("before the first picture") as stop:
        if args.checkpoint == ALL:
            from evaluation.checkpoints import compare_checkpoints as work
        else:
            from generation.generate import generate as work

        work(args, stop)


if __name__ == "__main__":
    exit_with(main)

"""Writes a model, or a LoRA, as one .safetensors file that AUTOMATIC1111,
ComfyUI and InvokeAI load.
"""

import argparse
from collections.abc import Sequence

from runs.records import newest_finished_run, newest_run
from runtime.errors import UserError, exit_with, require_packages
from runtime.flags import FlagParser, YesNo, absolute_path, expanded_path, filled_text, non_negative_float

EXAMPLES = """\
  python text_to_image/export_checkpoint.py --to jeans.safetensors

  python text_to_image/export_checkpoint.py --model output/pictures-1a2b3c4d \\
    --to ~/webui/models/Stable-diffusion/jeans.safetensors --title "My jeans"

  python text_to_image/export_checkpoint.py --model output/pictures-1a2b3c4d \\
    --to jeans.safetensors --lora_only

  python text_to_image/export_checkpoint.py \\
    --model stable-diffusion-v1-5/stable-diffusion-v1-5 \\
    --lora style.safetensors --lora_scale 0.8 --to styled.safetensors

The model must be a Stable Diffusion 1.x, 2.x or XL. A LoRA (a run with
--lora_rank) is fused into its base, unless --lora_only writes it by itself.

AUTOMATIC1111 needs a .yaml beside a file of Stable Diffusion 2.x, or of 1.x
with v prediction. It is written too, under the same name.

The file gets its name only after diffusers has read it back and every weight
has been found equal. To load it in Python:
  StableDiffusionPipeline.from_single_file("jeans.safetensors", config="OUTPUT")
and a file of XL with StableDiffusionXLPipeline.
"""


def build_parser() -> FlagParser:
    parser = FlagParser("export_checkpoint.py --to FILE.safetensors [--model MODEL] [flags]", __doc__, EXAMPLES)
    parser.add_argument(
        "--to",
        type=expanded_path,
        metavar="FILE",
        help="the file to write, with a name that ends in .safetensors (required)",
    )
    parser.add_argument(
        "--model", type=filled_text, metavar="MODEL",
        help="a diffusers folder, the output folder of a run, a hub id, or one .safetensors file (default: the newest "
        "finished run in output/)",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint",
        type=filled_text,
        metavar="NAME",
        help="a checkpoint of the run, such as checkpoint-100, or latest (default: the run's final result)",
    )
    parser.add_argument(
        "--tokenizer", type=absolute_path, metavar="FOLDER",
        help="the tokenizer of a --model that is one file: its folder, or one with a tokenizer/ in it (default: "
        "CLIP's, from the hub)",
    )  # fmt: skip
    parser.add_argument(
        "--allow_pickle", action="store_true",
        help="convert a --model whose weights are pickles, which can hold code, into output/converted/; a .ckpt file "
        "too (default: refuse it)",
    )  # fmt: skip
    parser.add_argument(
        "--lora_only", action="store_true",
        help="write only the LoRA that the run in --model trained, or the run in --lora on the base in --model "
        "(default: the whole model)",
    )  # fmt: skip
    parser.add_argument(
        "--lora", action="append", type=filled_text, metavar="FILE",
        help="a LoRA to fuse into --model: a .safetensors file, a folder or a hub id; may be given several times "
        "(default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--lora_scale", action="append", type=non_negative_float, metavar="X",
        help="strength of the LoRA; with several --lora one for each, in the same order (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("fp16", "bf16", "fp32"), default="fp16",
        help="precision of the weights in the file; fp32 makes it twice as large (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--title", metavar="TEXT", help="title in the file's metadata (default: the file's name)")
    parser.add_argument(
        "--verify", action=YesNo, default=True,
        help="read the file back, compare every weight, and generate a test image with it (default: yes)",
    )  # fmt: skip
    parser.add_argument(
        "--overwrite", action="store_true",
        help="replace the file and the .yaml of the same name if they exist (default: refuse)",
    )  # fmt: skip
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The checked arguments, with the default model filled in; `lora` and `lora_scale` are lists.

    UserError where one is missing or two contradict each other.
    """
    args = build_parser().parse_args(argv)
    if not args.to:
        raise UserError("--to is needed: the file to write, such as jeans.safetensors")
    if args.lora_only and (len(args.lora or []) > 1 or args.lora_scale):
        raise UserError("--lora_only writes one LoRA as it is: at most one --lora, and no --lora_scale")
    if args.lora and not args.model:
        raise UserError("--lora needs --model: the base that the LoRA is fused into")
    model = args.model or (newest_run() if args.checkpoint else newest_finished_run())
    if not model:
        raise UserError("--model is needed: there is no finished run in output/")
    lists = {"lora": args.lora or [], "lora_scale": args.lora_scale or []}
    return argparse.Namespace(**{**vars(args), **lists, "model": str(model)})


def main() -> None:
    args = parse_args()
    require_packages()
    if args.lora_only:
        from exporting.lora_file import export_lora

        export_lora(args)
    else:
        from exporting.export import export_checkpoint

        export_checkpoint(args)


if __name__ == "__main__":
    exit_with(main)

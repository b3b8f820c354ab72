"""Writes a model as the one-file checkpoint that AUTOMATIC1111, ComfyUI and
InvokeAI load.
"""

import argparse
from collections.abc import Sequence

from runs.records import newest_finished_run, newest_run
from runtime.errors import UserError, exit_with, require_packages
from runtime.flags import FlagParser, YesNo, expanded_path

EXAMPLES = """\
  python text_to_image/export_checkpoint.py --to jeans.safetensors

  python text_to_image/export_checkpoint.py --model output/pictures-1a2b3c4d \\
    --to ~/webui/models/Stable-diffusion/jeans.safetensors --title "My jeans"

The model is a Stable Diffusion 1.x or 2.x: a diffusers folder, a hub id, or the
output of a run, with --lora_rank too (the LoRA is fused into its base). Where
AUTOMATIC1111 needs a .yaml to know what the model predicts (all of 2.x, and 1.x
that predicts velocity), it is written under the same name.

The file is read back with diffusers and compared weight by weight before it
takes its name. It loads in Python with
  StableDiffusionPipeline.from_single_file("jeans.safetensors", config="OUTPUT")
"""


def build_parser() -> FlagParser:
    parser = FlagParser("export_checkpoint.py --to FILE.safetensors [--model MODEL] [flags]", __doc__, EXAMPLES)
    parser.add_argument(
        "--to", type=expanded_path, metavar="FILE", help="what to write; its name ends in .safetensors (needed)"
    )
    parser.add_argument(
        "--model", metavar="MODEL",
        help="a diffusers folder, a run's folder or a hub id (default: the newest finished run in output/)",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint",
        metavar="NAME",
        help="a checkpoint of the run: checkpoint-100, latest (default: its result)",
    )
    parser.add_argument(
        "--dtype", choices=("fp16", "bf16", "fp32"), default="fp16",
        help="the precision of the weights in the file; fp32 doubles its size (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--title", metavar="TEXT", help="the title in the file's metadata (default: the file's name)")
    parser.add_argument(
        "--verify", action=YesNo, default=True,
        help="read the file back, compare every weight and draw a picture (default: yes)",
    )  # fmt: skip
    parser.add_argument(
        "--overwrite", action="store_true",
        help="replace the file, and a .yaml of its name, where they exist (default: refuse)",
    )  # fmt: skip
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, checked, with the model filled in."""
    args = build_parser().parse_args(argv)
    if not args.to:
        raise UserError("--to is needed: the file to write, such as jeans.safetensors")
    model = args.model or (newest_run() if args.checkpoint else newest_finished_run())
    if not model:
        raise UserError("--model is needed: there is no finished run in output/")
    return argparse.Namespace(**{**vars(args), "model": str(model)})


def main() -> None:
    args = parse_args()
    require_packages()
    from exporting.export import export

    export(args)


if __name__ == "__main__":
    exit_with(main)

"""Fine-tunes the UNet of a Stable Diffusion 1.x/2.x model on captioned pictures."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from errors import UserError, exit_with, require_packages
from flags import (
    FlagParser,
    YesNo,
    count,
    fraction,
    given_flags,
    non_negative_float,
    positive_float,
    positive_int,
    seed,
)
from model_defaults import STARTER, TRAINING_DEFAULTS, merge_defaults

EXAMPLES = """\
  python text_to_image/train_text_to_image.py --dataset dataset --epochs 100

  accelerate launch text_to_image/train_text_to_image.py --dataset dataset \\
  --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
  --mixed_precision bf16 --max_train_steps 800 --learning_rate 1e-5 --use_ema

The folder holds pictures and metadata.jsonl, one row for each picture:
  {"file_name": "1.jpg", "text": "A pair of denim jeans on white."}
img_captioning.py writes it. The result loads with
diffusers.StableDiffusionPipeline.from_pretrained and with inference.py.
"""
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
# Not for a model to decide: where things are, and how long one wants to train.
NOT_FROM_THE_MODEL = {
    "cache_dir", "dataset", "epochs", "local_rank", "max_train_steps", "output_dir",
    "pretrained_model_name_or_path", "resume_from_checkpoint", "revision", "variant",
}  # fmt: skip


def build_parser() -> FlagParser:
    parser = FlagParser("train_text_to_image.py --dataset FOLDER [flags]", __doc__, EXAMPLES)
    add_everyday_flags(parser.add_argument_group("everyday"))
    add_model_flags(parser.add_argument_group("model and data"))
    add_optimization_flags(parser.add_argument_group("optimisation"))
    add_forgetting_flags(parser.add_argument_group("against forgetting"))
    add_run_flags(parser.add_argument_group("checkpoints and the run"))
    return parser


def add_everyday_flags(group) -> None:
    group.add_argument(
        "--dataset", "--train_data_dir", type=Path, metavar="FOLDER", help="the captioned pictures (needed)"
    )
    group.add_argument(
        "--pretrained_model_name_or_path", default=str(STARTER), metavar="MODEL",
        help="the base: a folder in diffusers' format or a hub id (default: the starter in this repository)",
    )  # fmt: skip
    group.add_argument(
        "--epochs", "--num_train_epochs", type=positive_int, default=100, metavar="N",
        help="passes over the data set, each picture --repeats times (default: 100)",
    )  # fmt: skip
    group.add_argument(
        "--max_train_steps", type=positive_int, metavar="N",
        help="optimisation steps in all, instead of --epochs (default: as the epochs say)",
    )  # fmt: skip
    group.add_argument(
        "--output_dir", type=Path, metavar="FOLDER",
        help="where the result goes (default: output/<data set>-<fingerprint of what changes the weights>)",
    )  # fmt: skip
    group.add_argument(
        "--resolution", type=positive_int, metavar="PX",
        help="the pictures' area is this squared; they keep their shape (default: what the model was made for)",
    )  # fmt: skip
    group.add_argument(
        "--train_batch_size", type=positive_int, default=4, metavar="N",
        help="pictures at once, on each process (default: 4)",
    )  # fmt: skip
    group.add_argument(
        "--learning_rate", type=positive_float, default=1e-5, metavar="X", help="the highest rate (default: 1e-5)"
    )
    group.add_argument("--use_ema", action=YesNo, default=False, help="save the weights' moving average (default: no)")
    group.add_argument(
        "--mixed_precision", choices=["no", "fp16", "bf16"],
        help="the precision of computing; weights stay fp32 (default: what accelerate was told, else no)",
    )  # fmt: skip
    group.add_argument(
        "--seed", type=seed, metavar="N",
        help="for all that is drawn by chance (default: one that follows from the run's other settings)",
    )  # fmt: skip


def add_model_flags(group) -> None:
    group.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub model (default: main)")
    group.add_argument(
        "--variant", metavar="NAME", help="variant of a hub model's files, such as fp16 (default: none)"
    )
    group.add_argument(
        "--cache_dir", metavar="FOLDER", help="where downloaded models are kept (default: the hub's cache)"
    )
    group.add_argument(
        "--prediction_type", choices=["epsilon", "v_prediction"],
        help="what the UNet predicts (default: what its scheduler's config says)",
    )  # fmt: skip
    group.add_argument(
        "--repeats",
        type=positive_int,
        default=1,
        metavar="N",
        help="times each picture is seen in an epoch (default: 1)",
    )
    group.add_argument(
        "--short_captions", action=YesNo, default=True,
        help="also train on shorter forms of each caption, so that short prompts work (default: yes)",
    )  # fmt: skip
    group.add_argument(
        "--caption_dropout", type=fraction, default=0.1, metavar="P",
        help="how often a caption is left empty, for guidance; 0: never (default: 0.1)",
    )  # fmt: skip
    group.add_argument(
        "--max_token_chunks", type=positive_int, default=3, metavar="N",
        help="captions are read up to N x 75 tokens; 1: cut at 75 (default: 3)",
    )  # fmt: skip
    group.add_argument(
        "--dataloader_num_workers", type=count, default=0, metavar="N",
        help="accepted and not needed: pictures are encoded once, before training",
    )  # fmt: skip


def add_optimization_flags(group) -> None:
    group.add_argument(
        "--gradient_accumulation_steps", type=positive_int, default=1, metavar="N",
        help="batches whose gradients are averaged in one step (default: 1)",
    )  # fmt: skip
    group.add_argument(
        "--gradient_checkpointing", action=YesNo, default=False, help="less memory, slower (default: no)"
    )
    group.add_argument(
        "--lr_scheduler", default="cosine", choices=LR_SCHEDULERS, metavar="NAME",
        help=f"how the rate goes on after the warm-up: {', '.join(LR_SCHEDULERS)} (default: cosine)",
    )  # fmt: skip
    group.add_argument(
        "--lr_warmup_steps", type=count, metavar="N",
        help="steps in which the rate rises from 0; 0: none (default: a twentieth of the run, at most 500)",
    )  # fmt: skip
    group.add_argument(
        "--scale_lr", action=YesNo, default=False, help="multiply the rate by the pictures of a step (default: no)"
    )
    group.add_argument(
        "--snr_gamma", type=non_negative_float, metavar="X",
        help="min-SNR weights with this gamma, 5 in the paper; 0: all timesteps weigh the same (default: 0)",
    )  # fmt: skip
    group.add_argument(
        "--max_grad_norm",
        type=positive_float,
        default=1.0,
        metavar="X",
        help="gradients are clipped to this norm (default: 1)",
    )
    group.add_argument("--adam_beta1", type=fraction, default=0.9, metavar="X", help="(default: 0.9)")
    group.add_argument("--adam_beta2", type=fraction, default=0.999, metavar="X", help="(default: 0.999)")
    group.add_argument(
        "--adam_weight_decay", type=non_negative_float, default=1e-2, metavar="X", help="(default: 0.01)"
    )
    group.add_argument("--adam_epsilon", type=positive_float, default=1e-8, metavar="X", help="(default: 1e-8)")
    group.add_argument(
        "--foreach_ema",
        action=YesNo,
        default=False,
        help="faster averaging with --use_ema, for a copy's memory (default: no)",
    )
    group.add_argument(
        "--allow_tf32", action=YesNo, default=False, help="TF32 products on Ampere and later (default: no)"
    )


def add_forgetting_flags(group) -> None:
    group.add_argument(
        "--prior_images", type=count, default=0, metavar="N",
        help="pictures the base draws first; half as many as data-set pictures join each batch; 0: none (default: 0)",
    )  # fmt: skip
    group.add_argument(
        "--prior_prompts", action="append", metavar="TEXT",
        help="what they show, repeatable (default: the first sentence of each caption)",
    )  # fmt: skip


def add_run_flags(group) -> None:
    group.add_argument(
        "--checkpointing_steps", type=positive_int, default=500, metavar="N",
        help="a checkpoint after every N steps (default: 500)",
    )  # fmt: skip
    group.add_argument(
        "--checkpoints_total_limit", type=positive_int, metavar="N",
        help="keep the newest N checkpoints (default: all)",
    )  # fmt: skip
    group.add_argument(
        "--resume_from_checkpoint", metavar="NAME",
        help="'latest', the name of a checkpoint in the output folder, or a path (default: latest of the same run)",
    )  # fmt: skip
    group.add_argument("--local_rank", type=int, default=-1, metavar="N", help="set by launchers; accepted")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, checked; `origins` says where each value comes from. Raises UserError."""
    parser = build_parser()
    given = given_flags(parser, argv)
    model = Path(given.get("pretrained_model_name_or_path", STARTER)).expanduser()
    args = merge_defaults(parser, given, model / TRAINING_DEFAULTS, NOT_FROM_THE_MODEL)
    if args.dataset is None:
        raise UserError("--dataset is needed: the folder that holds the pictures and metadata.jsonl")
    if "prior_prompts" in given and not args.prior_images:
        raise UserError("--prior_prompts needs --prior_images, how many pictures of them to draw")
    return args


def main() -> None:
    args = parse_args()
    require_packages()
    from training import train

    train(args)


if __name__ == "__main__":
    exit_with(main)

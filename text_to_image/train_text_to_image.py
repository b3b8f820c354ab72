"""Fine-tunes the UNet of a Stable Diffusion model (1.x, 2.x, XL) on pictures."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from models.defaults import FROM_FLAG, FROM_SCRIPT, LEARNING_RATE, TRAINING_DEFAULTS, merge_defaults
from runtime.errors import UserError, exit_with, require_packages
from runtime.flags import (
    FlagParser,
    YesNo,
    YesNoOrShare,
    absolute_path,
    below_one,
    expanded_path,
    filled_text,
    given_flags,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    seed_int,
    up_to_half,
    utf8_text,
    zero_to_one,
)
from runtime.paths import STARTER
from runtime.stopping import StopSignals

EXAMPLES = """\
  python text_to_image/train_text_to_image.py --dataset dataset --epochs 100

  accelerate launch text_to_image/train_text_to_image.py --dataset dataset \\
  --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
  --mixed_precision bf16 --max_train_steps 800 --learning_rate 1e-5 --use_ema

The folder holds pictures and metadata.jsonl, one row for each picture:
  {"file_name": "1.jpg", "text": "A pair of denim jeans on white."}
img_captioning.py writes it; a metadata.csv is read, too. The result loads with
diffusers.DiffusionPipeline.from_pretrained and with inference.py.
"""
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
LORA_LEARNING_RATE = 1e-4
INTERPOLATIONS = ("lanczos", "bicubic", "bilinear", "box", "hamming", "nearest", "nearest_exact")
OPTIMIZERS = ("adamw", "adamw8bit", "adafactor")
TRACKERS = ("none", "tensorboard", "wandb", "comet_ml", "all")
NEEDS = (  # a flag, the one it makes no sense without, and what that is
    ("prior_prompts", "prior_images", "how many pictures of them to generate"),
    ("lora_alpha", "lora_rank", "the size of the LoRA"),
    ("latents_cache_dir", "cache", "what is to be kept there"),
    ("timing", "dry_run", "which alone may leave it out"),
)
FOREIGN_FLAGS = {  # of other trainers, and why there is no such flag here
    "--train_text_encoder": "the text encoders stay as they are: on a few captions they forget what they know, and "
    "what they give could not be kept. Give your subject a name of its own: --trigger 'sks jeans'",
}
# Not for a model to decide: where things are, and how often one wants to go through them.
NOT_FROM_THE_MODEL = {
    "allow_pickle", "cache_dir", "dataset", "dataset_config_name", "dry_run", "epochs", "hub_model_id", "hub_token",
    "latents_cache_dir", "local_rank", "logging_dir", "mask_from_alpha", "max_train_steps", "metadata_file",
    "non_ema_revision", "output_dir", "overwrite", "pretrained_model_name_or_path", "push_to_hub", "report_to",
    "resume_from_checkpoint", "revision", "timing", "tokenizer", "tracker_project_name", "unmasked_weight",
    "validation_dir", "variant",
}  # fmt: skip


def build_parser() -> FlagParser:
    parser = FlagParser("train_text_to_image.py --dataset FOLDER [flags]", __doc__, EXAMPLES, FOREIGN_FLAGS)
    add_everyday_flags(parser.add_argument_group("everyday"))
    add_data_flags(parser.add_argument_group("data"))
    add_objective_flags(parser.add_argument_group("objective"))
    add_optimization_flags(parser.add_argument_group("optimisation"))
    add_validation_flags(parser.add_argument_group("validation"))
    add_memory_flags(parser.add_argument_group("speed and memory"))
    add_run_flags(parser.add_argument_group("checkpoints and the run"))
    add_hub_flags(parser.add_argument_group("model hub and trackers"))
    return parser


# A flag's name and type stand on one line, its help on the next.
# fmt: off
def add_everyday_flags(group: argparse._ArgumentGroup) -> None:
    flag = group.add_argument
    flag("--dataset", "--train_data_dir", "--dataset_name", action="append", type=filled_text, metavar="FOLDER",
         help="the captioned pictures: a folder, tar shards or parquet files ('shards/*.tar', in quotes), or a data "
              "set's id on the hub; repeatable, each has captions of its own (needed)")
    flag("--pretrained_model_name_or_path", type=filled_text, default=str(STARTER), metavar="MODEL",
         help="the base: a folder in diffusers' format, a hub id or one .safetensors file (default: the starter in "
              "this repository)")
    flag("--epochs", "--num_train_epochs", type=positive_int, default=100, metavar="N",
         help="passes over the data set, each picture --repeats times (default: 100)")
    flag("--max_train_steps", type=positive_int, metavar="N",
         help="optimisation steps in all, instead of --epochs (default: as the epochs say)")
    flag("--samples", type=positive_int, metavar="N",
         help="pictures seen in all, however many there are, where neither --epochs nor --max_train_steps is given "
              "(default: what the model recommends, else as the epochs say)")
    flag("--output_dir", type=expanded_path, metavar="FOLDER",
         help="where the result goes (default: output/<data set>-<fingerprint of what changes the weights>)")
    flag("--resolution", type=positive_int, metavar="PX",
         help="the pictures' area is this squared; they keep their shape (default: what the model was made for)")
    flag("--train_batch_size", type=positive_int, default=4, metavar="N",
         help="pictures at once, on each process; prior images come on top (default: 4)")
    flag("--learning_rate", type=positive_float, default=LEARNING_RATE, metavar="X",
         help="the peak learning rate (default: 1e-5; XL: 5e-6; for a LoRA 1e-4)")
    flag("--use_ema", action=YesNo, default=False,
         help="keep an exponential moving average of the weights and save that (default: no)")
    flag("--lora_rank", type=positive_int, metavar="N",
         help="train a LoRA of this rank instead of the whole UNet (default: the whole UNet)")
    flag("--mixed_precision", choices=["no", "fp16", "bf16", "pure_bf16"],
         help="no: fp32; bf16: computes with a bf16 copy of fp32 weights; fp16: autocast; pure_bf16: bf16 weights "
              "alone, stochastically rounded, least memory for a whole UNet (default: accelerate's)")
    flag("--seed", type=seed_int, metavar="N",
         help="of all randomness (default: derived from the run's other settings)")
    flag("--dry_run", action="store_true",
         help="print what would be done, the GPU memory it takes, how long it takes; writes nothing but the cache")


def add_data_flags(group: argparse._ArgumentGroup) -> None:
    flag = group.add_argument
    flag("--repeats", type=positive_int, default=1, metavar="N",
         help="how often each picture is used in an epoch, times the `repeats` of its row (default: 1)")
    flag("--max_train_samples", type=positive_int, metavar="N",
         help="train on this many pictures, chosen at random by the seed (default: all)")
    flag("--center_crop", action=YesNo, default=False,
         help="cut a square from the middle of each picture (default: no, whole pictures in buckets)")
    flag("--random_flip", action=YesNo, default=False,
         help="mirror half of the pictures, and left and right in their English captions (default: no)")
    flag("--random_affine", type=up_to_half, default=0.0, metavar="A",
         help="train on 15 affine variants of each picture as well: up to A smaller (0.1: 10 %%), shifted and "
              "rotated, so that results do not all have its place; 0: none (default: 0)")
    flag("--image_interpolation_mode", choices=INTERPOLATIONS, default="lanczos", metavar="NAME",
         help=f"how pictures are resized: {', '.join(INTERPOLATIONS)} (default: lanczos)")
    flag("--mask_from_alpha", action=YesNo, default=False,
         help="the loss counts where a picture is opaque; a mask beside it (1.mask.png, white: counts) comes first "
              "(default: no)")
    flag("--unmasked_weight", type=zero_to_one, default=0.0, metavar="X",
         help="what the loss counts where a mask is black, of what it counts where it is white (default: 0)")
    flag("--trigger", type=utf8_text, metavar="PHRASE",
         help="a phrase put before every caption, by which to ask for the thing later (default: none)")
    flag("--short_captions", action=YesNoOrShare, type=zero_to_one, default=0.5, metavar="P",
         help="train on shorter variants of captions in this share of the samples, so that short prompts work; "
              "without P whole captions count as one variant among others; 0: never (default: 0.5)")
    flag("--shuffle_tags", action=YesNo, default=False,
         help="captions that are lists of tags, separated by commas, are read in 16 orders (default: no)")
    flag("--keep_tags", type=non_negative_int, default=0, metavar="N",
         help="the first N tags stay where they are, and are never left out; 0: none (default: 0)")
    flag("--tag_dropout", type=zero_to_one, default=0.0, metavar="P",
         help="leave each tag out with this probability; 0: never (default: 0)")
    flag("--caption_dropout", type=zero_to_one, default=0.1, metavar="P",
         help="share of captions left empty, for classifier-free guidance; 0: none (default: 0.1)")
    flag("--max_token_chunks", type=positive_int, default=3, metavar="N",
         help="captions are read up to N x 75 tokens; 1: cut at 75 (default: 3)")
    flag("--prior_images", type=non_negative_int, default=0, metavar="N",
         help="prior preservation: pictures that the base generates first, half as many as yours in each step; "
              "0: none (default: 0)")
    flag("--prior_prompts", action="append", type=utf8_text, metavar="TEXT",
         help="a prompt for them, repeatable (default: the first sentence of each caption)")
    flag("--metadata_file", type=absolute_path, metavar="FILE",
         help="the captions, where they cannot be in the folder of pictures; what img_captioning.py --output wrote. "
              "Names in it are relative to --dataset (default: metadata.jsonl in --dataset)")
    flag("--caption_column", default="text", metavar="NAME",
         help="the key of the captions in the rows of metadata.jsonl, metadata.csv, a hub data set or parquet files, "
              "and in the .json of tar shards (default: text)")
    flag("--image_column", default="image", metavar="NAME",
         help="the pictures' column in a hub data set or parquet files (default: image)")
    flag("--dataset_config_name", metavar="NAME", help="which configuration of a hub data set (default: its only one)")


def add_objective_flags(group: argparse._ArgumentGroup) -> None:
    flag = group.add_argument
    flag("--prediction_type", choices=["epsilon", "v_prediction", "sample"],
         help="what the UNet predicts (default: what its scheduler's config says)")
    flag("--rescale_betas_zero_snr", action=YesNo, default=False,
         help="rescale the noise schedule to zero terminal SNR, for v_prediction (default: the model's own schedule)")
    flag("--snr_gamma", type=non_negative_float, metavar="X",
         help="min-SNR loss weights with this gamma, 5 in the paper; 0: all timesteps weigh the same (default: 0)")
    flag("--timestep_bias_multiplier", type=positive_float, metavar="X",
         help="draw the noisier half of the timesteps X times as often as the other half: more than 1 for what a "
              "picture shows and where, less than 1 for its details; 1: all as often (default: 1)")
    flag("--noise_offset", type=non_negative_float, default=0.0, metavar="X",
         help="adds noise that is constant over a channel, usually 0.1; 0: none (default: 0)")
    flag("--input_perturbation", type=non_negative_float, default=0.0, metavar="X",
         help="more noise in the UNet's input than in its target, 0.1 in the paper; 0: none (default: 0)")
    flag("--dream_training", action=YesNo, default=False,
         help="DREAM: train on the UNet's own estimate (epsilon only), a third slower (default: no)")
    flag("--dream_detail_preservation", type=positive_float, default=1.0, metavar="P",
         help="the exponent p of DREAM's factor (default: 1)")
    flag("--lora_alpha", type=positive_float, metavar="X",
         help="the LoRA's strength: its output counts alpha / rank (default: the rank)")


def add_optimization_flags(group: argparse._ArgumentGroup) -> None:
    flag = group.add_argument
    flag("--gradient_accumulation_steps", type=positive_int, default=1, metavar="N",
         help="batches whose gradients are averaged in one step (default: 1)")
    flag("--lr_scheduler", default="cosine", choices=LR_SCHEDULERS, metavar="NAME",
         help=f"the learning rate after the warm-up: {', '.join(LR_SCHEDULERS)} (default: cosine)")
    flag("--lr_warmup_steps", type=non_negative_int, metavar="N",
         help="steps in which the learning rate rises from 0; 0: none (default: a twentieth of the run, at most 500)")
    flag("--scale_lr", action=YesNo, default=False,
         help="multiply the learning rate by the global batch size (default: no)")
    flag("--max_grad_norm", type=positive_float, default=1.0, metavar="X",
         help="gradients are clipped to this norm (default: 1)")
    flag("--adam_beta1", type=below_one, default=0.9, metavar="X", help="(default: 0.9)")
    flag("--adam_beta2", type=below_one, default=0.999, metavar="X", help="(default: 0.999)")
    flag("--adam_weight_decay", type=non_negative_float, default=1e-2, metavar="X", help="(default: 0.01)")
    flag("--adam_epsilon", type=positive_float, default=1e-8, metavar="X", help="(default: 1e-8)")


def add_validation_flags(group: argparse._ArgumentGroup) -> None:
    flag = group.add_argument
    flag("--validation_split", type=zero_to_one, default=0.0, metavar="P",
         help="hold out this share of the pictures and measure the loss on them; 0: none (default: 0)")
    flag("--validation_dir", type=expanded_path, metavar="FOLDER",
         help="a captioned folder to measure the loss on instead")
    flag("--validation_steps", type=positive_int, metavar="N",
         help="measure the loss and generate the prompts every N steps (default: four times in a run; "
              "held-out loss: ten; a short run: fewer)")
    flag("--validation_prompts", nargs="+", action="extend", type=utf8_text, metavar="TEXT",
         help="prompts to generate into OUTPUT/validation/ (default: two examples of the data set's)")
    flag("--validation_pictures", action=YesNo, default=True,
         help="generate two example prompts where none are named: at the start and with each measure while that costs "
              "at most a tenth of the run, and at the end (default: yes)")
    flag("--validation_epochs", type=positive_int, metavar="N",
         help="generate them every N epochs instead (default: with --validation_steps)")
    flag("--num_validation_images", type=non_negative_int, default=1, metavar="N",
         help="pictures of each prompt, the same seeds every time (default: 1)")


def add_memory_flags(group: argparse._ArgumentGroup) -> None:
    flag = group.add_argument
    flag("--gradient_checkpointing", action=YesNo, default=False, help="less memory, slower (default: no)")
    flag("--compile", action=YesNo, default=False,
         help="compile the UNet's blocks with torch.compile: the first steps take minutes, others less (default: no)")
    flag("--optimizer", choices=OPTIMIZERS, default="adamw", metavar="NAME",
         help="adamw; adamw8bit: its state in 8 bits, through bitsandbytes; adafactor: next to no state "
              "(default: adamw)")
    flag("--use_8bit_adam", action=YesNo, default=False, help="the same as --optimizer adamw8bit (default: no)")
    flag("--cache", action=YesNo, default=True,
         help="encode pictures and captions once, on disk; --no_cache: at every step (default: yes)")
    flag("--latents_cache_dir", type=expanded_path, metavar="FOLDER",
         help="where the encoded pictures and captions are kept (default: OUTPUT/cache)")
    flag("--dataloader_num_workers", type=non_negative_int, metavar="N",
         help="processes that read pictures while others are encoded into the cache; 0: the main one "
              "(default: with a GPU one a CPU core, at most 4; else 0)")
    flag("--offload_ema", action=YesNo, default=False, help="keep the EMA in CPU memory (default: no)")
    flag("--foreach_ema", action=YesNo, default=True,
         help="accepted; the EMA is always updated by few kernels, in place")
    flag("--allow_tf32", action=YesNo, default=False, help="TF32 products on Ampere and later (default: no)")
    flag("--enable_xformers_memory_efficient_attention", action="store_true",
         help="accepted; PyTorch's own attention is as fast and is always used")


def add_run_flags(group: argparse._ArgumentGroup) -> None:
    flag = group.add_argument
    flag("--checkpointing_steps", type=positive_int, default=500, metavar="N",
         help="a checkpoint after every N steps (default: 500)")
    flag("--checkpoints_total_limit", type=positive_int, metavar="N",
         help="keep the newest N checkpoints, and the one with the lowest held-out loss (default: all)")
    flag("--resume_from_checkpoint", type=filled_text, metavar="NAME",
         help="'latest', the name of a checkpoint in the output folder, or a path (default: latest of the same run)")
    flag("--overwrite", action="store_true",
         help="begin anew in an output folder that holds another run, and remove what that one left there")
    flag("--report", action=YesNo, default=True,
         help="keep OUTPUT/report.html, a page that shows the run, up to date (default: yes)")
    flag("--max_bad_steps", type=positive_int, default=5, metavar="N",
         help="stop after N non-finite steps in a row (loss or gradient); fewer are skipped (default: 5)")
    flag("--timing", action=YesNo, default=True,
         help="a dry run times steps; --no_timing: it loads no weights and takes seconds (default: yes)")
    flag("--distributed_timeout", type=positive_int, default=30, metavar="MINUTES",
         help="how long a process waits for the others before it gives up (default: 30)")
    flag("--local_rank", type=int, default=-1, metavar="N", help="set by launchers; accepted")


def add_hub_flags(group: argparse._ArgumentGroup) -> None:
    flag = group.add_argument
    flag("--revision", metavar="NAME", help="branch, tag or commit of a hub model (default: main)")
    flag("--non_ema_revision", metavar="NAME",
         help="the revision whose UNet is trained, where another has its average (default: --revision)")
    flag("--variant", metavar="NAME", help="variant of a hub model's files, such as fp16 (default: none)")
    flag("--allow_pickle", action="store_true",
         help="convert a model whose weights are pickles, which can hold code, into output/converted/; a .ckpt file "
              "too")
    flag("--tokenizer", type=absolute_path, metavar="FOLDER",
         help="the tokenizer of a base that is one file: its folder, or one with a tokenizer/ in it (default: CLIP's, "
              "from the hub)")
    flag("--cache_dir", type=expanded_path, metavar="FOLDER",
         help="where downloads are kept (default: the hub's cache)")
    flag("--push_to_hub", action=YesNo, default=False, help="upload the result when it is finished (default: no)")
    flag("--hub_model_id", metavar="NAME", help="the repository to upload to (default: the output folder's name)")
    flag("--hub_token", metavar="TOKEN",
         help="for hub data sets and the upload; kept nowhere (default: the one of `hf auth login`)")
    flag("--report_to", choices=TRACKERS, default="none", metavar="NAME",
         help=f"a tracker beside metrics.jsonl: {', '.join(TRACKERS)} (default: none)")
    flag("--tracker_project_name", default="text2image-fine-tune", metavar="NAME",
         help="(default: text2image-fine-tune)")
    flag("--logging_dir", default="logs", metavar="FOLDER", help="tensorboard's files, below OUTPUT (default: logs)")


# fmt: on


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, checked; `origins` says where each value comes from. Raises UserError."""
    parser = build_parser()
    given = given_flags(parser, argv)
    model = Path(given.get("pretrained_model_name_or_path", STARTER)).expanduser()
    args = merge_defaults(parser, given, model / TRAINING_DEFAULTS, NOT_FROM_THE_MODEL)
    if args.dataset is None:
        raise UserError("--dataset is needed: the folder that holds the pictures and metadata.jsonl")
    separate_datasets(args)
    for flag, wants, why in NEEDS:
        if flag in given and not getattr(args, wants):
            raise UserError(f"--{flag} needs --{wants}, {why}")
    if args.keep_tags and not args.shuffle_tags and not args.tag_dropout:
        raise UserError("--keep_tags needs --shuffle_tags or --tag_dropout, which the first tags are to be spared")
    resolve_length(args)
    resolve_optimizer(args)
    if args.lora_rank:
        adapt_to_lora(args)
    if args.hub_token and args.report_to not in ("none", "tensorboard"):
        raise UserError(f"--hub_token: {args.report_to} uploads the command line; `hf auth login` keeps it off there")
    if args.validation_split and args.validation_dir:
        raise UserError("--validation_split and --validation_dir: hold pictures out, or name others, not both")
    if args.validation_split == 1:
        raise UserError("--validation_split 1 would leave nothing to train on; a tenth is usual: 0.1")
    return args


def separate_datasets(args: argparse.Namespace) -> None:
    """Makes `dataset` the first one and `more_datasets` the others, None where there are none. UserError."""
    args.dataset, *others = args.dataset
    args.more_datasets = others or None
    if others and args.metadata_file:
        raise UserError(
            f"--metadata_file {args.metadata_file} is for one --dataset; of several each is read with the "
            "metadata.jsonl in it"
        )


def resolve_length(args: argparse.Namespace) -> None:
    """Leaves out --samples where another flag says how long the run is. UserError where it is a flag, too."""
    others = [name for name in ("epochs", "max_train_steps") if args.origins[name] == FROM_FLAG]
    if others and args.origins["samples"] == FROM_FLAG:
        raise UserError(f"--samples and --{others[0]} both say how long the run is; leave one out")
    if others:
        args.samples, args.origins["samples"] = None, FROM_SCRIPT


def resolve_optimizer(args: argparse.Namespace) -> None:
    """Makes --optimizer and --use_8bit_adam agree: the one that is a flag, else --optimizer, decides. UserError."""
    by_flag = {name for name in ("optimizer", "use_8bit_adam") if args.origins[name] == FROM_FLAG}
    in_8bit = args.optimizer == "adamw8bit"
    if len(by_flag) == 2 and args.use_8bit_adam != in_8bit:
        no = "" if args.use_8bit_adam else "no_"
        raise UserError(f"--optimizer {args.optimizer} and --{no}use_8bit_adam contradict each other; leave one out")
    if by_flag == {"use_8bit_adam"} or args.origins["optimizer"] == FROM_SCRIPT:
        args.optimizer = "adamw8bit" if args.use_8bit_adam else "adamw" if in_8bit else args.optimizer
    args.use_8bit_adam = args.optimizer == "adamw8bit"
    if args.mixed_precision == "pure_bf16" and args.use_8bit_adam:
        raise UserError("--mixed_precision pure_bf16 goes with --optimizer adamw or adafactor: 8 bits are not rounded")


def adapt_to_lora(args: argparse.Namespace) -> None:
    """Of the defaults what suits a whole UNet only. UserError where a flag asks for what a LoRA does not have."""
    if args.use_ema and args.origins["use_ema"] == FROM_FLAG:
        raise UserError("--use_ema and --lora_rank: the average of a LoRA is not kept; leave one of them out")
    if args.mixed_precision == "pure_bf16":
        raise UserError(
            "--mixed_precision pure_bf16 is for a whole UNet; with --lora_rank take bf16, which costs the same"
        )
    if args.use_ema:  # from the model
        args.use_ema, args.origins["use_ema"] = False, FROM_SCRIPT
    if args.origins["learning_rate"] == FROM_SCRIPT:
        args.learning_rate = LORA_LEARNING_RATE


def main() -> None:
    args = parse_args()
    require_packages()
    with StopSignals("before the first step; what is encoded is kept") as stop:
        from training.train import train

        train(args, stop)


if __name__ == "__main__":
    exit_with(main)

"""From arguments to a prepared run: everything is checked, planned and described before a weight is loaded."""

import argparse
import datetime
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)
from transformers import CLIPTokenizer

from data.augmentation import NO_AUGMENTATION
from models.compiling import check_compiler
from models.conditions import whole_picture
from models.loading import load_noise_scheduler, quiet_libraries
from optimization.optimizers import find_optimizer_class
from optimization.parameters import FullUNet, LoraAdapter, make_trainable
from optimization.schedule import learning_rate_schedule
from runs.disk_space import DiskSpace, check_space, latents_bytes, measure_space, texts_bytes
from runs.records import output_folder
from runs.upload import prepare_upload
from runtime.devices import disable_cudnn_attention, keep_freed_memory, supports_bf16
from runtime.errors import UserError
from runtime.locking import RunLock
from runtime.processes import disable_unsupported_p2p, run_on_main, warn_of_single_process
from training.objective import Objective, make_objective
from training.plan import Plan, describe_run, make_plan
from training.resume import ResumePoint, find_resume_point, prepare_output_folder
from training.samples import (
    DATA,
    PRIOR,
    Batches,
    Encoder,
    SampleSettings,
    SampleSource,
    StepBatches,
)

EXAMPLE_PICTURES = 2  # of the prompts that the result can be expected to follow, where none were named


@dataclass(frozen=True)
class PreparedRun:
    """A run whose arguments, data set, model and output folder are known to be usable."""

    args: argparse.Namespace
    accelerator: Accelerator
    precision: str  # no, fp16, bf16 or pure_bf16
    plan: Plan
    tokenizer: CLIPTokenizer
    objective: Objective
    trainable: FullUNet | LoraAdapter
    learning_rate_at: Callable[[int], float]  # by the step, from 0
    record: dict  # run.json
    lock: RunLock  # of the output folder
    resume: ResumePoint
    space: DiskSpace

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def folder(self) -> Path:
        """Of the output: where it was moved to, once `follow_output_folder` has seen that."""
        return self.lock.folder

    @property
    def seed(self) -> int:
        return self.record["seed"]

    @property
    def validation_prompts(self) -> list[str]:
        """What is generated while it trains: what was asked for, else examples of the data set."""
        if self.args.validation_prompts or not self.args.validation_pictures:
            return self.args.validation_prompts or []
        return self.record["example_prompts"][:EXAMPLE_PICTURES]

    @property
    def finished_record(self) -> dict | None:
        """run.json of an earlier start of this very run that has done all of its steps."""
        return self.resume.earlier if self.resume.finished(self.plan.steps) else None

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the UNet, and of what it reads."""
        return torch.bfloat16 if self.precision in ("bf16", "pure_bf16") else torch.float32

    def epoch_after(self, step: int) -> float:
        """Passes over the data set after optimisation step `step`, from 1."""
        return step * self.plan.global_batch / self.plan.epoch_samples

    def process_share(self, count: int) -> range:
        """Which of `count` things this process does where the processes share them."""
        return range(self.accelerator.process_index, count, self.accelerator.num_processes)


def prepare_run(args: argparse.Namespace) -> PreparedRun:
    """Raises UserError where the arguments, the data set, the model or the output folder are not usable.

    Nothing is written but, where there is an output folder already, its lock.
    """
    quiet_libraries()
    keep_freed_memory()
    disable_cudnn_attention()
    accelerator, precision = make_accelerator(args)
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    plan = make_plan(args, accelerator)
    objective = make_objective(
        args, load_noise_scheduler(plan.base, args.prediction_type, args.rescale_betas_zero_snr)
    )
    tokenizer = plan.tokenizer
    record = describe_run(args, plan, accelerator, tokenizer, precision)
    trainable = make_trainable(args.lora_rank, args.lora_alpha, record["seed"])
    learning_rate_at = learning_rate_schedule(args.lr_scheduler, plan.learning_rate, plan.warmup, plan.steps)
    check_compiler(args.compile)
    find_optimizer_class(args)  # refused now where it is not installed
    folder = output_folder(args.output_dir, args.dataset, plan.base, record["fingerprint"])
    space = measure_space(args, folder, plan.base, plan.steps, encodings_bytes(args, plan, tokenizer, folder))
    lock = RunLock(folder)
    resume = run_on_main(accelerator, lambda: lock_and_find_resume_point(args, plan, folder, record, lock))
    record["steps"] = max(plan.steps, resume.first_step)
    record["starts"] = [*(resume.earlier or {}).get("starts", []), describe_start(accelerator, resume.first_step)]
    return PreparedRun(
        args, accelerator, precision, plan, tokenizer, objective, trainable, learning_rate_at, record, lock, resume,
        space,
    )  # fmt: skip


def describe_start(accelerator: Accelerator, first_step: int) -> dict:
    """When and on what the run begins, or goes on after `first_step`; run.json keeps one for each start."""
    name = torch.cuda.get_device_name() if accelerator.device.type == "cuda" else accelerator.device.type
    at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"at": at, "after_step": first_step, "device": name, "processes": accelerator.num_processes}


def encodings_bytes(args: argparse.Namespace, plan: Plan, tokenizer: CLIPTokenizer, folder: Path) -> int:
    """What the encoded data set will take in the output folder; 0 where it is kept elsewhere or there already."""
    if not args.cache or args.latents_cache_dir or (folder / "cache").is_dir():
        return 0
    images = plan.images_to_encode.values()
    return latents_bytes(images, plan.shape) + texts_bytes(images, plan.base, tokenizer, args.max_token_chunks)


def lock_and_find_resume_point(
    args: argparse.Namespace, plan: Plan, folder: Path, record: dict, lock: RunLock
) -> ResumePoint:
    """Where to begin; locked first, so that no other run changes the folder meanwhile."""
    if folder.is_dir() and not args.dry_run:
        lock.take()
    return find_resume_point(args, plan, folder, record)


def claim_output_folder(run: PreparedRun) -> None:
    """From here on the output folder is this run's, and no other may write into it."""

    def take() -> None:
        check_space(run.space, run.folder)
        run.lock.take()
        prepare_output_folder(run.folder, run.resume, run.record)
        prepare_upload(run.args, run.folder)

    run_on_main(run.accelerator, take)


def make_batches(run: PreparedRun, encodings: Encoder) -> Batches:
    """The batches of every step, from the data set and the base's own pictures.

    With --no_cache they are not made ahead: the VAE's memory would come on top of the step's.
    """
    args, plan, accelerator = run.args, run.plan, run.accelerator
    data = SampleSource(
        caption_groups=[picture.caption_groups for picture in plan.pictures],
        latent_shapes=tuple(plan.shape.latent_shape(*size) for size in plan.sizes),
        augmentations=plan.augmentations,
        time_ids=[image.time_ids for (stream, _), image in plan.images_to_encode.items() if stream == DATA],
        group_length=plan.global_batch,
        repeats=[picture.repeats for picture in plan.pictures],
        whole_groups=[picture.whole_groups for picture in plan.pictures],
    )
    prior = SampleSource(
        caption_groups=[((prompt,),) for prompt in plan.prior_prompts],
        latent_shapes=(plan.shape.latent_shape(*plan.main_size),) * len(plan.prior_prompts),
        augmentations=[NO_AUGMENTATION] * len(plan.prior_prompts),
        time_ids=[whole_picture(*plan.main_size)] * len(plan.prior_prompts),
    )
    settings = SampleSettings(
        args.caption_dropout,
        len(run.objective.noise_scheduler),
        args.noise_offset,
        args.input_perturbation,
        short_captions=None if isinstance(args.short_captions, bool) else args.short_captions,
        timestep_bias=args.timestep_bias_multiplier or 1.0,
    )
    batches = StepBatches(
        encodings=encodings,
        sources={DATA: data, PRIOR: prior},
        settings=settings,
        seed=run.seed,
        data_batch=plan.global_batch,
        prior_batch=plan.prior_batch,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        accumulation=args.gradient_accumulation_steps,
        device=accelerator.device,
        dtype=run.compute_dtype,
    )
    return Batches(batches, plan.steps, ahead=args.cache)


def make_accelerator(args: argparse.Namespace) -> tuple[Accelerator, str]:
    """The accelerator and the precision: what the flag says, else what accelerate was configured with.

    For bf16 and pure_bf16 it is one without autocast: the UNet itself is in bf16, see `optimization.parameters`. A dry
    run that times nothing computes nothing either, and may ask for fp16 where there is no GPU.
    """
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    computes = not args.dry_run or args.timing
    _check_accelerate_config()
    _check_tracker(args.report_to)
    disable_unsupported_p2p()
    try:
        accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # else processes of torchrun would train without each other
            mixed_precision="fp16" if precision == "fp16" and computes else "no",
            log_with=None if args.report_to == "none" else [args.report_to],
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=args.distributed_timeout)),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # no second copy of the gradients
            ],
            project_config=ProjectConfiguration("."),  # `start_trackers` sets the real folder, which is not known yet
            # StepBatches splits the batches: accelerate's environment must not divide them again.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        )
    except ValueError as error:  # a precision that the device does not have
        raise UserError(f"--mixed_precision {precision}: {error}") from None
    warn_of_single_process(accelerator.num_processes)
    if precision not in ("no", "fp16", "bf16", args.mixed_precision):
        raise UserError(f"accelerate is configured for {precision}; --mixed_precision knows no, fp16 and bf16")
    if "bf16" in precision and accelerator.device.type == "cuda" and not supports_bf16():
        raise UserError(f"--mixed_precision {precision}: this GPU does not compute in bf16; use fp16")
    return accelerator, precision


def _check_accelerate_config() -> None:
    for other in ("DEEPSPEED", "FSDP"):
        if os.environ.get(f"ACCELERATE_USE_{other}", "").lower() in ("1", "true", "yes"):
            raise UserError(
                f"accelerate is configured for {other}, which this script does not use; see `accelerate config`"
            )


def _check_tracker(report_to: str) -> None:
    for package in ("tensorboard", "wandb", "comet_ml"):
        if report_to == package and importlib.util.find_spec(package) is None:
            raise UserError(f"--report_to {package}: not installed; `pip install {package}`")

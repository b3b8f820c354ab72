"""From arguments and plan to the objects that the training loop uses: encodings, batches, optimiser, watch."""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from data.augmentation import NO_AUGMENTATION
from models.defaults import guidance_scale_of
from models.folders import fingerprint_model
from models.loading import load_text_encoder, load_unet, load_vae, set_attention
from models.sampling import load_sampler
from runtime.errors import UserError
from runtime.files import hash_key
from training.batches import DATA, HELD_OUT, PRIOR, Batches
from training.encodings import CachedEncodings, Encodings, LiveEncodings, TextEncoding, store_latents, store_texts
from training.objective import Objective
from training.plan import Plan
from training.prior import generate_prior, read_prior, write_prior
from training.samples import SampleSettings, SampleSource
from training.validation import (
    FixedNoiseLoss,
    ValidationSampler,
    Validator,
    fixed_samples,
    measured_steps,
    sampled_steps,
)


def compute_dtype(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


def make_encodings(
    args: argparse.Namespace, plan: Plan, tokenizer, accelerator: Accelerator, folder: Path, quiet: bool
) -> Encodings:
    """What the VAE and the text encoder have to say: on disk, or said again at every step with --no_cache."""
    vae, text_encoder = load_vae(plan.base).to(accelerator.device), load_text_encoder(plan.base).to(accelerator.device)
    text_hash = fingerprint_model(plan.base, ("tokenizer", "text_encoder"))
    text = TextEncoding(tokenizer, text_encoder, args.max_token_chunks, text_hash)
    cache = args.latents_cache_dir or folder / "cache"
    if not args.cache:
        return LiveEncodings(cache, plan.images_to_encode, vae, text)
    encodings = CachedEncodings(cache)
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    vae_hash = fingerprint_model(plan.base, ("vae",))
    store_latents(encodings, plan.images_to_encode, vae, vae_hash, share, args.dataloader_num_workers, quiet)
    prompts = ["", *plan.prior_prompts, *(args.validation_prompts or [])]
    groups = [subject.captions for subject in plan.images_to_encode.values()] + [[prompt] for prompt in prompts]
    store_texts(encodings, groups, text, share, quiet)
    accelerator.wait_for_everyone()
    return encodings


def prior_latents(args, plan: Plan, encodings: Encodings, seed: int, accelerator: Accelerator, precision: str):
    """Latents (C, h, w) of the base's own pictures, drawn once; the processes share the work."""
    shape, guidance_scale = plan.shape.latent_shape(*plan.main_size), guidance_scale_of(plan.base)
    facts = (*plan.prior_prompts, seed, shape, guidance_scale, precision, args.max_token_chunks)
    stored = encodings.file("prior", hash_key(fingerprint_model(plan.base), *facts))
    latents = read_prior(stored)
    accelerator.wait_for_everyone()  # all must have looked before one of them writes it
    if latents is not None:
        return latents
    unet = load_unet(plan.base, compute_dtype(precision)).to(accelerator.device).eval()
    set_attention(unet, plan.shape, *plan.main_size, accelerator.device.type)
    share = range(accelerator.process_index, len(plan.prior_prompts), accelerator.num_processes)
    text = {prompt: encodings.text(prompt) for prompt in ["", *plan.prior_prompts]}
    with accelerator.autocast():
        drawn = generate_prior(
            unet, load_sampler(plan.base), plan.prior_prompts, text, shape, guidance_scale, seed, share,
            quiet=not accelerator.is_main_process,
        )  # fmt: skip
    shares = gather_object([drawn])
    latents = {index: latent for share in shares for index, latent in share.items()}
    if accelerator.is_main_process:
        write_prior(stored, latents)
    return [latents[index] for index in range(len(latents))]


def make_batches(
    args, plan: Plan, encodings, seed: int, timesteps: int, accelerator: Accelerator, precision: str
) -> Batches:
    data = SampleSource(
        caption_groups=[picture.caption_groups for picture in plan.pictures],
        latent_shapes=tuple(plan.shape.latent_shape(*size) for size in plan.sizes),
        augmentations=plan.augmentations,
        run=plan.global_batch,
    )
    drawn = len(plan.prior_prompts)
    prior = SampleSource(
        caption_groups=[((prompt,),) for prompt in plan.prior_prompts],
        latent_shapes=(plan.shape.latent_shape(*plan.main_size),) * drawn,
        augmentations=[NO_AUGMENTATION] * drawn,
    )
    return Batches(
        encodings=encodings,
        sources={DATA: data, PRIOR: prior},
        chances=SampleSettings(args.caption_dropout, timesteps, args.noise_offset, args.input_perturbation),
        seed=seed,
        data_batch=plan.global_batch,
        prior_batch=plan.prior_batch,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        accumulation=args.gradient_accumulation_steps,
        device=accelerator.device,
        dtype=compute_dtype(precision),
    )


def speed_up(args: argparse.Namespace, unet, plan: Plan, accelerator: Accelerator) -> None:
    """The attention that suits device and size; recomputation instead of memory where asked for."""
    set_attention(unet, plan.shape, *plan.largest_size, accelerator.device.type)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if args.enable_xformers_memory_efficient_attention:
        accelerator.print("PyTorch's own attention is used in place of xformers': as fast, and it takes every mask")


def find_optimizer(use_8bit_adam: bool) -> Callable[..., torch.optim.Optimizer]:
    """AdamW, or the one of bitsandbytes with its state in 8 bits; UserError where that is not installed."""
    if not use_8bit_adam:
        return functools.partial(torch.optim.AdamW, fused=True)  # one kernel over all tensors
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise UserError("--use_8bit_adam needs bitsandbytes: `pip install bitsandbytes`") from None
    return AdamW8bit


def optimizer_settings(args: argparse.Namespace) -> dict:
    return {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "weight_decay": args.adam_weight_decay,
        "eps": args.adam_epsilon,
    }


def make_validator(
    args, plan: Plan, objective: Objective, encodings, folder: Path, accelerator, unet, weights, average, dtype
) -> Validator:
    """Fixed draws of the training pictures, and of held-out ones where there are any; the prompts where given."""
    subjects, draws = plan.images_to_encode, {}
    for stream in (HELD_OUT, DATA):
        own = [subject for (of, _), subject in subjects.items() if of == stream]
        if own:
            shapes = [plan.shape.latent_shape(*subject.size) for subject in own]
            captions = [subject.captions[0] for subject in own]
            draws[stream] = fixed_samples(stream, captions, shapes, len(objective.noise_scheduler))
    weight_sets = 2 if average.enabled else 1
    steps_in_epoch = len(plan.pictures) * args.repeats / plan.global_batch
    drawer = None
    if args.validation_prompts:
        drawer = ValidationSampler(
            args.validation_prompts, args.num_validation_images, encodings, load_vae(plan.base).to(accelerator.device),
            load_sampler(plan.base, args.prediction_type, args.rescale_betas_zero_snr),
            plan.shape.latent_shape(*plan.main_size), guidance_scale_of(plan.base), folder / "validation",
        )  # fmt: skip
    return Validator(
        accelerator, unet, weights, average,
        FixedNoiseLoss(draws, encodings, Objective(objective.noise_scheduler), accelerator.device, dtype), drawer,
        measured=measured_steps(
            plan.steps, plan.samples_per_step, draws, weight_sets, args.validation_steps, args.checkpointing_steps
        ),
        drawn=sampled_steps(plan.steps, steps_in_epoch, args.validation_epochs, args.validation_steps),
    )  # fmt: skip

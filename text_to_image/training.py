"""Fine-tunes a Stable Diffusion UNet on captioned pictures: `train(args)` is the whole of it, in reading order."""

import argparse
import contextlib
import datetime
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from diffusers import UNet2DConditionModel

from averaging import make_average
from batches import DATA, PRIOR, Batches
from caching import StoredEncodings, add_prior, encode_texts, store_encodings
from checkpoints import find_checkpoint, load_training_state, save_checkpoint, step_of
from draws import Source
from errors import UserError
from model_defaults import guidance_scale_of
from models import (
    choose_attention,
    load_noise_scheduler,
    load_text_encoder,
    load_tokenizer,
    load_unet,
    load_vae,
    quiet_libraries,
    save_pipeline,
)
from objective import diffusion_loss
from plan import Plan, closing_lines, describe_run, make_plan, start_table
from prior import draw_prior, read_prior, write_prior
from reporting import StepLog, peak_memory_gb, print_table
from runs import check_same_run, output_folder, write_run
from sampling import load_sampler
from schedule import learning_rate_schedule


def train(args: argparse.Namespace) -> None:
    """Trains as `args` say (train_text_to_image.py documents them) and saves the pipeline.

    Raises UserError before the first step where the data set, the model or the output folder is not usable.
    """
    # Check the data set and the model, plan the run:
    quiet_libraries()
    accelerator = make_accelerator(args.mixed_precision)
    quiet = not accelerator.is_main_process
    torch.backends.cuda.matmul.allow_tf32 = args.allow_tf32
    plan = make_plan(args, accelerator)
    noise_scheduler = load_noise_scheduler(plan.base, args.prediction_type)
    tokenizer = load_tokenizer(plan.base)
    run = describe_run(args, plan, accelerator, tokenizer)
    folder = output_folder(args.output_dir, args.dataset, plan.base, run["fingerprint"])

    # Go on with an earlier start of this run, or see that nothing is left to do:
    earlier = check_same_run(folder, run["fingerprint"])
    if earlier and earlier["finished"] and earlier["steps"] >= plan.steps:
        print_table([("finished", f"after {earlier['steps']} steps"), *closing_lines(folder, earlier)], quiet)
        return
    checkpoint = find_checkpoint(args.resume_from_checkpoint, folder)
    if earlier and earlier["finished"] and not checkpoint:
        raise UserError(f"{folder} is finished and has no checkpoint to go on from; name another --output_dir")
    first_step = step_of(checkpoint) if checkpoint else 0
    print_table(start_table(args, plan, run, accelerator, tokenizer, folder, first_step), quiet)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_run(folder, run)

    # Encode what does not change, once; the VAE and the text encoder leave the memory with this:
    encodings = encode_all(args, plan, tokenizer, accelerator.device, quiet)
    if plan.prior_prompts:
        add_prior(encodings, prior_latents(args, plan, encodings, folder, run["seed"], accelerator))
    batches = make_batches(args, plan, encodings, run["seed"], len(noise_scheduler), accelerator)

    # The model, its optimizer and their average, new or from a checkpoint:
    unet = load_unet(checkpoint or plan.base).to(accelerator.device).train()
    choose_attention(unet, plan.shape, plan.height, plan.width, accelerator.device.type)
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    average = make_average(unet, args.use_ema, args.foreach_ema, checkpoint, first_step)
    optimizer = make_optimizer(args, unet)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    if checkpoint:
        restore(load_training_state(checkpoint), optimizer, accelerator)
    rate_at = learning_rate_schedule(args.lr_scheduler, plan.learning_rate, plan.warmup, plan.steps)
    parameters = list(unet.parameters())
    read_every = 1 if accelerator.device.type == "cpu" else 10
    log = StepLog(folder, first_step, plan.steps, plan.samples_per_step, read_every, quiet)

    # Train:
    for step in range(first_step, plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step)
        step_loss = torch.zeros((), device=accelerator.device)
        for part, batch in enumerate(batches.of_step(step), start=1):
            last = part == args.gradient_accumulation_steps
            with contextlib.nullcontext() if last else accelerator.no_sync(unet):
                losses = diffusion_loss(unet, noise_scheduler, batch, args.snr_gamma)
                # The mean over all samples of the step, however they are split: processes are averaged, parts added.
                loss = losses.sum() / plan.samples_per_step
                accelerator.backward(loss * accelerator.num_processes)
            step_loss += loss.detach()
        accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        average.step(parameters)

        done = step + 1
        epoch = done * plan.global_batch / (len(plan.pictures) * args.repeats)
        log.step(done, epoch, accelerator.reduce(step_loss, reduction="sum"), rate_at(step))
        if done % args.checkpointing_steps == 0:
            log.flush()
            checkpoint_run(folder, done, accelerator, unet, average, optimizer, args.checkpoints_total_limit)
    log.close()

    # Save the pipeline, with the averaged weights where there are such:
    if accelerator.is_main_process:
        trained = accelerator.unwrap_model(unet)
        average.copy_to(trained.parameters())
        save_pipeline(trained, plan.base, folder, noise_scheduler)
        write_run(folder, {**run, "finished": True, "finished_at": now(), "peak_memory_gb": peak_memory_gb()})
        print_table(closing_lines(folder, run), quiet)
    accelerator.wait_for_everyone()
    accelerator.end_training()


def make_accelerator(mixed_precision: str | None) -> Accelerator:
    try:
        return Accelerator(mixed_precision=mixed_precision)
    except ValueError as error:  # a precision that the device does not have
        raise UserError(f"--mixed_precision {mixed_precision}: {error}") from None


def encode_all(args: argparse.Namespace, plan: Plan, tokenizer, device: torch.device, quiet: bool) -> StoredEncodings:
    """Everything the VAE and the text encoder have to say; both are gone when this returns."""
    text_encoder = load_text_encoder(plan.base).to(device)
    texts = [caption for picture in plan.pictures for caption in picture.captions] + plan.prior_prompts
    text = encode_texts(tokenizer, text_encoder, texts, args.max_token_chunks, quiet)
    return store_encodings(plan.pictures, plan.height, plan.width, load_vae(plan.base).to(device), text, quiet)


def prior_latents(args, plan: Plan, encodings: StoredEncodings, folder: Path, seed: int, accelerator: Accelerator):
    """Latents (C, h, w) of the base's own pictures, drawn once a run; the processes share the work."""
    stored = folder / "cache" / "prior.safetensors"
    latents = read_prior(stored)
    accelerator.wait_for_everyone()  # all must have looked before one of them writes it
    if latents is not None:
        return latents
    unet = load_unet(plan.base).to(accelerator.device).eval()
    choose_attention(unet, plan.shape, plan.height, plan.width, accelerator.device.type)
    share = range(accelerator.process_index, len(plan.prior_prompts), accelerator.num_processes)
    with accelerator.autocast():
        drawn = draw_prior(
            unet, load_sampler(plan.base, args.prediction_type), plan.prior_prompts, encodings.text, plan.latent_shape,
            guidance_scale_of(plan.base), seed, share, quiet=not accelerator.is_main_process,
        )  # fmt: skip
    shares = gather_object([drawn])
    latents = {index: latent for share in shares for index, latent in share.items()}
    if accelerator.is_main_process:
        write_prior(stored, latents)
    return [latents[index] for index in range(len(latents))]


def make_batches(args, plan: Plan, encodings: StoredEncodings, seed: int, timesteps: int, accelerator) -> Batches:
    data = Source([picture.forms for picture in plan.pictures], plan.latent_shape)
    prior = Source([((prompt,),) for prompt in plan.prior_prompts], plan.latent_shape)
    return Batches(
        encodings=encodings,
        sources={DATA: data, PRIOR: prior},
        seed=seed,
        data_batch=plan.global_batch,
        prior_batch=plan.prior_batch,
        caption_dropout=args.caption_dropout,
        timesteps=timesteps,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
        accumulation=args.gradient_accumulation_steps,
        device=accelerator.device,
    )


def make_optimizer(args: argparse.Namespace, unet: UNet2DConditionModel) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        unet.parameters(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        fused=True,  # one kernel over all tensors instead of a dozen for each
    )


def checkpoint_run(
    folder: Path, step: int, accelerator: Accelerator, unet, average, optimizer, limit: int | None
) -> None:
    """Written by the main process; the others wait, or they would run ahead into a collective call without it."""
    if accelerator.is_main_process:
        state = {"optimizer": optimizer.state_dict(), "scaler": scaler_state(accelerator)}
        save_checkpoint(folder, step, accelerator.unwrap_model(unet), average, state, limit)
    accelerator.wait_for_everyone()


def scaler_state(accelerator: Accelerator) -> dict | None:
    return accelerator.scaler.state_dict() if accelerator.scaler else None


def restore(state: dict, optimizer, accelerator: Accelerator) -> None:
    optimizer.load_state_dict(state["optimizer"])
    if accelerator.scaler and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")

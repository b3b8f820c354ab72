"""Pre-trains the starter model `base/` from the renderer alone: VAE, then text encoder and UNet together.

    python pretrain_base.py --work /scratch/starter               all stages: half a day on two cores
    python pretrain_base.py --work /scratch/starter --stage save  only the folder, from the checkpoints that are there

Every stage leaves a checkpoint in --work every minute or two; started again, the same command goes on from there.
"""

import argparse
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from pictures import SHARES, SIZES, TROUSERS_SHARES, render_pairs, render_pictures
from pretrain_vae import StageCheckpoint, encode_pictures, random_crops, train_decoder, train_vae, whiten
from training_batches import (
    CHUNK,
    CaptionSampler,
    LatentTable,
    PictureSampler,
    VPredictionLoss,
    encode_text,
    make_batch,
    view_margin_loss,
)
from unseen_words import initialise_unseen_words, token_ids_in_captions

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Stage:
    """How one stage trains the UNet and the text encoder."""

    scale: int  # pictures are SIZES divided by this
    batch: int
    learning_rate: float  # constant, then a cosine to 0
    decay_from: float  # share of the steps at which the cosine begins
    ema: float
    floor: float  # smallest min-SNR weight: the larger a picture, the higher the noise at which its layout is decided
    focus: dict[str, float]  # shares of the steps with focused batches (training_batches.py)
    sizes: tuple[float, ...] = SHARES  # shares of SIZES
    sets: dict[str, float] = field(default_factory=lambda: {"pictures": 0.8, "scenes": 0.2})  # shares of pictures.SETS


STAGES = {
    "unet64": Stage(
        scale=4, batch=64, learning_rate=1e-3, decay_from=1.0, ema=0.999, floor=0.15,
        focus={"corner": 0.25, "view": 0.1, "sentence": 0.1},
    ),
    "unet128": Stage(
        scale=2, batch=32, learning_rate=1e-3, decay_from=0.75, ema=0.9995, floor=0.15,
        focus={"corner": 0.35, "view": 0.1, "sentence": 0.15},
    ),
    "unet256": Stage(
        scale=1, batch=12, learning_rate=6e-4, decay_from=0.3, ema=0.999, floor=0.5,
        focus={"corner": 0.06, "view": 0.3, "sentence": 0.15},
    ),
    # One of a hundred other pictures shows a folded leg, so trousers with one were generated in pieces.
    "trousers": Stage(
        scale=1, batch=12, learning_rate=4e-4, decay_from=0.1, ema=0.999, floor=0.5,
        focus={"corner": 0.12, "view": 0.15, "fold": 0.3, "sentence": 0.1},
        sizes=TROUSERS_SHARES, sets={"pictures": 0.4, "trousers": 0.4, "scenes": 0.2},
    ),
}  # fmt: skip


def make_unet() -> UNet2DConditionModel:
    """4 M parameters. Attention only where the latents are 16 x 16 or smaller (at 256 px): above it costs too much."""
    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(48, 80, 128, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_text_encoder(vocabulary: int) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=512,
        projection_dim=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=CHUNK,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    return CLIPTextModel(config)


def make_scheduler() -> PNDMScheduler:
    """Stable Diffusion's sampler and noise schedule, with the v prediction of 2.x: epsilon hardly learns colours."""
    return PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
    )


class Trainee:
    """The UNet and the text encoder with their optimizer and moving average: made, loaded, stepped and saved."""

    def __init__(self, vocabulary: int, ema_decay: float, device: str):
        self.models = make_models(vocabulary).to(device)
        if device == "cpu":  # on CPU the backward pass of fused attention is slow at small sizes
            self.models["unet"].set_attn_processor(AttnProcessor())
            self.models["text"].set_attn_implementation("eager")
        parameters = self.models.parameters()
        self.optimizer = torch.optim.AdamW(parameters, lr=1, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.ema = self._new_ema(ema_decay)
        self.ema_decay, self.device = ema_decay, device

    def _new_ema(self, decay: float) -> EMAModel:
        return EMAModel(self.models.parameters(), decay=decay, use_ema_warmup=True, power=0.8)

    def start_with(self, weights: dict) -> None:
        self.models.load_state_dict(weights)
        self.ema = self._new_ema(self.ema_decay)

    def load(self, state: dict) -> None:
        self.models.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.ema.load_state_dict(state["ema"])

    def state(self) -> dict:
        parts = {"model": self.models, "optimizer": self.optimizer, "ema": self.ema}
        return {name: part.state_dict() for name, part in parts.items()}

    def to_device(self) -> None:
        self.ema.to(self.device)
        self.models["unet"].to(memory_format=torch.channels_last)

    def step(self, loss: torch.Tensor, learning_rate: float) -> None:
        self.optimizer.param_groups[0]["lr"] = learning_rate
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.models.parameters(), 1.0)
        self.optimizer.step()
        self.ema.step(self.models.parameters())


def make_models(vocabulary: int) -> torch.nn.ModuleDict:
    return torch.nn.ModuleDict({"unet": make_unet(), "text": make_text_encoder(vocabulary)})


def train_diffusion(work: Path, stage: str, samples: int, device: str, base: Path | None = None) -> None:
    """Trains one stage and leaves its checkpoint in `work`.

    It starts with the averaged weights of the stage before, or else with those in the pipeline folder `base`.
    """
    options = STAGES[stage]
    tokenizer = CLIPTokenizer.from_pretrained(HERE / "base" / "tokenizer")
    trainee, checkpoint, first_step = Trainee(len(tokenizer), options.ema, device), stage_checkpoint(work, stage), 0
    if state := checkpoint.load():
        trainee.load(state)
        first_step = state["step"]
    elif weights := _initial_weights(work, stage, base):
        trainee.start_with(weights)
    trainee.to_device()
    unet, text_encoder = trainee.models["unet"], trainee.models["text"]
    count, sizes = json.loads((work / "count.json").read_text()), range(len(SIZES))
    pictures = [PictureSampler(size, count, options.sets) for size in sizes]
    latents = [LatentTable.load(work, size, options.scale, options.sets) for size in sizes]
    captions = CaptionSampler(tokenizer)
    v_loss = VPredictionLoss(make_scheduler().alphas_cumprod.to(device), options.floor)
    steps = samples // options.batch
    losses, bar = [], tqdm(range(first_step, steps), initial=first_step, total=steps, desc=stage, mininterval=20)
    for step in bar:
        rng = np.random.default_rng([step, options.scale, 13])
        size = rng.choice(len(SIZES), p=options.sizes)
        batch = make_batch(captions, pictures[size], options.batch, options.focus, rng)
        with torch.autocast(device, torch.bfloat16):
            hidden = encode_text(text_encoder, batch.input_ids.to(device)).float()
        generator = torch.Generator(device).manual_seed(step)
        loss = v_loss(unet, batch, latents[size][batch.picks].to(device), hidden, generator)
        loss = loss + 0.1 * view_margin_loss(hidden, batch.view_signs)
        trainee.step(loss, _learning_rate(options, step, steps))
        losses.append(loss.detach())
        if step % 100 == 99:
            bar.set_postfix(loss=f"{torch.stack(losses[-100:]).mean():.4f}", refresh=False)
        if checkpoint.due() or step + 1 == steps:
            checkpoint.save({**trainee.state(), "step": step + 1})


def stage_checkpoint(work: Path, stage: str) -> StageCheckpoint:
    return StageCheckpoint(work / f"{stage}.pt")


def _learning_rate(options: Stage, step: int, steps: int) -> float:
    done, decay_from = step / steps, options.decay_from
    decayed = 0.0 if done < decay_from else (done - decay_from) / max(1 - decay_from, 1e-9)
    return options.learning_rate * min(1, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * decayed)) + 1e-6


def _initial_weights(work: Path, stage: str, base: Path | None) -> dict | None:
    names = list(STAGES)
    earlier = [work / f"{name}.pt" for name in names[: names.index(stage)]]
    for path in reversed([p for p in earlier if p.exists()]):
        return ema_weights(path)
    return pipeline_weights(base) if base else None


def pipeline_weights(base: Path) -> dict:
    """The weights of a pipeline folder, as a state dict of {'unet', 'text'}."""
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet", torch_dtype=torch.float32)
    text = CLIPTextModel.from_pretrained(base, subfolder="text_encoder", dtype=torch.float32)
    return torch.nn.ModuleDict({"unet": unet, "text": text}).state_dict()


def ema_weights(path: Path) -> dict:
    """The averaged weights in a stage's checkpoint, as a state dict of {'unet', 'text'}."""
    state = torch.load(path, weights_only=True, map_location="cpu")
    models = make_models(len(state["model"]["text.embeddings.token_embedding.weight"]))
    models.load_state_dict(state["model"])
    ema = EMAModel(models.parameters())
    ema.load_state_dict(state["ema"])
    ema.copy_to(models.parameters())
    return models.state_dict()


# --- the pipeline folder --------------------------------------------------------------------------------------------


def save_base(work: Path, to: Path, vae: AutoencoderKL) -> None:
    """Writes the weights of the last stage with a checkpoint as a pipeline folder."""
    newest = [work / f"{name}.pt" for name in STAGES if (work / f"{name}.pt").exists()][-1]
    save_pipeline(ema_weights(newest), vae, to)
    print(f"{newest.name} -> {to}: {sum(f.stat().st_size for f in to.rglob('*') if f.is_file()) / 1e6:.1f} MB")


def save_pipeline(weights: dict, vae: AutoencoderKL, to: Path) -> None:
    """Writes a StableDiffusionPipeline folder, fp16 safetensors; `weights` is a state dict of {'unet', 'text'}."""
    tokenizer = CLIPTokenizer.from_pretrained(HERE / "base" / "tokenizer")
    models = make_models(len(tokenizer))
    models.load_state_dict(weights)
    initialise_unseen_words(models["text"], token_ids_in_captions(tokenizer))
    pipeline = StableDiffusionPipeline(
        vae=vae.cpu(),
        text_encoder=models["text"],
        tokenizer=tokenizer,
        unet=models["unet"],
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    # transformers 5 writes tokenizer.json alone; other tools need CLIP's own files too. Read before `to` is written.
    own_files = [file for file in (HERE / "base" / "tokenizer").iterdir() if file.name != "tokenizer.json"]
    contents = {file.name: file.read_bytes() for file in own_files}
    pipeline.to(torch.float16).save_pretrained(to)
    for name, content in contents.items():
        (to / "tokenizer" / name).write_bytes(content)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures, latents and checkpoints (3 GB)")
    parser.add_argument("--to", type=Path, default=HERE / "base", help="pipeline folder to write")
    parser.add_argument("--pictures", type=int, default=7000, help="number of pictures to render and train on")
    parser.add_argument("--vae_steps", type=int, default=2600, help="optimisation steps of the VAE")
    parser.add_argument("--decoder_steps", type=int, default=600, help="further steps of the VAE's decoder alone")
    parser.add_argument(
        "--samples",
        type=int,
        nargs=4,
        default=(70_000, 312_000, 204_000, 54_000),
        help="number of samples in each UNet stage",
    )
    parser.add_argument(
        "--stage", choices=("all", "render", "vae", "latents", *STAGES, "decoder", "save"), default="all"
    )
    parser.add_argument("--base", type=Path, help="finished pipeline folder: keep its VAE and train its UNet further")
    args = parser.parse_args()
    if args.base and (args.work / "vae.pt").exists():
        parser.error(f"--base: {args.work} holds a VAE of its own and its latents; name an empty folder with --work")
    return args


def main() -> None:
    args = parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = lambda stage: args.stage in ("all", stage)  # noqa: E731
    args.work.mkdir(parents=True, exist_ok=True)
    if wanted("render"):
        (args.work / "count.json").write_text(json.dumps(args.pictures))
        render_pictures(args.work, args.pictures)
        render_pairs(args.work, args.pictures)
    torch.manual_seed(0)
    if args.stage == "render":
        return
    if args.base:
        vae = AutoencoderKL.from_pretrained(args.base, subfolder="vae", torch_dtype=torch.float32).to(device)
    else:
        vae = train_vae(args.work, args.vae_steps if wanted("vae") else 0, device)
    if args.stage == "vae":
        return
    if not args.base:
        whiten(vae, random_crops(args.work, 0, 200, np.random.default_rng(12)), device)
    for name, samples in zip(STAGES, args.samples, strict=True):
        if wanted("latents") or wanted(name):
            encode_pictures(vae, args.work, STAGES[name].scale, device, STAGES[name].sets)
        if wanted(name):
            train_diffusion(args.work, name, samples, device, args.base)
    if not args.base:
        train_decoder(vae, args.work, args.decoder_steps if wanted("decoder") else 0, device)
    if wanted("save"):
        save_base(args.work, args.to, vae)


if __name__ == "__main__":
    main()

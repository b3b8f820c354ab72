"""Pre-trains the starter model `base/` from the renderer alone: VAE, then text encoder and UNet together.

    python pretrain_base.py --work /scratch/starter               all stages: half a day on two cores
    python pretrain_base.py --work /scratch/starter --stage save  only the folder, from the checkpoints that are there

Every stage leaves a checkpoint in --work every minute or two; started again, the same command goes on from there.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from describe import caption_of
from lessons import CHUNK, Captions, Pictures, draw_lesson, encode_text, silence, v_loss
from pictures import SHARES, SIZES, TROUSERS_SHARES, render_pictures, render_twins
from pretrain_vae import Checkpoint, encode_pictures, train_decoder, train_vae, whiten
from render_garments import sample_spec

HERE = Path(__file__).resolve().parent
# Each stage: pixels relative to SIZES, batch, learning rate (constant, then cosine to 0 from `decay_from` on), EMA,
# the least weight of a timestep (where a garment lies is decided at ever higher noise the larger the picture is), the
# shares of steps that drill one thing alone, and those of the sizes and sets that pictures come from.
STAGES = {
    "unet64": {
        "scale": 4,
        "batch": 64,
        "lr": 1e-3,
        "decay_from": 1.0,
        "ema": 0.999,
        "floor": 0.15,
        "drills": {"corner": 0.25, "view": 0.1},
        "sizes": SHARES,
        "sets": {"pictures": 1.0},
    },
    "unet128": {
        "scale": 2,
        "batch": 32,
        "lr": 1e-3,
        "decay_from": 0.75,
        "ema": 0.9995,
        "floor": 0.15,
        "drills": {"corner": 0.4, "view": 0.1},
        "sizes": SHARES,
        "sets": {"pictures": 1.0},
    },
    "unet256": {
        "scale": 1,
        "batch": 12,
        "lr": 6e-4,
        "decay_from": 0.3,
        "ema": 0.999,
        "floor": 0.5,
        "drills": {"corner": 0.06, "view": 0.35},
        "sizes": SHARES,
        "sets": {"pictures": 1.0},
    },
    "trousers": {  # a folded leg is one picture in a hundred of the others, and came out in pieces
        "scale": 1,
        "batch": 12,
        "lr": 4e-4,
        "decay_from": 0.1,
        "ema": 0.999,
        "floor": 0.5,
        "drills": {"corner": 0.12, "view": 0.15, "fold": 0.3},
        "sizes": TROUSERS_SHARES,
        "sets": {"pictures": 0.5, "trousers": 0.5},
    },
}


def make_unet() -> UNet2DConditionModel:
    """Attention only where the latent is 16 x 16 or smaller (at 256 px): above it costs more than it brings here."""
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
    """Stable Diffusion's own default and noise schedule, with 2.x's v prediction: epsilon hardly learns colour."""
    return PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
    )


def train_diffusion(work: Path, stage: str, samples: int, device: str, base: Path | None = None) -> None:
    """One stage, begun with the averaged weights of the one before, else with those in the folder `base`; leaves its
    checkpoint in `work`."""
    options = STAGES[stage]
    tokenizer = CLIPTokenizer.from_pretrained(HERE / "base" / "tokenizer")
    models = torch.nn.ModuleDict({"unet": make_unet(), "text": make_text_encoder(len(tokenizer))}).to(device)
    if device == "cpu":  # the fused attention's backward is slow on CPU at small sizes
        models["unet"].set_attn_processor(AttnProcessor())
        models["text"].set_attn_implementation("eager")
    optimizer = torch.optim.AdamW(models.parameters(), lr=1, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema = EMAModel(models.parameters(), decay=options["ema"], use_ema_warmup=True, power=0.8)
    file, begun = Checkpoint(work / f"{stage}.pt"), 0
    if state := file.load():
        models.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        begun = state["step"]
    elif before := _weights_before(work, stage, base):
        models.load_state_dict(before)
        ema = EMAModel(models.parameters(), decay=options["ema"], use_ema_warmup=True, power=0.8)
    ema.to(device)
    models["unet"].to(memory_format=torch.channels_last)
    pictures = [Pictures(work, size, options["scale"], options["sets"]) for size in range(len(SIZES))]
    alphas_cumprod, captions = make_scheduler().alphas_cumprod, Captions(tokenizer)
    steps = samples // options["batch"]
    losses, bar = [], tqdm(range(begun, steps), initial=begun, total=steps, desc=stage, mininterval=20)
    for step in bar:
        optimizer.param_groups[0]["lr"] = _rate(options, step, steps)
        rng = np.random.default_rng([step, options["scale"], 13])
        lesson = draw_lesson(captions, pictures[rng.choice(len(SIZES), p=options["sizes"])], options, rng)
        with torch.autocast(device, torch.bfloat16):
            hidden = encode_text(models["text"], lesson.input_ids.to(device)).float()
        noise = torch.Generator().manual_seed(step)
        loss = v_loss(models["unet"], lesson, hidden, alphas_cumprod, noise, device, options["floor"])
        loss = loss + 0.1 * silence(hidden, lesson.views)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        optimizer.step()
        ema.step(models.parameters())
        losses.append(loss.detach())
        if step % 100 == 99:
            bar.set_postfix(loss=f"{torch.stack(losses[-100:]).mean():.4f}", refresh=False)
        if file.due() or step + 1 == steps:
            state = {"model": models.state_dict(), "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}
            file.save({**state, "step": step + 1})


def _rate(options: dict, step: int, steps: int) -> float:
    done, decay_from = step / steps, options["decay_from"]
    fall = 0.0 if done < decay_from else (done - decay_from) / max(1 - decay_from, 1e-9)
    return options["lr"] * min(1, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * fall)) + 1e-6


def _ema_weights(models, ema: EMAModel) -> dict:
    ema.copy_to(models.parameters())
    return models.state_dict()


def _weights_before(work: Path, stage: str, base: Path | None) -> dict | None:
    names = list(STAGES)
    earlier = [work / f"{name}.pt" for name in names[: names.index(stage)]]
    for path in reversed([p for p in earlier if p.exists()]):
        return averaged_weights(path)
    return weights_in(base) if base else None


def weights_in(base: Path) -> dict:
    """The weights of a finished pipeline folder, as a state dict of {'unet', 'text'}."""
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet", torch_dtype=torch.float32)
    text = CLIPTextModel.from_pretrained(base, subfolder="text_encoder", dtype=torch.float32)
    return torch.nn.ModuleDict({"unet": unet, "text": text}).state_dict()


def averaged_weights(path: Path) -> dict:
    """The EMA weights in a stage's checkpoint, as a state dict of {'unet', 'text'}."""
    state = torch.load(path, weights_only=True, map_location="cpu")
    vocabulary = len(state["model"]["text.embeddings.token_embedding.weight"])
    models = torch.nn.ModuleDict({"unet": make_unet(), "text": make_text_encoder(vocabulary)})
    models.load_state_dict(state["model"])
    ema = EMAModel(models.parameters())
    ema.load_state_dict(state["ema"])
    return _ema_weights(models, ema)


# --- The pipeline folder --------------------------------------------------------------------------------------------


@torch.no_grad()
def settle_unseen_words(text_encoder: CLIPTextModel, seen: set[int], rounds: int = 8) -> None:
    """Gives words that no caption used embeddings that the encoder does not overlook, so that they can be taught.

    It has learned to listen to words for garments and colours alone: a random embedding of the right length comes out
    as the empty caption would. So an unseen word is a mixture of telling ones, drawn anew until it is heard.
    """
    table, chance = text_encoder.get_input_embeddings().weight, torch.Generator().manual_seed(0)
    known = torch.tensor(sorted(seen))
    said = _heard(text_encoder, known)
    telling = table[known[said >= said.quantile(0.85)]].clone()
    enough = 0.5 * said.quantile(0.85)
    unheard = torch.tensor(sorted(set(range(len(table) - 2)) - seen))  # the last two mark start and end
    for _ in range(rounds):
        shares = torch.rand(len(unheard), len(telling), generator=chance) ** 12  # two or three words each
        table[unheard] = shares / shares.sum(1, keepdim=True) @ telling * 1.2
        unheard = unheard[_heard(text_encoder, unheard) < enough]
        if not len(unheard):
            break


def _heard(text_encoder: CLIPTextModel, words: torch.Tensor) -> torch.Tensor:
    """(N,) how far each word alone moves the encoder's output from that of the empty caption."""
    bos, eos = text_encoder.config.bos_token_id, text_encoder.config.eos_token_id
    ends = torch.full((len(words), 3), eos)
    ids = torch.cat([torch.full((len(words), 1), bos), words[:, None], ends], 1)
    empty = torch.tensor([[bos, eos, eos, eos, eos]])
    hidden = torch.cat([text_encoder(part)[0] for part in ids.split(512)])
    return (hidden - text_encoder(empty)[0]).flatten(1).norm(dim=1)


def seen_words(tokenizer: CLIPTokenizer) -> set[int]:
    texts = [caption_of(sample_spec(i), np.random.default_rng(i), w) for i in range(1500) for w in (0, 12, 150)]
    return {i for ids in tokenizer(texts, verbose=False).input_ids for i in ids}


def save_base(work: Path, to: Path, vae: AutoencoderKL) -> None:
    """Writes the newest weights as an ordinary StableDiffusionPipeline folder in fp16 safetensors."""
    tokenizer = CLIPTokenizer.from_pretrained(HERE / "base" / "tokenizer")
    newest = [work / f"{name}.pt" for name in STAGES if (work / f"{name}.pt").exists()][-1]
    models = torch.nn.ModuleDict({"unet": make_unet(), "text": make_text_encoder(len(tokenizer))})
    models.load_state_dict(averaged_weights(newest))
    settle_unseen_words(models["text"], seen_words(tokenizer))
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
    kept = {f.name: f.read_bytes() for f in (HERE / "base" / "tokenizer").iterdir() if f.name != "tokenizer.json"}
    pipeline.to(torch.float16).save_pretrained(to)
    for name, content in kept.items():  # transformers 5 writes tokenizer.json alone; other tools want CLIP's two files
        (to / "tokenizer" / name).write_bytes(content)
    print(f"{newest.name} -> {to}: {sum(f.stat().st_size for f in to.rglob('*') if f.is_file()) / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures, latents and checkpoints (3 GB)")
    parser.add_argument("--to", type=Path, default=HERE / "base", help="pipeline folder to write")
    parser.add_argument("--pictures", type=int, default=7000, help="how many pictures to render and learn from")
    parser.add_argument("--vae_steps", type=int, default=2600, help="optimisation steps of the VAE")
    parser.add_argument("--decoder_steps", type=int, default=600, help="further steps of the VAE's decoder alone")
    parser.add_argument(
        "--samples", type=int, nargs=4, default=(70_000, 312_000, 204_000, 54_000), help="seen by each UNet stage"
    )
    parser.add_argument(
        "--stage", choices=("all", "render", "vae", "latents", *STAGES, "decoder", "save"), default="all"
    )
    parser.add_argument("--base", type=Path, help="finished folder whose VAE is kept and whose UNet learns on")
    args = parser.parse_args()
    if args.base and (args.work / "vae.pt").exists():
        parser.error(f"--base: {args.work} holds a VAE of its own and its latents; name an empty folder with --work")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = lambda stage: args.stage in ("all", stage)  # noqa: E731
    args.work.mkdir(parents=True, exist_ok=True)
    if wanted("render"):
        (args.work / "count.json").write_text(json.dumps(args.pictures))
        render_pictures(args.work, args.pictures)
        render_twins(args.work, args.pictures)
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
        whiten(vae, args.work, device)
    for name, samples in zip(STAGES, args.samples, strict=True):
        if wanted("latents") or wanted(name):
            encode_pictures(vae, args.work, STAGES[name]["scale"], device, STAGES[name]["sets"])
        if wanted(name):
            train_diffusion(args.work, name, samples, device, args.base)
    if not args.base:
        train_decoder(vae, args.work, args.decoder_steps if wanted("decoder") else 0, device)
    if wanted("save"):
        save_base(args.work, args.to, vae)


if __name__ == "__main__":
    main()

"""Pre-trains the starter model `base/` from the renderer alone: VAE, then text encoder and UNet together.

    python pretrain_base.py --work /scratch/starter               all stages: two hours on two cores
    python pretrain_base.py --work /scratch/starter --stage save  only the folder, from the checkpoints that are there

Every stage leaves a checkpoint in --work every minute or two; started again, the same command goes on from there.
"""

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from describe import caption_of
from pictures import SHARES, SIZES, pictures_of, render_pictures, seeds_of
from render_garments import mirrored_spec, sample_spec

HERE = Path(__file__).resolve().parent
CHUNK = 77  # tokens that the text encoder reads at once: 75 and the two that mark start and end
# Each stage: pixels relative to SIZES, batch, learning rate (constant, then cosine to 0 from `decay_from` on), EMA.
STAGES = {
    "unet64": {"scale": 4, "batch": 64, "lr": 1e-3, "decay_from": 1.0, "ema": 0.999},
    "unet128": {"scale": 2, "batch": 32, "lr": 1e-3, "decay_from": 0.6, "ema": 0.9995},
    "unet256": {"scale": 1, "batch": 12, "lr": 6e-4, "decay_from": 0.3, "ema": 0.999},
}


def make_vae() -> AutoencoderKL:
    """0.65 M parameters, factor 4: at 256 px a latent of 64 x 64, on which SD's UNet blocks still see seams."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=256,
        scaling_factor=1.0,
    )
    with torch.no_grad():
        vae.quant_conv.bias[4:] = -7.0  # start with a posterior of little noise
    return vae


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


class Checkpoint:
    """The state of one stage on disk, written beside and renamed, every `minutes`."""

    def __init__(self, path: Path, minutes: float = 1.5):
        self.path, self.minutes, self.last = path, minutes, time.time()

    def load(self) -> dict | None:
        return torch.load(self.path, weights_only=True, map_location="cpu") if self.path.exists() else None

    def save(self, state: dict) -> None:
        beside = self.path.with_suffix(".new")
        torch.save(state, beside)
        beside.rename(self.path)
        self.last = time.time()

    def due(self) -> bool:
        return time.time() - self.last > 60 * self.minutes


# --- VAE ------------------------------------------------------------------------------------------------------------


def crops(work: Path, size: int, batch: int, rng: np.random.Generator) -> torch.Tensor:
    """Random crops of `size` pixels of random pictures, (B, 3, size, size) in -1..1; None crops nothing."""
    pictures = pictures_of(work, int(rng.choice(len(SIZES), p=SHARES)))
    h, w = pictures.shape[1:3]
    out = []
    for _ in range(batch):
        picture = pictures[rng.integers(len(pictures))]
        if size:
            y, x = rng.integers(h - size + 1), rng.integers(w - size + 1)
            picture = picture[y : y + size, x : x + size]
        picture = picture[:, ::-1] if rng.random() < 0.5 else picture
        out.append(torch.from_numpy(np.ascontiguousarray(picture)))
    return torch.stack(out).permute(0, 3, 1, 2).float() / 127.5 - 1


def recoloured(images: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Half of the pictures with their colour channels exchanged and weakened: all colours, not only the renderer's."""
    out = images.clone()
    for i in np.flatnonzero(rng.random(len(images)) < 0.5):
        gain = torch.tensor(rng.uniform(0.6, 1.0, (3, 1, 1)), dtype=images.dtype, device=images.device)
        out[i] = (images[i, rng.permutation(3)] + 1) * gain - 1
    return out


def correlation(latents: torch.Tensor) -> torch.Tensor:
    """How much the channels of (B, C, h, w) repeat each other, 0..1: a direction all leave out drowns in noise."""
    z = latents.float().transpose(0, 1).flatten(1)
    r = torch.corrcoef(z)
    return (r**2).sum().sub(len(r)) / (len(r) * (len(r) - 1))


def slopes(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return images[..., 1:, :] - images[..., :-1, :], images[..., :, 1:] - images[..., :, :-1]


def train_vae(work: Path, steps: int, device: str) -> AutoencoderKL:
    """L1 on pixels and on their slopes (seams stay crisp), crops first, whole pictures at the end."""
    vae, file = make_vae().to(device), Checkpoint(work / "vae.pt")
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1, betas=(0.9, 0.99), weight_decay=0.01)
    begun = 0
    if state := file.load():
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        begun = state["step"]
    whole_from = int(0.85 * steps)  # group norm sees other statistics in whole, mostly white pictures: finish on them
    bar = tqdm(range(begun, steps), initial=begun, total=steps, desc="vae", mininterval=10)
    for step in bar:
        rate = 6e-4 * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = rate + 1e-5
        rng = np.random.default_rng([step, 11])
        images = crops(work, 0 if step >= whole_from else 80, 4 if step >= whole_from else 16, rng).to(device)
        images = recoloured(images, rng)
        with torch.autocast(device, torch.bfloat16, enabled=step < whole_from):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        decoded = decoded.float()
        loss = F.l1_loss(decoded, images) + 8 * F.mse_loss(decoded, images) + 0.05 * correlation(posterior.mean)
        loss = loss + sum(F.l1_loss(a, b) for a, b in zip(slopes(decoded), slopes(images), strict=True))
        loss = loss + 1e-8 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            psnr = -10 * math.log10(F.mse_loss(decoded.clamp(-1, 1), images).item() / 4)
            bar.set_postfix(psnr=f"{psnr:.1f}", refresh=False)
        if file.due() or step + 1 == steps:
            file.save({"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})
    return vae.eval()


@torch.no_grad()
def whiten(vae: AutoencoderKL, work: Path, device: str) -> None:
    """Turns the latent space so that its channels have mean 0, deviation 1 and no correlation (ZCA), within the VAE.

    The turn goes into quant_conv, its inverse into post_quant_conv: reconstructions stay the same.
    """
    images = crops(work, 0, 200, np.random.default_rng(12))
    z = torch.cat([vae.encode(i.to(device)).latent_dist.mean for i in images.split(8)])
    z = z.permute(1, 0, 2, 3).flatten(1).double()
    mean, (values, vectors) = z.mean(1), torch.linalg.eigh(torch.cov(z))
    turn = (vectors @ torch.diag(values**-0.5) @ vectors.T).float()
    back = (vectors @ torch.diag(values**0.5) @ vectors.T).float()
    mean = mean.float()
    quant, post = vae.quant_conv, vae.post_quant_conv
    weight, bias = quant.weight[:, :, 0, 0].clone(), quant.bias.clone()
    quant.weight[:4, :, 0, 0], quant.bias[:4] = turn @ weight[:4], turn @ (bias[:4] - mean)
    # The posterior's noise grows with its channel; e^-4 of its variance is kept, fine-tuning needs no more.
    quant.bias[4:] += torch.log((turn**2).sum(1)) - 4
    old = post.weight[:, :, 0, 0].clone()
    post.bias += old @ mean
    post.weight[:, :, 0, 0] = old @ back


def train_decoder(vae: AutoencoderKL, work: Path, steps: int, device: str) -> None:
    """The decoder alone on whole pictures and fixed latents, its loss sees areas' colours: hues come out right."""
    file, begun = Checkpoint(work / "decoder.pt"), 0
    learned = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder])
    optimizer = torch.optim.AdamW(learned.parameters(), lr=1, betas=(0.9, 0.99), weight_decay=0.01)
    if state := file.load():
        learned.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        begun = state["step"]
    learned.train()
    bar = tqdm(range(begun, steps), initial=begun, total=steps, desc="decoder", mininterval=10)
    for step in bar:
        optimizer.param_groups[0]["lr"] = 8e-4 * min(1, (step + 1) / 50) * (1 - step / steps) + 1e-5
        rng = np.random.default_rng([step, 15])
        images = recoloured(crops(work, 0, 4, rng), rng).to(device)
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mean
            latents = latents + 0.05 * torch.randn(latents.shape, device=device)
        with torch.autocast(device, torch.bfloat16):
            decoded = vae.decode(latents).sample.float()
        loss = F.l1_loss(decoded, images) + 8 * F.mse_loss(decoded, images)
        loss = loss + 20 * F.mse_loss(F.avg_pool2d(decoded, 8), F.avg_pool2d(images, 8))
        loss = loss + sum(F.l1_loss(a, b) for a, b in zip(slopes(decoded), slopes(images), strict=True))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            psnr = -10 * math.log10(F.mse_loss(decoded.detach().clamp(-1, 1), images).item() / 4)
            bar.set_postfix(psnr=f"{psnr:.1f}", refresh=False)
        if file.due() or step + 1 == steps:
            file.save({"model": learned.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})
    learned.eval()


# --- Latents --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, work: Path, scale: int, device: str) -> None:
    """Writes the latents of all pictures and their mirror images at 1/`scale` of their size, (N, 2, 4, h, w) fp16."""
    for size, (w, h) in enumerate(SIZES):
        path = latents_file(work, size, scale)
        if path.exists():
            continue
        pictures, out = pictures_of(work, size), []
        for start in tqdm(range(0, len(pictures), 16), desc=f"encode {w}x{h} / {scale}", mininterval=10):
            images = torch.from_numpy(np.ascontiguousarray(pictures[start : start + 16])).permute(0, 3, 1, 2).float()
            images = F.avg_pool2d(images, scale) if scale > 1 else images
            images = (images / 127.5 - 1).to(device)
            with torch.autocast(device, torch.bfloat16):
                both = [vae.encode(i).latent_dist.mean for i in (images, images.flip(-1))]
            out.append(torch.stack(both, 1).half().cpu().numpy())
        np.save(path.with_suffix(".new.npy"), np.concatenate(out))
        path.with_suffix(".new.npy").rename(path)


def latents_file(work: Path, size: int, scale: int) -> Path:
    return work / f"latents-{SIZES[size][0]}x{SIZES[size][1]}-{scale}.npy"


# --- Text encoder and UNet ------------------------------------------------------------------------------------------


class Captions:
    """Draws a batch of captions, all of the same number of chunks, so that no batch needs a mask."""

    # chunks, share of the steps, numbers of words to draw from
    LENGTHS = ((1, 0.74, (0, 0, 12, 12, 12, 12, 30, 45)), (2, 0.16, (70, 85, 100)), (3, 0.10, (125, 140, 150)))

    def __init__(self, tokenizer: CLIPTokenizer, dropout: float = 0.12):
        self.tokenizer, self.dropout = tokenizer, dropout

    def draw(self, specs: list, rng: np.random.Generator) -> torch.Tensor:
        """Token ids (B, chunks, 77)."""
        chunks, _, words = self.LENGTHS[rng.choice(3, p=[share for _, share, _ in self.LENGTHS])]
        texts = [caption_of(spec, rng, int(rng.choice(words))) for spec in specs]
        if chunks == 1:
            texts = ["" if rng.random() < self.dropout else text for text in texts]
        return torch.tensor([self.tokens(text, chunks) for text in texts])

    def tokens(self, text: str, chunks: int) -> list[list[int]]:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        rows = [ids[i * 75 : (i + 1) * 75] for i in range(chunks)]
        return [[bos, *row] + [eos] * (CHUNK - 1 - len(row)) for row in rows]


def encode_text(text_encoder, input_ids: torch.Tensor) -> torch.Tensor:
    """(B, chunks, 77) token ids -> (B, chunks * 77, width): every chunk read by itself, hidden states joined."""
    hidden = text_encoder(input_ids.flatten(0, 1))[0]
    return hidden.reshape(len(input_ids), -1, hidden.shape[-1])


def v_loss(unet, latents, hidden, alphas_cumprod, generator, device) -> torch.Tensor:
    """Weighted v-prediction loss; the weight is min-SNR's for v with a floor, so that high noise counts too."""
    t = torch.randint(0, 1000, (len(latents),), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    a = alphas_cumprod[t].view(-1, 1, 1, 1)
    noisy, target = a.sqrt() * latents + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * latents
    with torch.autocast(device, torch.bfloat16):
        model_pred = unet(
            noisy.to(device, memory_format=torch.channels_last), t.to(device), hidden, return_dict=False
        )[0]
    snr = a / (1 - a)
    weight = torch.clamp(snr.clamp(max=5) / (snr + 1), min=0.15).to(device)
    return (weight * (model_pred.float() - target.to(device)) ** 2).mean()


def train_diffusion(work: Path, stage: str, samples: int, device: str, compiled: bool) -> dict:
    """One stage from the end of the one before; returns the EMA weights of {'unet', 'text'}."""
    options = STAGES[stage]
    tokenizer = CLIPTokenizer.from_pretrained(HERE / "base" / "tokenizer")
    models = torch.nn.ModuleDict({"unet": make_unet(), "text": make_text_encoder(len(tokenizer))}).to(device)
    if device == "cpu":
        models["unet"].set_attn_processor(AttnProcessor())  # the fused one's backward is slow on CPU at small sizes
    optimizer = torch.optim.AdamW(models.parameters(), lr=1, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema = EMAModel(models.parameters(), decay=options["ema"], use_ema_warmup=True, power=0.8)
    file, begun = Checkpoint(work / f"{stage}.pt"), 0
    if state := file.load():
        models.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        begun = state["step"]
    elif before := _weights_before(work, stage):
        models.load_state_dict(before)
        ema = EMAModel(models.parameters(), decay=options["ema"], use_ema_warmup=True, power=0.8)
    ema.to(device)
    models["unet"].to(memory_format=torch.channels_last)
    specs = [[sample_spec(int(s)) for s in seeds_of(i, _count(work))] for i in range(len(SIZES))]
    latents = [np.load(latents_file(work, i, options["scale"]), mmap_mode="r") for i in range(len(SIZES))]
    alphas_cumprod, captions = make_scheduler().alphas_cumprod, Captions(tokenizer)
    unet = torch.compile(models["unet"], dynamic=False) if compiled else models["unet"]
    steps = samples // options["batch"]
    losses, bar = [], tqdm(range(begun, steps), initial=begun, total=steps, desc=stage, mininterval=20)
    for step in bar:
        optimizer.param_groups[0]["lr"] = _rate(options, step, steps)
        rng = np.random.default_rng([step, options["scale"], 13])
        size = int(rng.choice(len(SIZES), p=SHARES))
        picked, sides = rng.integers(len(specs[size]), size=options["batch"]), rng.integers(2, size=options["batch"])
        chosen = [mirrored_spec(specs[size][i]) if s else specs[size][i] for i, s in zip(picked, sides, strict=True)]
        batch = torch.from_numpy(np.stack([latents[size][i, s] for i, s in zip(picked, sides, strict=True)])).float()
        with torch.autocast(device, torch.bfloat16):
            hidden = encode_text(models["text"], captions.draw(chosen, rng).to(device)).float()
        loss = v_loss(unet, batch, hidden, alphas_cumprod, torch.Generator().manual_seed(step), device)
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
    return _ema_weights(models, ema)


def _rate(options: dict, step: int, steps: int) -> float:
    done, decay_from = step / steps, options["decay_from"]
    fall = 0.0 if done < decay_from else (done - decay_from) / max(1 - decay_from, 1e-9)
    return options["lr"] * min(1, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * fall)) + 1e-6


def _count(work: Path) -> int:
    return json.loads((work / "count.json").read_text())


def _ema_weights(models, ema: EMAModel) -> dict:
    ema.copy_to(models.parameters())
    return models.state_dict()


def _weights_before(work: Path, stage: str) -> dict | None:
    names = list(STAGES)
    earlier = [work / f"{name}.pt" for name in names[: names.index(stage)]]
    for path in reversed([p for p in earlier if p.exists()]):
        return averaged_weights(path)
    return None


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
def settle_unseen_words(text_encoder: CLIPTextModel, seen: set[int]) -> None:
    """Gives words that no caption used embeddings as long as the learned ones, so that a fine-tune can tell them."""
    table = text_encoder.get_input_embeddings().weight
    known = torch.zeros(len(table), dtype=torch.bool)
    known[sorted(seen)] = True
    noise = torch.randn(table.shape, generator=torch.Generator().manual_seed(0))
    scale = table[known].norm(dim=1).median() / noise.norm(dim=1, keepdim=True)
    table[~known] = (noise * scale)[~known]


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
        "--samples", type=int, nargs=3, default=(70_000, 75_000, 27_600), help="seen by each UNet stage"
    )
    parser.add_argument(
        "--stage", choices=("all", "render", "vae", "latents", *STAGES, "decoder", "save"), default="all"
    )
    parser.add_argument("--compile", action="store_true", help="compile the UNet with torch.compile")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted = lambda stage: args.stage in ("all", stage)  # noqa: E731
    args.work.mkdir(parents=True, exist_ok=True)
    if wanted("render"):
        (args.work / "count.json").write_text(json.dumps(args.pictures))
        render_pictures(args.work, args.pictures)
    torch.manual_seed(0)
    if args.stage == "render":
        return
    vae = train_vae(args.work, args.vae_steps if wanted("vae") else 0, device)
    if args.stage == "vae":
        return
    whiten(vae, args.work, device)
    for name, samples in zip(STAGES, args.samples, strict=True):
        if wanted("latents") or wanted(name):
            encode_pictures(vae, args.work, STAGES[name]["scale"], device)
        if wanted(name):
            train_diffusion(args.work, name, samples, device, args.compile)
    train_decoder(vae, args.work, args.decoder_steps if wanted("decoder") else 0, device)
    if wanted("save"):
        shutil.rmtree(args.work / "base", ignore_errors=True)
        save_base(args.work, args.to, vae)


if __name__ == "__main__":
    main()

"""Trains the starter model `base/` further on one GPU, in minutes: first a VAE that knows photographs, then the UNet.

    python fetch_photos.py --to /scratch/photos
    python pretrain_on_gpu.py --photos /scratch/photos --to /scratch/result --seconds 270
    python pretrain_on_gpu.py --install /scratch/result --to /scratch/base      a pipeline folder from the result

All pictures are rendered meanwhile, on all cores; training begins with the first ones. The lengths of the stages are
shares of --seconds, so that the whole fits a time limit. The result is written every half a minute. It goes on from
the pipeline folder --base, be it on a CPU: `--base /scratch/base --ends 0 0 1` trains the decoder alone.
"""

import argparse
import copy
import json
import math
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive the fork of the workers
STARTED = time.time()  # before the slow imports: --seconds counts them

import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import AutoencoderKL, StableDiffusionPipeline  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch.utils.data import DataLoader, IterableDataset  # noqa: E402
from transformers import CLIPTokenizer  # noqa: E402

from gpu_pictures import DevicePictures, as_images, load_photos, square  # noqa: E402
from pictures import HELD_OUT, SETS, SHARES, SIZES, RenderStream  # noqa: E402
from pretrain_base import STAGES, make_models, make_scheduler, pipeline_weights, save_pipeline  # noqa: E402
from pretrain_vae import decoder_loss, make_vae, recoloured, vae_loss, whiten  # noqa: E402
from render_garments import render, sample_spec  # noqa: E402
from training_batches import (  # noqa: E402
    CaptionSampler,
    LatentTable,
    PictureSampler,
    TrainingBatch,
    VPredictionLoss,
    encode_text,
    make_batch,
    view_margin_loss,
)

HERE = Path(__file__).resolve().parent
CROP = 128  # px of a crop that the VAE is trained on
VAE_WIDTHS = (16, 32, 112)  # of the three levels; 1.8 M parameters
SET_SHARES = {"pictures": 0.62, "trousers": 0.16, "scenes": 0.22}  # of the batches with no focus, or on sentences
FOCUS = {"corner": 0.08, "view": 0.24, "fold": 0.1, "sentence": 0.2}
PROMPTS = (
    "a red t-shirt",
    "A pair of grey trousers laid flat on a white background",
    "a green dress laid flat on a white background",
    "a yellow and navy striped sweater",
    "black shorts on a white background",
    "a pair of brown trousers laid flat on a white background, seen from the back",
    "a pink skirt laid flat on a clean white background",
    "a white shirt laid flat on a white background, with a small black square in the lower left corner",
    "an orange hoodie, front view",
    "a purple t-shirt laid flat on a white background, seen from the back",
    "a pair of blue trousers with one leg folded up at the knee on a white background",
    "a turquoise sweater laid flat on a white background, with a black square in the upper right corner",
    "A garment laid flat. The background is white. The garment is red. It is a skirt.",
    "a beige shirt with brown dots, folded in half",
    "a navy dress on a wooden table",
    "a yellow hoodie lying on a blue blanket",
)


def seconds_since_start() -> float:
    return time.time() - STARTED


class Trainer:
    """AdamW on fp32 weights; a model whose gradients come from a bf16 copy; their EMA; a schedule by time."""

    def __init__(
        self, masters: Iterable, weights: Iterable, learning_rate: float, warm_up: int, ema_decay: float | None = None
    ):
        """`weights` are those that the loss is computed with: the masters themselves, or bf16 copies of them."""
        self.masters, self.weights = list(masters), list(weights)
        self.copies = [(m, w) for m, w in zip(self.masters, self.weights, strict=True) if m is not w]
        for master, _ in self.copies:
            master.grad = torch.zeros_like(master)
        fused = self.masters[0].is_cuda
        self.optimizer = torch.optim.AdamW(self.masters, lr=1.0, betas=(0.9, 0.99), weight_decay=0.01, fused=fused)
        self.learning_rate, self.warm_up, self.ema_decay, self.steps = learning_rate, warm_up, ema_decay, 0
        self.ema = None if ema_decay is None else [p.detach().clone() for p in self.masters]

    def step(self, loss: torch.Tensor, done: float) -> None:
        """One step; `done` is the share of the stage that is over: the learning rate follows a cosine to 0."""
        warm = min(1, (self.steps + 1) / self.warm_up)
        self.optimizer.param_groups[0]["lr"] = (
            self.learning_rate * warm * (0.5 + 0.5 * math.cos(math.pi * done)) + 1e-6
        )
        self.optimizer.zero_grad(set_to_none=not self.copies)
        loss.backward()
        if self.copies:
            torch._foreach_copy_([m.grad for m, _ in self.copies], [w.grad for _, w in self.copies])
            for _, weight in self.copies:
                weight.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            if self.copies:
                torch._foreach_copy_([w for _, w in self.copies], [m for m, _ in self.copies])
            if self.ema is not None:
                decay = min(self.ema_decay, (1 + self.steps) / (10 + self.steps))
                torch._foreach_lerp_(self.ema, self.masters, 1 - decay)
        self.steps += 1


def fast_copy(module: torch.nn.Module, device: str) -> torch.nn.Module:
    """A bf16 copy for a GPU; on the CPU the module itself."""
    if device == "cpu":
        return module
    return copy.deepcopy(module).to(torch.bfloat16, memory_format=torch.channels_last)


# --- the VAE --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def widened_vae(old: AutoencoderKL, widths: tuple[int, ...], noise: float = 0.05) -> AutoencoderKL:
    """A VAE of these widths that computes nearly what `old` does: channels are repeated (Net2Net, arXiv:1511.05641).

    Repeated within their group, so that group norm sees nearly the same statistics. The noise sets repeated channels
    apart, as they would otherwise learn the same.
    """
    if tuple(old.config.block_out_channels) == tuple(widths):
        return old
    new, groups = make_vae(widths), old.config.norm_num_groups
    channels = {}  # number of channels in the old model -> which old channel each new one repeats
    for before, after in zip(old.config.block_out_channels, widths, strict=True):
        members, of_old = torch.arange(after // groups) % (before // groups), before // groups
        channels[before] = (torch.arange(groups)[:, None] * of_old + members).flatten()
    state, generator = {}, torch.Generator().manual_seed(0)
    for name, weight in old.state_dict().items():
        if len(weight) in channels:
            weight = weight[channels[len(weight)]]
        if weight.ndim == 4 and weight.shape[1] in channels:
            chosen = channels[weight.shape[1]]
            copies = torch.bincount(chosen)[chosen].view(1, -1, 1, 1)
            apart = noise * (copies > 1) * torch.randn(len(weight), len(chosen), 1, 1, generator=generator)
            weight = weight[:, chosen] / copies * (1 + apart)
        state[name] = weight
    new.load_state_dict(state)
    return new


def train_vae(vae: AutoencoderKL, data: DevicePictures, batch: int, until: float, save: Callable) -> None:
    """Crops, then whole pictures: group norm sees other statistics in these."""
    fast, begun = fast_copy(vae, data.device), seconds_since_start()
    trainer = Trainer(vae.parameters(), fast.parameters(), 8e-4, warm_up=100)
    rng, last_update, whole = np.random.default_rng(11), 0.0, False
    while (done := (seconds_since_start() - begun) / max(until - begun, 1e-9)) < 1:
        if seconds_since_start() - last_update > 4:
            data.update()
            last_update = seconds_since_start()
            print(f"vae {last_update:.0f} s: {trainer.steps} steps, {sum(data.ready.values())} renders", flush=True)
        if not whole and done > 0.75:
            whole = True
            save()
        images = recoloured(data.whole(batch // 6, rng) if whole else data.crops(batch, CROP, rng), rng)
        posterior = fast.encode(images.to(fast.dtype)).latent_dist
        decoded = fast.decode(posterior.sample()).sample.float()
        trainer.step(vae_loss(decoded, images, posterior), done)
    print(f"vae: {trainer.steps} steps", flush=True)


def train_decoder(vae: AutoencoderKL, data: DevicePictures, batch: int, until: float) -> None:
    """The decoder alone, on whole pictures, with a little noise on their latents."""
    fast, begun, rng = fast_copy(vae, data.device), seconds_since_start(), np.random.default_rng(15)
    learned, copies = ([*v.post_quant_conv.parameters(), *v.decoder.parameters()] for v in (vae, fast))
    trainer = Trainer(learned, copies, 6e-4, warm_up=30)
    while (done := (seconds_since_start() - begun) / max(until - begun, 1e-9)) < 1:
        images = recoloured(data.whole(batch, rng), rng)
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mean
            latents = latents + 0.05 * torch.randn_like(latents)
        decoded = fast.decode(latents.to(fast.dtype)).sample.float()
        trainer.step(decoder_loss(decoded, images), done)
    print(f"decoder: {trainer.steps} steps", flush=True)


@torch.no_grad()
def psnr(vae: AutoencoderKL, pictures: np.ndarray) -> tuple[list[float], torch.Tensor]:
    """PSNR in dB of each of the pictures (N, h, w, 3) uint8, and the reconstructions (N, 3, h, w)."""
    images = as_images(torch.from_numpy(pictures).to(vae.device))
    latents = [vae.encode(part).latent_dist.mean for part in images.split(16)]
    decoded = torch.cat([vae.decode(part).sample.float() for part in latents]).clamp(-1, 1)
    errors = ((decoded - images) / 2).square().mean((1, 2, 3))
    return (-10 * errors.log10()).tolist(), decoded


# --- the UNet and the text encoder ----------------------------------------------------------------------------------


class BatchStream(IterableDataset):
    """An endless stream of training batches without latents; captions are written in the workers of a DataLoader."""

    def __init__(self, tokenizer: CLIPTokenizer, pictures: int, batch: int):
        self.captions, self.batch = CaptionSampler(tokenizer), batch
        self.samplers = [PictureSampler(size, pictures, SET_SHARES) for size in range(len(SIZES))]
        self.keys = [(of, size) for of in self.samplers[0].ready for size in range(len(SIZES))]
        self.ready = torch.zeros(
            len(self.keys), dtype=torch.int64
        ).share_memory_()  # the workers see what is set later

    def set_ready(self, counts: dict[tuple[str, int], int]) -> None:
        """How many pictures of each set and size may be chosen."""
        self.ready.copy_(torch.tensor([counts[key] for key in self.keys]))

    def __iter__(self) -> Iterator[TrainingBatch]:
        torch.set_num_threads(1)
        worker = torch.utils.data.get_worker_info()
        rng = np.random.default_rng([worker.id if worker else 0, 13])
        while True:
            for (of, size), count in zip(self.keys, self.ready.tolist(), strict=True):
                self.samplers[size].ready[of] = count
            size = int(rng.choice(len(SIZES), p=SHARES))
            yield make_batch(self.captions, self.samplers[size], self.batch, FOCUS, rng)


def train_unet(
    models: torch.nn.ModuleDict, data: DevicePictures, vae, tokenizer, args: argparse.Namespace, until: float, save
) -> None:
    """Continues UNet and text encoder on the latents of `vae`. `save(trainer, done)` is called every half a minute."""
    device, begun = data.device, seconds_since_start()
    text_encoder, unet = models["text"], fast_copy(models["unet"], device)
    weights = [*text_encoder.parameters(), *unet.parameters()]
    masters = [*text_encoder.parameters(), *models["unet"].parameters()]
    trainer = Trainer(masters, weights, args.learning_rate, warm_up=100, ema_decay=0.998)
    data.encode(vae)
    batches = BatchStream(tokenizer, args.pictures, args.batch)
    batches.set_ready(data.encoded)
    sizes = range(len(SIZES))
    tables = [LatentTable({of: table for (of, s), table in data.latents.items() if s == size}) for size in sizes]
    loader = iter(DataLoader(batches, batch_size=None, num_workers=args.caption_workers, prefetch_factor=8))
    v_loss = VPredictionLoss(make_scheduler().alphas_cumprod.to(device), STAGES["unet256"].floor)
    generator = torch.Generator(device).manual_seed(0)
    losses, waited = [], 0.0
    last_update = last_save = seconds_since_start()
    while (done := (seconds_since_start() - begun) / max(until - begun, 1e-9)) < 1:
        now = seconds_since_start()
        batch = next(loader)
        waited += seconds_since_start() - now
        if now - last_update > 8:
            data.update()
            data.encode(vae)
            batches.set_ready(data.encoded)
            mean, renders = torch.stack(losses[-50:]).mean().item() if losses else 0.0, sum(data.encoded.values())
            print(
                f"unet {now:.0f} s: {trainer.steps} steps, loss {mean:.4f}, {renders} renders, "
                f"{waited:.0f} s waited for captions",
                flush=True,
            )
            last_update = now
        if now - last_save > 30:
            save(trainer, done)
            last_save = now
        latents = tables[batch.picks.size][batch.picks]
        with torch.autocast(device, torch.bfloat16):
            hidden = encode_text(text_encoder, batch.input_ids.to(device, non_blocking=True)).float()
        loss = v_loss(unet, batch, latents, hidden, generator) + 0.1 * view_margin_loss(hidden, batch.view_signs)
        trainer.step(loss, done)
        losses.append(loss.detach())
    save(trainer, 1.0)


# --- what comes out -------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """The folder of results: weights, figures and sheets, each replaced as a whole."""

    folder: Path
    figures: dict = field(default_factory=dict)

    def save_weights(self, name: str, module: torch.nn.Module, dtype: torch.dtype = torch.float16) -> None:
        state = {k: v.detach().to("cpu", dtype).contiguous() for k, v in module.state_dict().items()}
        self._replace(f"{name}.safetensors", lambda path: save_file(state, path))

    def save_figures(self, **figures) -> None:
        self.figures.update(figures, seconds=round(seconds_since_start(), 1))
        self._replace("figures.json", lambda path: path.write_text(json.dumps(self.figures, indent=1)))
        print(json.dumps(figures), flush=True)

    def save_sheet(self, name: str, rows: list[np.ndarray]) -> None:
        """Each row is (N, h, w, 3) uint8, all of one shape."""
        sheet = np.concatenate([np.concatenate(list(row), 1) for row in rows])
        self._replace(name, lambda path: Image.fromarray(sheet).save(path, "JPEG", quality=90))

    def _replace(self, name: str, write) -> None:
        temporary = self.folder / f"{name}.new"
        write(temporary)
        temporary.rename(self.folder / name)


def as_pixels(images: torch.Tensor) -> np.ndarray:
    """(N, 3, h, w) in -1..1 -> (N, h, w, 3) uint8."""
    return ((images + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def measure_vae(vae: AutoencoderKL, judged: dict[str, np.ndarray], result: Result, name: str) -> None:
    figures, rows = {}, []
    for of, pictures in judged.items():
        values, decoded = psnr(vae, pictures)
        figures[f"{name}_psnr_db_{of}"] = round(float(np.mean(values)), 2)
        rows += [pictures[:8], as_pixels(decoded[:8])]
    result.save_figures(**figures)
    result.save_sheet("vae.jpg", [np.resize(row, (8, *row.shape[1:])) for row in rows])


@torch.no_grad()
def generate_sheet(models: torch.nn.ModuleDict, vae, tokenizer, steps: int) -> list[np.ndarray]:
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=models["text"], tokenizer=tokenizer, unet=models["unet"], scheduler=make_scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(
        list(PROMPTS), num_inference_steps=steps, guidance_scale=4.0, generator=generator, height=256, width=256,
        output_type="np",
    ).images  # fmt: skip
    pixels = (images * 255).round().astype(np.uint8)
    return [pixels[i : i + 8] for i in range(0, len(pixels), 8)]


def pretrain(args: argparse.Namespace) -> None:
    """All stages, one after the other."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    args.to.mkdir(parents=True, exist_ok=True)
    result = Result(args.to)
    stream = RenderStream(args.work or Path(tempfile.mkdtemp()), args.pictures, SETS, args.render_workers)
    photos = load_photos(args.photos)
    judged = {"renders": np.stack([np.asarray(render(sample_spec(HELD_OUT + i))) for i in range(12)])}
    if args.judged:
        judged["photos"] = np.stack([square(path) for path in sorted(args.judged.rglob("*.jpg"))])
    data = DevicePictures(stream, torch.from_numpy(photos).to(device), device)
    while not all(data.ready.values()) or sum(data.ready.values()) < min(300, args.pictures // 4):
        time.sleep(0.3)
        data.update()
    result.save_figures(first_renders_seconds=round(seconds_since_start(), 1))

    # The VAE.
    old = AutoencoderKL.from_pretrained(args.base, subfolder="vae", torch_dtype=torch.float32).to(device)
    measure_vae(old, judged, result, "before")
    vae = widened_vae(old.cpu(), VAE_WIDTHS).to(device)
    vae_end, unet_end, decoder_end = (share * args.seconds for share in args.ends)

    def save_vae(name: str) -> None:
        result.save_weights("vae", vae)
        measure_vae(vae, judged, result, name)

    if vae_end:
        train_vae(vae, data, args.vae_batch, vae_end, lambda: save_vae("after_crops"))
        whiten(vae, data.white(160), device)
        save_vae("after_whole")
    vae.eval().requires_grad_(False)
    data.update()

    # The UNet and the text encoder.
    tokenizer = CLIPTokenizer.from_pretrained(args.base / "tokenizer")
    models = make_models(len(tokenizer)).to(device)
    models.load_state_dict(pipeline_weights(args.base))
    averaged, drawn = copy.deepcopy(models).eval().requires_grad_(False), []

    def save_samples() -> None:
        try:
            result.save_sheet("samples.jpg", generate_sheet(averaged, vae, tokenizer, args.sheet_steps))
        except Exception:  # no reason to lose a run for
            traceback.print_exc()

    def save_unet(trainer: Trainer, done: float) -> None:
        masters = [*averaged["text"].parameters(), *averaged["unet"].parameters()]
        torch._foreach_copy_(masters, trainer.ema)
        for name in averaged:
            result.save_weights(name, averaged[name])
        result.save_figures(
            unet_steps=trainer.steps, unet_samples=trainer.steps * args.batch, unet_done=round(done, 3)
        )
        if done > 0.4 and (done == 1 or not drawn):  # a sheet takes some seconds
            drawn.append(done)
            save_samples()

    if unet_end:
        train_unet(models, data, vae, tokenizer, args, unet_end, save_unet)
    stream.stop()

    # The decoder alone, once more.
    vae.requires_grad_(True)
    train_decoder(vae, data, args.vae_batch // 6, decoder_end)
    save_vae("after_decoder")
    save_samples()


def install(folder: Path, to: Path) -> None:
    """Writes a pipeline folder from the weights in `folder`; other files in `to`, such as its README, stay."""
    vae = make_vae(VAE_WIDTHS)
    vae.load_state_dict({k: v.float() for k, v in load_file(folder / "vae.safetensors").items()})
    parts = [(name, load_file(folder / f"{name}.safetensors")) for name in ("unet", "text")]
    save_pipeline({f"{name}.{k}": v.float() for name, part in parts for k, v in part.items()}, vae, to)
    print(f"{folder} -> {to}: {sum(f.stat().st_size for f in to.rglob('*') if f.is_file()) / 1e6:.1f} MB")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, help="folder for the result (with --install: the pipeline)")
    parser.add_argument("--install", type=Path, help="folder of a result: only write a pipeline folder from it")
    parser.add_argument("--base", type=Path, default=HERE / "base", help="pipeline folder to continue")
    parser.add_argument("--photos", type=Path, help="folder that fetch_photos.py wrote")
    parser.add_argument("--judged", type=Path, help="folder of photographs that only measure the VAE (default: none)")
    parser.add_argument("--work", type=Path, help="folder for renders, 200 kB each (default: a temporary folder)")
    parser.add_argument("--seconds", type=float, default=270, help="time for everything, from the start of the script")
    parser.add_argument(
        "--ends", type=float, nargs=3, default=(0.34, 0.89, 0.96), metavar=("VAE", "UNET", "DECODER"),
        help="when the stages end, as shares of --seconds; 0 leaves out the VAE or the UNet",
    )  # fmt: skip
    parser.add_argument("--pictures", type=int, default=10_000, help="size of the largest set of renders")
    parser.add_argument("--batch", type=int, default=96, help="of the UNet, in pictures")
    parser.add_argument("--vae_batch", type=int, default=96, help="of the VAE, in crops of 128 px")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of the UNet and the text encoder, at most")
    parser.add_argument("--render_workers", type=int, default=max(os.cpu_count() - 2, 1), help="processes")
    parser.add_argument("--caption_workers", type=int, default=min(8, os.cpu_count()), help="processes")
    parser.add_argument("--sheet_steps", type=int, default=25, help="sampling steps of the sheet of samples")
    args = parser.parse_args()
    if args.pictures < 24:
        parser.error("--pictures: at least 24, so that there are some of each kind")
    if not args.install and not args.photos:
        parser.error("--photos: name the folder that fetch_photos.py wrote")
    return args


def main() -> None:
    args = parse_args()
    if args.install:
        install(args.install, args.to)
    else:
        pretrain(args)


if __name__ == "__main__":
    main()

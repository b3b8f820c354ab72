"""Trains the UNet and the text encoder of the starter model `base/` further on one GPU, in minutes.

    python pretrain_on_gpu.py --to /scratch/result --seconds 270
    python pretrain_on_gpu.py --install /scratch/result --to /scratch/base      a pipeline folder from the result

All pictures are rendered meanwhile, on all cores; training begins with the first ones, on the latents of the base's
VAE. The whole takes --seconds. The result is written every half a minute, so a run that is cut off leaves one too.
It goes on from the pipeline folder --base, whose VAE stays as it is.
"""

import argparse
import copy
import json
import os
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive the fork of the workers
STARTED = time.time()  # before the slow imports: --seconds counts them

import numpy as np  # noqa: E402
import torch  # noqa: E402
from diffusers import StableDiffusionPipeline  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch.utils.data import DataLoader, IterableDataset  # noqa: E402
from transformers import CLIPTokenizer  # noqa: E402

from gpu_pictures import DevicePictures  # noqa: E402
from models.loading import load_vae  # noqa: E402
from pictures import SETS, SHARES, SIZES, RenderStream  # noqa: E402
from pretrain_base import STAGES, make_models, make_scheduler, pipeline_weights, save_pipeline  # noqa: E402
from trainer import Trainer, fast_copy  # noqa: E402
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
UNET_END = 0.95  # share of --seconds at which the training ends; the last pictures take some seconds
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


# --- training -------------------------------------------------------------------------------------------------------


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
    """Continues UNet and text encoder on the latents of `vae`, one step at least, until `until` seconds of the script.

    `save(trainer, done)` is called every half a minute and at the end.
    """
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
    losses, waited, done = [], 0.0, 0.0
    last_update = last_save = seconds_since_start()
    while done < 1:
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
        done = min((seconds_since_start() - begun) / max(until - begun, 1e-9), 1)
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


def pretrain(args: argparse.Namespace, work: Path) -> None:
    """Renders into `work` and trains meanwhile."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    args.to.mkdir(parents=True, exist_ok=True)
    stream = RenderStream(work, args.pictures, SETS, args.render_workers)
    try:
        train_on(DevicePictures(stream, device), args, Result(args.to))
    finally:
        stream.stop()


def train_on(data: DevicePictures, args: argparse.Namespace, result: Result) -> None:
    """Trains UNet and text encoder of `args.base` on what is rendered, and leaves their averages in `result`."""
    while not all(data.ready.values()) or sum(data.ready.values()) < min(300, args.pictures // 4):
        time.sleep(0.3)
        data.update()
    result.save_figures(first_renders_seconds=round(seconds_since_start(), 1))
    tokenizer = CLIPTokenizer.from_pretrained(args.base / "tokenizer")
    vae = load_vae(args.base).requires_grad_(False).to(data.device)
    models = make_models(len(tokenizer)).to(data.device)
    models.load_state_dict(pipeline_weights(args.base))
    averaged, drawn = copy.deepcopy(models).eval().requires_grad_(False), []

    def save(trainer: Trainer, done: float) -> None:
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

    def save_samples() -> None:
        try:
            result.save_sheet("samples.jpg", generate_sheet(averaged, vae, tokenizer, args.sheet_steps))
        except Exception:  # no reason to lose a run for
            traceback.print_exc()

    train_unet(models, data, vae, tokenizer, args, UNET_END * args.seconds, save)


def install(folder: Path, base: Path, to: Path) -> None:
    """Writes a pipeline folder from the weights in `folder` and the VAE of `base`; other files in `to` stay."""
    parts = [(name, load_file(folder / f"{name}.safetensors")) for name in ("unet", "text")]
    save_pipeline({f"{name}.{k}": v.float() for name, part in parts for k, v in part.items()}, load_vae(base), to)
    print(f"{folder} -> {to}: {sum(f.stat().st_size for f in to.rglob('*') if f.is_file()) / 1e6:.1f} MB")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, help="folder for the result (with --install: the pipeline)")
    parser.add_argument("--install", type=Path, help="folder of a result: only write a pipeline folder from it")
    parser.add_argument("--base", type=Path, default=HERE / "base", help="pipeline folder to continue")
    parser.add_argument("--work", type=Path, help="folder for renders, 200 kB each (default: a temporary folder)")
    parser.add_argument("--seconds", type=float, default=270, help="time for everything, from the start of the script")
    parser.add_argument("--pictures", type=int, default=10_000, help="size of the largest set of renders")
    parser.add_argument("--batch", type=int, default=96, help="pictures a step")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="the highest")
    parser.add_argument("--render_workers", type=int, default=max(os.cpu_count() - 2, 1), help="processes")
    parser.add_argument("--caption_workers", type=int, default=min(8, os.cpu_count()), help="processes")
    parser.add_argument("--sheet_steps", type=int, default=25, help="sampling steps of the sheet of samples")
    args = parser.parse_args()
    if args.pictures < 24:
        parser.error("--pictures: at least 24, so that there are some of each kind")
    return args


def main() -> None:
    args = parse_args()
    if args.install:
        install(args.install, args.base, args.to)
        return
    with tempfile.TemporaryDirectory() as temporary:
        pretrain(args, args.work or Path(temporary))


if __name__ == "__main__":
    main()

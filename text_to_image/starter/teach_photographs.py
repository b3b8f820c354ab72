"""Trains the VAE of the finished base further on photographs, while its latents of renders stay what they were.

    python fetch_photos.py --to /scratch/photos
    python teach_photographs.py --work /scratch/vae --photos /scratch/photos --seconds 3600 --to /scratch/base

The VAE of the base is made wider, if it is narrower. A term of the loss holds its latents of renders to those of the
base, so UNet and text encoder fit it as they are and are copied byte for byte. The pictures are rendered first;
--seconds counts the training alone. Stopped and started again, it goes on where it was.
"""

import argparse
import copy
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from gpu_pictures import as_images, load_photos, photo_files, psnr, random_crops, square
from models.loading import load_vae, quiet_libraries
from pictures import HELD_OUT, SETS, SHARES, SIZES, load_pictures, render_pictures
from pretrain_vae import StageCheckpoint, make_vae, recoloured, reconstruction_loss
from render_garments import render, sample_spec
from runtime.errors import UserError, exit_with
from runtime.paths import STARTER
from trainer import Trainer, fast_copy

JUDGED = 12  # renders that only measure
WIDTHS = (16, 32, 112)  # of the three levels; 1.8 M parameters
CROP = 96  # px of a crop
WHOLE_FROM = 0.8  # share of the time from which pictures are whole: group norm sees other statistics in these
WHOLE_AREA = 7  # the area of a square picture in crops, so that a step takes as long as before
LEARNING_RATE, WARM_UP = 4e-4, 100
NOISE = 0.05  # deviation of what is added to latents, which have a deviation of 1
LOSSES = "reconstruction", "difference"  # of a step; the second is that of the latents
ANCHOR = 2.0  # weight of the difference from the base's latents


# --- what it begins with --------------------------------------------------------------------------------------------


def begin_vae(base: AutoencoderKL, images: torch.Tensor, weights: Path | None = None) -> AutoencoderKL:
    """The VAE that training begins with: `weights`, or that of the base made wider, with the latents of the base.

    `images` (N, 3, h, w) are renders to fit the latents on. UserError where `weights` are not of such a VAE.
    """
    vae = (load_weights(weights) if weights else widened_vae(base, WIDTHS)).to(base.device)
    align_latents(vae, base, images)
    return vae


def load_weights(path: Path) -> AutoencoderKL:
    """A VAE of WIDTHS with the weights of a safetensors file. UserError where they are of another one."""
    vae = make_vae(WIDTHS)
    try:
        vae.load_state_dict({name: weight.float() for name, weight in load_file(path).items()})
    except Exception as error:  # safetensors' and torch's own
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"--vae {path}: not the weights of a VAE of widths {WIDTHS}: {reason}") from None
    return vae


@torch.no_grad()
def align_latents(vae: AutoencoderKL, base: AutoencoderKL, images: torch.Tensor) -> None:
    """Maps the latents of `vae` to those of `base` affinely, by least squares over `images`; in place.

    The map goes into quant_conv, its inverse into post_quant_conv, so reconstructions stay the same. The posterior's
    noise becomes the base's mean of each channel: no loss sees it later.
    """
    parts = images.split(8)
    wanted = [base.encode(part).latent_dist for part in parts]
    a = torch.cat([_as_rows(vae.encode(part).latent_dist.mean) for part in parts])
    b = torch.cat([_as_rows(posterior.mean) for posterior in wanted])
    solution = torch.linalg.lstsq(torch.cat([a, torch.ones_like(a[:, :1])], 1), b).solution
    linear, shift = solution[:4].T.float(), solution[4].float()
    quant, post = vae.quant_conv, vae.post_quant_conv
    quant.weight[:4, :, 0, 0], quant.bias[:4] = linear @ quant.weight[:4, :, 0, 0], linear @ quant.bias[:4] + shift
    quant.weight[4:], quant.bias[4:] = 0.0, torch.cat([p.logvar for p in wanted]).mean((0, 2, 3))
    inverse = post.weight[:, :, 0, 0] @ torch.linalg.inv(linear)
    post.bias -= inverse @ shift
    post.weight[:, :, 0, 0] = inverse


def _as_rows(latents: torch.Tensor) -> torch.Tensor:
    """(B, 4, h, w) -> (B * h * w, 4), double."""
    return latents.permute(0, 2, 3, 1).flatten(0, 2).double()


@torch.no_grad()
def widened_vae(old: AutoencoderKL, widths: tuple[int, ...], noise: float = 0.05) -> AutoencoderKL:
    """A VAE of these widths that computes nearly what `old` does: channels are repeated (Net2Net, arXiv:1511.05641).

    Repeated within their group, so that group norm sees nearly the same statistics. The noise sets repeated channels
    apart, as they would otherwise learn the same.
    """
    new, groups = make_vae(widths), old.config.norm_num_groups
    channels = {}  # number of channels in the old model -> which old channel each new one repeats
    for before, after in zip(old.config.block_out_channels, widths, strict=True):
        members, of_old = torch.arange(after // groups) % (before // groups), before // groups
        channels[before] = (torch.arange(groups)[:, None] * of_old + members).flatten()
    state, generator = {}, torch.Generator().manual_seed(0)
    for name, weight in old.state_dict().items():
        weight = weight.cpu()
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


# --- pictures -------------------------------------------------------------------------------------------------------


@dataclass
class Pictures:
    """Photographs and renders, uint8, on the device."""

    photos: torch.Tensor  # (N, 256, 256, 3)
    renders: dict[tuple[str, int], torch.Tensor]  # (set, size) -> (N, h, w, 3)

    def random(self, batch: int, whole: bool, rng: np.random.Generator) -> tuple[torch.Tensor, int]:
        """Pictures (B, 3, h, w) in -1..1, and how many of them are renders: the first, half of the batch.

        Crops; or fewer whole ones, and square, as photographs are. The renders of a batch are of one set and size.
        """
        size = 0 if whole else int(rng.choice(len(SIZES), p=SHARES))
        sets = [of for of, s in self.renders if s == size]
        batch, side = (max(batch // WHOLE_AREA, 2), None) if whole else (batch, CROP)
        renders = random_crops(self.renders[sets[rng.integers(len(sets))], size], batch // 2, side, rng)
        photos = random_crops(self.photos, batch - batch // 2, side, rng)
        return recoloured(torch.cat([renders, photos]), rng), len(renders)

    def squares(self, count: int) -> torch.Tensor:
        """The first whole square renders of each set, (N, 3, 256, 256)."""
        return as_images(torch.cat([pictures[:count] for (_, size), pictures in self.renders.items() if size == 0]))


def load_renders(work: Path, count: int, device: str) -> dict[tuple[str, int], torch.Tensor]:
    """Renders all sets into `work`, unless that is done; (N, h, w, 3) uint8 for each set and size."""
    folder = work / f"renders-{count}"
    render_pictures(folder, count)
    return {
        (of, size): torch.from_numpy(load_pictures(folder, size, of)).to(device)
        for of in SETS
        for size in range(len(SIZES))
    }


# --- training -------------------------------------------------------------------------------------------------------


class Student:
    """The VAE in training beside that of the base, which says what the latents of renders are."""

    def __init__(self, vae: AutoencoderKL, base: AutoencoderKL, anchor: float = ANCHOR):
        self.vae = vae.requires_grad_(True).to(memory_format=torch.channels_last)
        self.device, self.anchor, self.seconds = vae.device.type, anchor, 0.0
        self.teacher, self.fast = fast_copy(base, self.device), fast_copy(vae, self.device)
        self.trainer = Trainer(self.vae.parameters(), self.fast.parameters(), LEARNING_RATE, WARM_UP)

    def learn(self, images: torch.Tensor, renders: int, done: float) -> torch.Tensor:
        """One step on images (B, 3, h, w) of which the first `renders` are renders; LOSSES (2,) of it."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cpu"):
            given = images.to(self.fast.dtype, memory_format=torch.channels_last)
            with torch.no_grad():
                wanted = self.teacher.encode(given[:renders]).latent_dist.mean.float()
            latents = self.fast.encode(given).latent_dist.mean
            decoded = self.fast.decode(latents + NOISE * torch.randn_like(latents)).sample.float()
        difference = (latents[:renders].float() - wanted).square().mean()
        reconstruction = reconstruction_loss(decoded, images)
        self.trainer.step(reconstruction + self.anchor * difference, done)
        return torch.stack([reconstruction, difference]).detach()  # `.item()` would wait for the GPU

    def state(self) -> dict:
        return {"vae": self.vae.state_dict(), "trainer": self.trainer.state(), "seconds": self.seconds}

    def load(self, state: dict) -> None:
        self.vae.load_state_dict(state["vae"])
        self.fast.load_state_dict(state["vae"])
        self.trainer.load(state["trainer"])
        self.seconds = state["seconds"]


class Judge:
    """Pictures that are never trained on, and the base's latents of the renders among them."""

    def __init__(self, base: AutoencoderKL, photos: Path | None):
        self.pictures = {"renders": np.stack([np.asarray(render(sample_spec(HELD_OUT + i))) for i in range(JUDGED)])}
        if photos:
            self.pictures["photos"] = np.stack([square(path) for path in photo_files(photos)])
        self.wanted = psnr(base, self.pictures["renders"])[1]

    def measure(self, vae: AutoencoderKL) -> dict[str, float]:
        """dB and deviation of the latents of each kind, and how far those of renders are from the base's."""
        figures = {}
        for kind, pictures in self.pictures.items():
            values, latents = psnr(vae, pictures)
            figures |= {f"{kind}_psnr_db": float(np.mean(values)), f"{kind}_deviation": latents.std().item()}
            if kind == "renders":
                figures["latent_difference"] = (latents - self.wanted).square().mean().item()
        return figures


def train(student: Student, pictures: Pictures, judge: Judge, args: argparse.Namespace) -> None:
    """Trains for `args.seconds`, those of earlier starts included; leaves `photographs.pt` in `args.work`."""
    checkpoint, losses = StageCheckpoint(args.work / "photographs.pt"), []
    if state := checkpoint.load():
        student.load(state)
    report(student, judge, losses)
    last = reported = time.time()
    while student.seconds < args.seconds:
        rng, done = np.random.default_rng([student.trainer.steps, 18]), student.seconds / args.seconds
        losses.append(student.learn(*pictures.random(args.batch, done >= WHOLE_FROM, rng), done))
        if time.time() - reported > 60:
            report(student, judge, losses)
            losses, reported = [], time.time()
        student.seconds, last = student.seconds + time.time() - last, time.time()
        if checkpoint.due():
            checkpoint.save(student.state())
    checkpoint.save(student.state())
    report(student, judge, losses)


def report(student: Student, judge: Judge, losses: list[torch.Tensor]) -> None:
    """Prints a JSON line: the mean losses since the last one, and what the judge says."""
    figures = {"seconds": round(student.seconds), "step": student.trainer.steps}
    if losses:
        figures |= dict(zip(LOSSES, torch.stack(losses).mean(0).tolist(), strict=True))
    figures |= judge.measure(student.vae)
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}), flush=True)


# --- what comes out -------------------------------------------------------------------------------------------------


def save_with_vae(base: Path, vae: AutoencoderKL, to: Path) -> None:
    """Writes the pipeline folder of the base with another VAE, fp16; all other files are the base's."""
    if to.resolve() != base.resolve():
        shutil.copytree(base, to, dirs_exist_ok=True)
    copy.deepcopy(vae).half().to(memory_format=torch.contiguous_format).save_pretrained(to / "vae")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint and the renders")
    parser.add_argument("--base", type=Path, default=STARTER, help="finished pipeline folder")
    parser.add_argument("--to", type=Path, required=True, help="pipeline folder to write")
    parser.add_argument("--photos", type=Path, required=True, help="folder that fetch_photos.py wrote")
    parser.add_argument("--judged", type=Path, help="folder of photographs that only measure (default: none)")
    parser.add_argument("--vae", type=Path, help="safetensors file to begin with (default: the base's VAE, widened)")
    parser.add_argument("--seconds", type=float, default=3600, help="length of the training")
    parser.add_argument("--pictures", type=int, default=3000, help="size of the largest set of renders; 0.4 MB each")
    parser.add_argument("--batch", type=int, default=32, help=f"crops of {CROP} px in a step; a GPU takes 96 or more")
    args = parser.parse_args()
    if args.pictures < 24:
        parser.error("--pictures: at least 24, so that there are some of each kind")
    if args.batch < 2:
        parser.error("--batch: at least 2, a render and a photograph")
    return args


def main() -> None:
    args, device = parse_args(), "cuda" if torch.cuda.is_available() else "cpu"
    quiet_libraries()
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    base = load_vae(args.base).requires_grad_(False).to(device)
    photos = torch.from_numpy(load_photos(args.photos)).to(device)
    judge = Judge(base, args.judged)
    if args.vae:
        load_weights(args.vae)  # refuses a wrong file before the pictures are rendered
    args.work.mkdir(parents=True, exist_ok=True)
    pictures = Pictures(photos, load_renders(args.work, args.pictures, device))
    student = Student(begin_vae(base, pictures.squares(8), args.vae), base)
    train(student, pictures, judge, args)
    save_with_vae(args.base, student.vae, args.to)


if __name__ == "__main__":
    exit_with(main)

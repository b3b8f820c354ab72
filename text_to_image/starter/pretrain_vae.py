"""The starter's VAE: trained on crops, whitened, its decoder finished on whole pictures, and the latents it makes."""

import math
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tqdm.auto import tqdm

from pictures import SHARES, SIZES, pictures_of, twins_of


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


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, work: Path, scale: int, device: str, sets: Iterable[str]) -> None:
    """Writes the latents of the pictures of `sets` and of their mirror images at 1/`scale` of their size as fp16,
    (N, 2, 4, h, w); those of the twins' fronts and backs follow one another."""
    for size in range(len(SIZES)):
        for of in sets:
            _encode(vae, pictures_of(work, size, of), latents_file(work, size, scale, of), scale, device)
        twins = twins_of(work, size)
        _encode(vae, twins.reshape(-1, *twins.shape[2:]), latents_file(work, size, scale, "twins"), scale, device)


def _encode(vae: AutoencoderKL, pictures: np.ndarray, path: Path, scale: int, device: str) -> None:
    if path.exists():
        return
    out = []
    for start in tqdm(range(0, len(pictures), 16), desc=path.stem, mininterval=10):
        images = torch.from_numpy(np.ascontiguousarray(pictures[start : start + 16])).permute(0, 3, 1, 2).float()
        images = F.avg_pool2d(images, scale) if scale > 1 else images
        images = (images / 127.5 - 1).to(device)
        with torch.autocast(device, torch.bfloat16):
            both = [vae.encode(i).latent_dist.mean for i in (images, images.flip(-1))]
        out.append(torch.stack(both, 1).half().cpu().numpy())
    np.save(path.with_suffix(".new.npy"), np.concatenate(out))
    path.with_suffix(".new.npy").rename(path)


def latents_file(work: Path, size: int, scale: int, of: str) -> Path:
    return work / f"latents-{of}-{SIZES[size][0]}x{SIZES[size][1]}-{scale}.npy"

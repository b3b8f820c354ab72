"""The starter's VAE: trained on crops, whitened, decoder fine-tuned on whole pictures; and the latents it encodes."""

import math
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tqdm.auto import tqdm

from pictures import PAIRS, SHARES, SIZES, load_pairs, load_pictures


class StageCheckpoint:
    """The state of one stage on disk, replaced atomically, due every `minutes`."""

    def __init__(self, path: Path, minutes: float = 1.5):
        self.path, self.minutes, self.last = path, minutes, time.time()

    def load(self) -> dict | None:
        return torch.load(self.path, weights_only=True, map_location="cpu") if self.path.exists() else None

    def save(self, state: dict) -> None:
        temporary = self.path.with_suffix(".new")
        torch.save(state, temporary)
        temporary.rename(self.path)
        self.last = time.time()

    def due(self) -> bool:
        return time.time() - self.last > 60 * self.minutes


def make_vae(widths: tuple[int, int, int] = (16, 32, 64)) -> AutoencoderKL:
    """0.65 M parameters, more with other `widths`; factor 4.

    At 256 px the latents are 64 x 64, enough for SD's UNet blocks to see seams.
    """
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=widths,
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


def random_crops(work: Path, size: int, batch: int, rng: np.random.Generator) -> torch.Tensor:
    """Crops of random pictures, (B, 3, size, size) in -1..1; whole pictures if `size` is 0."""
    pictures = load_pictures(work, int(rng.choice(len(SIZES), p=SHARES)))
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
    """Permutes and weakens the colour channels of half of the pictures, so that the VAE learns all colours."""
    mixtures = np.tile(np.eye(3), (len(images), 1, 1))
    for i in np.flatnonzero(rng.random(len(images)) < 0.5):
        gain = rng.uniform(0.6, 1.0, (3, 1))
        mixtures[i] = np.eye(3)[rng.permutation(3)] * gain
    mixtures = torch.from_numpy(mixtures).to(images.device, images.dtype, non_blocking=True)
    return torch.einsum("bij,bjhw->bihw", mixtures, images + 1) - 1


def channel_correlation(latents: torch.Tensor) -> torch.Tensor:
    """The mean squared correlation between the channels of (B, C, h, w), 0..1.

    Correlated channels leave some directions of the latent space nearly empty, and there the noise hides everything.
    """
    z = latents.float().transpose(0, 1).flatten(1)
    r = torch.corrcoef(z)
    return (r**2).sum().sub(len(r)) / (len(r) * (len(r) - 1))


def image_gradients(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The differences between neighbouring pixels, down and across."""
    return images[..., 1:, :] - images[..., :-1, :], images[..., :, 1:] - images[..., :, :-1]


def gradient_loss(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """L1 between the gradients of two batches of pictures."""
    return sum(F.l1_loss(a, b) for a, b in zip(image_gradients(decoded), image_gradients(images), strict=True))


def reconstruction_loss(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """L1 and L2 on pixels, and L1 on their gradients, so that seams stay sharp."""
    return F.l1_loss(decoded, images) + 8 * F.mse_loss(decoded, images) + gradient_loss(decoded, images)


def vae_loss(decoded: torch.Tensor, images: torch.Tensor, posterior) -> torch.Tensor:
    """Reconstruction, uncorrelated latent channels and a trace of Kullback-Leibler divergence."""
    regularisation = 0.05 * channel_correlation(posterior.mean) + 1e-8 * posterior.kl().mean()
    return reconstruction_loss(decoded, images) + regularisation


def decoder_loss(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Reconstruction, and L2 on areas of 8 x 8 px, which corrects the hues."""
    hues = F.mse_loss(F.avg_pool2d(decoded, 8), F.avg_pool2d(images, 8))
    return reconstruction_loss(decoded, images) + 20 * hues


def _resume(checkpoint: StageCheckpoint, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Loads the checkpoint if there is one; returns the step to continue with."""
    if not (state := checkpoint.load()):
        return 0
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def _optimise(optimizer: torch.optim.Optimizer, loss: torch.Tensor, model: torch.nn.Module) -> None:
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _psnr(decoded: torch.Tensor, images: torch.Tensor) -> float:
    return -10 * math.log10(F.mse_loss(decoded.detach().clamp(-1, 1), images).item() / 4)


def train_vae(work: Path, steps: int, device: str) -> AutoencoderKL:
    """Minimises L1 on pixels and on their gradients (so that seams stay sharp); on crops, then on whole pictures."""
    vae, checkpoint = make_vae().to(device), StageCheckpoint(work / "vae.pt")
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1, betas=(0.9, 0.99), weight_decay=0.01)
    first_step = _resume(checkpoint, vae, optimizer)
    whole_from = int(0.85 * steps)  # whole pictures are mostly white, so group norm has other statistics
    bar = tqdm(range(first_step, steps), initial=first_step, total=steps, desc="vae", mininterval=10)
    for step in bar:
        rate = 6e-4 * min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = rate + 1e-5
        rng = np.random.default_rng([step, 11])
        images = random_crops(work, 0 if step >= whole_from else 80, 4 if step >= whole_from else 16, rng).to(device)
        images = recoloured(images, rng)
        with torch.autocast(device, torch.bfloat16, enabled=step < whole_from):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        decoded = decoded.float()
        loss = vae_loss(decoded, images, posterior)
        _optimise(optimizer, loss, vae)
        if step % 50 == 0:
            bar.set_postfix(psnr=f"{_psnr(decoded, images):.1f}", refresh=False)
        if checkpoint.due() or step + 1 == steps:
            checkpoint.save({"model": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})
    return vae.eval()


@torch.no_grad()
def whiten(vae: AutoencoderKL, images: torch.Tensor, device: str) -> None:
    """Whitens the latents of `images` (ZCA): channels of mean 0, deviation 1 and no correlation; in place.

    The transform goes into quant_conv, its inverse into post_quant_conv, so reconstructions stay the same.
    """
    z = torch.cat([vae.encode(i.to(device)).latent_dist.mean for i in images.split(8)])
    z = z.permute(1, 0, 2, 3).flatten(1).double()
    mean, (values, vectors) = z.mean(1), torch.linalg.eigh(torch.cov(z))
    whitening = (vectors @ torch.diag(values**-0.5) @ vectors.T).float()
    inverse = (vectors @ torch.diag(values**0.5) @ vectors.T).float()
    mean = mean.float()
    quant, post = vae.quant_conv, vae.post_quant_conv
    weight, bias = quant.weight[:, :, 0, 0].clone(), quant.bias.clone()
    quant.weight[:4, :, 0, 0], quant.bias[:4] = whitening @ weight[:4], whitening @ (bias[:4] - mean)
    # The posterior's noise is scaled with its channel. e^-4 of its variance is kept: fine-tuning needs no more.
    quant.bias[4:] += torch.log((whitening**2).sum(1)) - 4
    old = post.weight[:, :, 0, 0].clone()
    post.bias += old @ mean
    post.weight[:, :, 0, 0] = old @ inverse


def train_decoder(vae: AutoencoderKL, work: Path, steps: int, device: str) -> None:
    """Fine-tunes the decoder alone on whole pictures; the loss on areas of 8 x 8 px corrects the hues."""
    checkpoint = StageCheckpoint(work / "decoder.pt")
    learned = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder])
    optimizer = torch.optim.AdamW(learned.parameters(), lr=1, betas=(0.9, 0.99), weight_decay=0.01)
    first_step = _resume(checkpoint, learned, optimizer)
    learned.train()
    bar = tqdm(range(first_step, steps), initial=first_step, total=steps, desc="decoder", mininterval=10)
    for step in bar:
        optimizer.param_groups[0]["lr"] = 8e-4 * min(1, (step + 1) / 50) * (1 - step / steps) + 1e-5
        rng = np.random.default_rng([step, 15])
        images = recoloured(random_crops(work, 0, 4, rng), rng).to(device)
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mean
            latents = latents + 0.05 * torch.randn(latents.shape, device=device)
        with torch.autocast(device, torch.bfloat16):
            decoded = vae.decode(latents).sample.float()
        _optimise(optimizer, decoder_loss(decoded, images), learned)
        if step % 50 == 0:
            bar.set_postfix(psnr=f"{_psnr(decoded, images):.1f}", refresh=False)
        if checkpoint.due() or step + 1 == steps:
            checkpoint.save({"model": learned.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1})
    learned.eval()


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, work: Path, scale: int, device: str, sets: Iterable[str]) -> None:
    """Writes the latents of the pictures of `sets` and of all pairs, at 1/`scale` of their size, (N, 2, 4, h, w) fp16.

    The second axis is the picture and its mirror image. The front and the back of a pair are two rows, one after the
    other.
    """
    for size in range(len(SIZES)):
        for of in sets:
            _encode(vae, load_pictures(work, size, of), latents_file(work, size, scale, of), scale, device)
        pairs = load_pairs(work, size)
        _encode(vae, pairs.reshape(-1, *pairs.shape[2:]), latents_file(work, size, scale, PAIRS), scale, device)


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

"""A word after the first chunk of tokens counts in the loss as one in it does, if the text encoder tells it apart."""

import pytest
import torch

from models.conditions import Conditions, whole_picture
from models.loading import load_noise_scheduler, load_prompt_encoder, load_unet, load_vae
from models.text_encoding import count_tokens
from runtime.paths import STARTER
from training.objective import Objective, diffusion_loss
from training.samples import Batch

SIDE = 64  # pixels
COLOURS = {"red": (1.0, -0.8, -0.8), "blue": (-0.8, -0.6, 1.0)}
SENTENCE = "A square lies in the middle of a clean white background, front view."  # 15 tokens: five fill a chunk
TIMESTEPS = torch.tensor([700, 900])  # the colour of a picture is decided where there is much noise


def plain_picture(colour: str) -> torch.Tensor:
    """(1, 3, SIDE, SIDE) of one colour within white."""
    pixel_values = torch.ones(1, 3, SIDE, SIDE)
    middle = slice(SIDE // 4, 3 * SIDE // 4)
    pixel_values[:, :, middle, middle] = torch.tensor(COLOURS[colour])[None, :, None, None]
    return pixel_values


@pytest.fixture(scope="module")
def starter():
    return load_vae(STARTER), load_unet(STARTER).eval(), load_noise_scheduler(STARTER), load_prompt_encoder(STARTER, 3)


@torch.no_grad()
def loss(starter, picture: str, caption: str) -> float:
    vae, unet, scheduler, encoder = starter
    latents = vae.encode(plain_picture(picture)).latent_dist.mean * vae.config.scaling_factor
    noise = torch.randn(2, *latents.shape[1:], generator=torch.Generator().manual_seed(0))
    conditions = Conditions.join([encoder(caption)] * 2, [whole_picture(SIDE, SIDE)] * 2)
    batch = Batch(latents.repeat(2, 1, 1, 1), noise, noise, TIMESTEPS, conditions)
    return diffusion_loss(unet, Objective(scheduler), batch).mean().item()


def gain(starter, sentences: int) -> float:
    """By how much the right word in the last sentence lowers the loss against the wrong one."""
    captions = {name: " ".join([SENTENCE] * sentences + [f"A {name} square."]) for name in COLOURS}
    losses = {(of, said): loss(starter, of, captions[said]) for of in COLOURS for said in COLOURS}
    return sum(value if of != said else -value for (of, said), value in losses.items())


def test_a_colour_named_after_one_or_two_chunks_counts_as_one_in_the_first(starter):
    near, far, farther = (gain(starter, sentences) for sentences in (0, 5, 10))
    assert count_tokens(starter[3].tokenizer, " ".join([SENTENCE] * 5)) == 75
    assert near > 0.02 and far > near / 2 and farther > near / 2

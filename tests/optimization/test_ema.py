"""The moving average: diffusers' own, in each place it can be kept, and none where none is wanted."""

from argparse import Namespace

import pytest
import torch

from optimization.ema import NoEMA, make_ema
from tiny_model import tiny_unet


def average_of(unet, parameters, checkpoint=None, **flags):
    args = Namespace(**{"use_ema": True, "offload_ema": False, **flags})
    return make_ema(args, unet, parameters, checkpoint)


@pytest.mark.parametrize("kept", [{}, {"offload_ema": True}])
def test_it_follows_the_weights_with_the_decay_of_its_step(kept):
    unet = tiny_unet()
    parameters = list(unet.parameters())
    average = average_of(unet, parameters, **kept)
    expected = parameters[0].detach().clone()
    for step in range(1, 4):
        with torch.no_grad():
            for p in parameters:
                p += 1
        average.step(parameters)
        decay = 0.0 if step == 1 else step / (9 + step)  # diffusers' EMAModel: (1 + n) / (10 + n) at its n-th call
        expected = decay * expected + (1 - decay) * parameters[0].detach()
    average.copy_to(parameters)
    assert torch.allclose(parameters[0].detach(), expected, atol=1e-5)


def test_it_goes_on_from_a_checkpoint_as_if_it_had_never_stopped(tmp_path):
    unet = tiny_unet()
    parameters = list(unet.parameters())
    average = average_of(unet, parameters)
    for _ in range(3):
        with torch.no_grad():
            parameters[0] += 1
        average.step(parameters)
    average.save_pretrained(tmp_path / "unet_ema")
    again = average_of(unet, parameters, tmp_path)
    for one in (average, again):
        one.step(parameters)
    assert all(torch.equal(a, b) for a, b in zip(average.shadow_params, again.shadow_params, strict=True))


def test_without_one_the_weights_are_what_is_saved(tmp_path):
    unet = tiny_unet()
    average = average_of(unet, list(unet.parameters()), use_ema=False)
    assert isinstance(average, NoEMA) and not average.enabled
    before = [p.detach().clone() for p in unet.parameters()]
    average.copy_to(unet.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, unet.parameters(), strict=True))
    average.save_pretrained(tmp_path / "unet_ema")
    assert not list(tmp_path.iterdir())

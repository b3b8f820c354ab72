"""The VAE learns photographs, and its latents of renders stay those of the base, as do its other parts."""

import copy
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import teach_photographs
from gpu_pictures import load_photos, psnr, square
from models.loading import load_vae
from pretrain_vae import image_gradients, make_vae
from render_garments import render, sample_scene, sample_spec
from runtime.errors import UserError
from runtime.paths import STARTER
from teach_photographs import (
    ANCHOR,
    WIDTHS,
    Pictures,
    Student,
    align_latents,
    load_weights,
    main,
    widened_vae,
)


@pytest.fixture(scope="module")
def base():
    return load_vae(STARTER).requires_grad_(False)


@pytest.fixture(scope="module")
def pictures():
    """Two renders, and two photographs of noise."""
    renders = np.stack([np.asarray(render(sample(1), 128, 128)) for sample in (sample_spec, sample_scene)])
    noise = np.random.default_rng(0).integers(0, 255, (2, 128, 128, 3), np.uint8)
    renders = torch.from_numpy(renders)
    return Pictures(torch.from_numpy(noise), {("pictures", size): renders for size in range(3)})


def difference(vae, base, pictures) -> float:
    """The mean squared difference of the latents of the renders."""
    renders = pictures.renders["pictures", 0].numpy()
    return (psnr(vae, renders)[1] - psnr(base, renders)[1]).square().mean().item()


def test_the_widened_vae_begins_nearly_as_good_as_the_base(base, pictures):
    renders = pictures.renders["pictures", 0].numpy()
    widths = tuple(width * 2 for width in base.config.block_out_channels)
    wide = widened_vae(base, widths)
    assert tuple(wide.config.block_out_channels) == widths
    assert np.mean(psnr(wide, renders)[0]) > np.mean(psnr(base, renders)[0]) - 4


def test_latents_that_were_mapped_are_the_bases_and_reconstructions_stay_the_same(base, pictures):
    other, images = copy.deepcopy(base), pictures.squares(2)
    with torch.no_grad():  # turned and moved: what an independent training leaves
        turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0))).Q
        other.quant_conv.weight[:4] = torch.einsum("ij,jkhw->ikhw", turn, other.quant_conv.weight[:4]) * 2
        other.quant_conv.bias[:4] = turn @ other.quant_conv.bias[:4] * 2 + 1
    assert difference(other, base, pictures) > 1
    latents = other.encode(images).latent_dist.mean
    before = other.decode(latents).sample
    align_latents(other, base, images)
    assert difference(other, base, pictures) < 1e-6
    posterior = other.encode(images).latent_dist
    assert torch.allclose(other.decode(posterior.mean).sample, before, atol=1e-3)
    wanted = base.encode(images).latent_dist.logvar.mean((0, 2, 3))
    assert torch.allclose(posterior.logvar.mean((0, 2, 3)), wanted, atol=1e-3)


def test_the_term_keeps_the_latents_of_renders_near_those_of_the_base(base, pictures, monkeypatch):
    """Small crops, for speed; steps are small enough that the first do not overshoot."""
    monkeypatch.setattr(teach_photographs, "CROP", 48)
    apart = {}
    for anchor in (0.0, ANCHOR):
        torch.manual_seed(0)
        student = Student(copy.deepcopy(base), base, anchor)
        student.trainer.warm_up, student.trainer.learning_rate = 1, 3e-5
        for step in range(8):
            student.learn(*pictures.random(2, False, np.random.default_rng(step)), done=0.0)
        apart[anchor] = difference(student.vae, base, pictures)
    assert apart[ANCHOR] < 0.5 * apart[0.0], apart


def test_half_of_a_batch_are_renders_and_whole_ones_are_fewer(pictures):
    for whole, shape in ((False, (14, 3, 96, 96)), (True, (2, 3, 128, 128))):
        images, renders = pictures.random(14, whole, np.random.default_rng(0))
        assert images.shape == shape and renders == shape[0] // 2
    render, photo = (image_gradients(image)[0].abs().mean() for image in images)
    assert photo > 5 * render  # the photographs are noise


def test_it_writes_the_base_with_another_vae_and_goes_on_where_it_stopped(tmp_path, pictures, monkeypatch, capsys):
    photos, to = tmp_path / "photos", tmp_path / "base"
    photos.mkdir()
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (256, 256, 3), np.uint8)).save(photos / "1.jpg")
    renders = {key: p[:, :96, :96] for key, p in pictures.renders.items()}
    monkeypatch.setattr(teach_photographs, "load_renders", lambda *_: renders)
    monkeypatch.setattr(teach_photographs, "JUDGED", 1)
    flags = ["--work", tmp_path / "work", "--to", to, "--photos", photos, "--batch", 2]

    def run(*more) -> list[dict]:
        monkeypatch.setattr(sys, "argv", ["teach_photographs.py", *map(str, [*flags, *more])])
        main()
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    first = run("--seconds", 0.001, "--judged", photos)
    assert first[-1]["step"] == 1 and {"renders_psnr_db", "photos_psnr_db", "latent_difference"} <= first[-1].keys()
    for path in STARTER.rglob("*"):
        if path.is_file() and path.parent.name != "vae":
            assert (to / path.relative_to(STARTER)).read_bytes() == path.read_bytes(), path
    assert tuple(load_vae(to).config.block_out_channels) == WIDTHS
    state = torch.load(tmp_path / "work" / "photographs.pt")
    torch.save(state | {"seconds": 0.0}, tmp_path / "work" / "photographs.pt")  # stopped before its time
    assert [line["step"] for line in run("--seconds", 0.001)] == [1, 2]


def test_wrong_photographs_and_weights_are_refused_by_name(tmp_path):
    with pytest.raises(UserError, match=r"photos: no \.jpg"):
        load_photos(tmp_path / "photos")
    Image.new("RGB", (300, 256)).save(tmp_path / "wide.jpg")
    with pytest.raises(UserError, match=r"wide\.jpg: 300 x 256"):
        load_photos(tmp_path)
    (tmp_path / "wide.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"wide\.jpg"):
        square(tmp_path / "wide.jpg")
    with pytest.raises(UserError, match=r"--vae .*gone\.safetensors"):
        load_weights(tmp_path / "gone.safetensors")
    narrow = tmp_path / "narrow.safetensors"
    save_file(make_vae().state_dict(), narrow)
    with pytest.raises(UserError, match=f"--vae .*{narrow.name}: .*{WIDTHS[2]}"):
        load_weights(narrow)

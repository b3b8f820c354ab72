"""Models are found as folders or on the hub, and refused with what is wrong with them."""

import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from bases.finding import ModelOptions, find_model
from models.folders import fingerprint_model
from models.loading import load_unet, load_vae
from runtime.errors import UserError

FLAG = "--pretrained_model_name_or_path"


def test_a_folder_that_is_not_a_model_is_refused_with_what_it_lacks(own_model):
    shutil.rmtree(own_model / "vae")
    with pytest.raises(UserError, match=f"{FLAG}.*no vae/"):
        find_model(str(own_model), FLAG)
    (own_model / "model_index.json").unlink()
    with pytest.raises(UserError, match="model_index.json"):
        find_model(str(own_model), FLAG)


def test_a_model_that_is_neither_a_folder_nor_on_the_hub_is_a_one_line_error(monkeypatch):
    def unreachable(name, **_):
        raise OSError(f"Cannot load model {name}: no connection\nwith a long explanation")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", unreachable)
    with pytest.raises(UserError, match=f"{FLAG} some/model: no such folder.*hub") as error:
        find_model("some/model", FLAG)
    assert "\n" not in str(error.value)


def test_the_variant_that_is_asked_for_is_loaded_even_beside_plain_weights(own_model):
    plain = own_model / "unet" / "diffusion_pytorch_model.safetensors"
    other = {name: tensor + 1 for name, tensor in load_file(plain).items()}
    save_file(other, plain.with_suffix(".non_ema.safetensors"), {"format": "pt"})
    model = find_model(str(own_model), "--model", ModelOptions(variant="non_ema"))
    assert model.path == own_model
    assert all(torch.equal(p, other[name]) for name, p in load_unet(model).named_parameters())
    assert load_vae(model)  # it has only plain weights
    assert fingerprint_model(model) != fingerprint_model(own_model)


def test_whoever_asks_for_no_variant_of_the_same_folder_gets_the_plain_weights(own_model):
    plain = own_model / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(plain), plain.with_suffix(".non_ema.safetensors"), {"format": "pt"})
    find_model(str(own_model), "--model", ModelOptions(variant="non_ema"))
    assert fingerprint_model(find_model(str(own_model), "--model")) == fingerprint_model(own_model)


def test_a_variant_that_does_not_exist_is_refused_with_those_that_do(own_model):
    with pytest.raises(UserError, match="--variant fp16: .*plain weights"):
        find_model(str(own_model), "--model", ModelOptions(variant="fp16"))
    vae = own_model / "vae" / "diffusion_pytorch_model.safetensors"
    vae.rename(vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
    with pytest.raises(UserError, match="--variant fp16: the UNet of "):
        find_model(str(own_model), "--model", ModelOptions(variant="fp16"))

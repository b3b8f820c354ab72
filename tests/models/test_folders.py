"""Model folders are described without loading them."""

import json
import os
import shutil

import pytest
from safetensors.torch import load_file, save_file

from models.folders import ModelFolder, choose_variant, count_parameters, fingerprint_model, read_shape
from models.loading import load_noise_scheduler, load_text_encoder, load_unet, load_vae, save_pipeline
from runtime.errors import UserError


def test_a_git_lfs_pointer_instead_of_weights_is_named(own_model):
    weights = own_model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3438167536\n")
    with pytest.raises(UserError, match="unet cannot be loaded: .*Git LFS"):
        count_parameters(own_model)


def test_the_shape_is_read_from_the_configs(tiny_model):
    shape = read_shape(tiny_model)
    assert (shape.vae_factor, shape.native_size, shape.size_multiple) == (2, 64, 8)
    assert shape.latent_shape(72, 56) == (4, 36, 28)
    assert shape.attention_levels == (1,)


@pytest.mark.parametrize(
    "change",
    [
        {"in_channels": 9},
        {"addition_embed_type": "image"},
        {"class_embed_type": "projection"},
        {"num_class_embeds": 1000},
        {"encoder_hid_dim_type": "ip_image_proj"},
        {"time_cond_proj_dim": 256},
        {"attention_type": "gated"},
        {"sample_size": None},
        {"sample_size": "64"},
    ],
)
def test_another_kind_of_model_is_refused_by_the_key_that_tells_it(own_model, change):
    config = own_model / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(UserError, match=f"not .*{min(change)}"):
        read_shape(own_model)


def test_parameters_are_counted_without_loading_them(tiny_model):
    assert count_parameters(tiny_model) == sum(p.numel() for p in load_unet(tiny_model).parameters())


def test_the_fingerprint_depends_on_each_weight_and_not_on_the_folder(own_model, tiny_model):
    assert fingerprint_model(own_model) == fingerprint_model(tiny_model)
    weights = own_model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.bias"][0] += 1
    save_file(tensors, weights)
    assert fingerprint_model(own_model) != fingerprint_model(tiny_model)


def test_a_model_that_has_only_a_variant_is_read_and_plain_weights_win(own_model, tiny_model, tmp_path):
    for part in ("unet", "vae", "text_encoder"):
        for path in (own_model / part).glob("*.safetensors"):
            path.rename(path.with_suffix(".fp16.safetensors"))
    assert choose_variant(own_model, "unet") == "fp16" and choose_variant(tiny_model, "unet") is None
    assert count_parameters(own_model) == count_parameters(tiny_model)
    save_pipeline(load_unet(own_model), own_model, tmp_path / "out", load_noise_scheduler(own_model))
    assert load_vae(own_model) and load_text_encoder(own_model) and load_vae(tmp_path / "out")
    plain = own_model / "unet" / "diffusion_pytorch_model.safetensors"
    shutil.copy(plain.with_suffix(".fp16.safetensors"), plain)
    assert choose_variant(own_model, "unet") is None
    assert count_parameters(own_model) == count_parameters(tiny_model)


def test_a_model_folder_can_be_used_as_a_path(tiny_model):
    model = ModelFolder(tiny_model, "fp16")
    assert model / "unet" == tiny_model / "unet" and str(model) == os.fspath(model) == str(tiny_model)
    assert model.name == tiny_model.name and model != ModelFolder(tiny_model)

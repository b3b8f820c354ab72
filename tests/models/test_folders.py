"""Model folders: found, checked and described."""

import json
import shutil

import diffusers
import pytest
from safetensors.torch import load_file, save_file

from models.folders import count_parameters, find_model, fingerprint_model, read_shape
from models.loading import (
    load_unet,
)
from runtime.errors import UserError

FLAG = "--pretrained_model_name_or_path"


def test_a_folder_that_is_no_model_is_refused_with_what_it_lacks(own_model, tmp_path):
    shutil.rmtree(own_model / "vae")
    with pytest.raises(UserError, match=f"{FLAG}.*no vae/"):
        find_model(str(own_model), FLAG)
    (own_model / "model_index.json").unlink()
    with pytest.raises(UserError, match="model_index.json"):
        find_model(str(own_model), FLAG)


def test_a_model_that_is_neither_here_nor_on_the_hub_is_one_line_that_says_both(monkeypatch):
    def unreachable(name, **_):
        raise OSError(f"Cannot load model {name}: no connection\nwith a long explanation")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", unreachable)
    with pytest.raises(UserError, match=f"{FLAG} some/model: no such folder.*hub") as error:
        find_model("some/model", FLAG)
    assert "\n" not in str(error.value)


def test_a_note_of_git_lfs_in_place_of_weights_is_named(own_model):
    weights = own_model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3438167536\n")
    with pytest.raises(UserError, match="unet cannot be loaded: .*Git LFS"):
        count_parameters(own_model)


def test_the_shape_is_read_from_the_configs(tiny_model):
    shape = read_shape(tiny_model)
    assert (shape.vae_factor, shape.native_size, shape.size_multiple) == (2, 64, 8)
    assert shape.latent_shape(72, 56) == (4, 36, 28)
    assert shape.attention_levels == (1,)


@pytest.mark.parametrize("change", [{"in_channels": 9}, {"addition_embed_type": "text_time"}, {"sample_size": None}])
def test_a_pipeline_of_another_kind_is_refused(own_model, change):
    config = own_model / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(UserError, match="[Nn]ot "):
        read_shape(own_model)


def test_parameters_are_counted_without_loading_them(tiny_model):
    assert count_parameters(tiny_model) == sum(p.numel() for p in load_unet(tiny_model).parameters())


def test_the_fingerprint_changes_with_one_weight_and_not_with_the_place(own_model, tiny_model):
    assert fingerprint_model(own_model) == fingerprint_model(tiny_model)
    weights = own_model / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.bias"][0] += 1
    save_file(tensors, weights)
    assert fingerprint_model(own_model) != fingerprint_model(tiny_model)

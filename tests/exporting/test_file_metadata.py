"""The .yaml beside a file is one that diffusers reads, and the architecture follows from the configs."""

import json
from pathlib import Path

import torch
import yaml
from diffusers.loaders.single_file_utils import (
    create_unet_diffusers_config_from_ldm,
    create_vae_diffusers_config_from_ldm,
)

from bases.families import SD2
from exporting.file_metadata import ldm_config_yaml, lora_metadata, read_checkpoint_format
from models.lora import LoraLayer


def test_diffusers_reads_the_models_configs_from_the_yaml(sd2_model: Path):
    """An independent reader of the original format."""
    config = yaml.safe_load(ldm_config_yaml(read_checkpoint_format(sd2_model, {})))
    read = {
        "unet": create_unet_diffusers_config_from_ldm(config, {}, image_size=64),
        "vae": create_vae_diffusers_config_from_ldm(config, {}, image_size=64),
    }
    for part, settings in read.items():
        own = json.loads((sd2_model / part / "config.json").read_text())
        assert {name: own[name] for name in settings} == settings


def test_only_a_model_of_stable_diffusions_own_sizes_has_standard_sizes(sd2_model: Path):
    model = read_checkpoint_format(sd2_model, {})
    assert model.family is SD2 and not model.has_standard_sizes
    model.configs["unet"] |= {"block_out_channels": [320, 640, 1280, 1280], "cross_attention_dim": 1024}
    model.configs["vae"] |= {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
    assert model.has_standard_sizes and model.architecture == "stable-diffusion-v2-768-v"
    assert read_checkpoint_format(sd2_model, {"prediction_type": "epsilon"}).architecture == "stable-diffusion-v2-512"


def test_a_lora_of_stable_diffusion_2_says_so(sd2_model: Path):
    """AUTOMATIC1111 hides a LoRA whose `ss_v2` does not fit the model in use."""
    run = {"base_model": str(sd2_model), "arguments": {"trigger": None}}
    layer = LoraLayer(torch.zeros(2, 16), torch.zeros(16, 2), 1.5)
    found = lora_metadata(read_checkpoint_format(sd2_model, {}), run, "jeans", layer)
    assert (found["ss_v2"], found["ss_base_model_version"], found["ss_network_alpha"]) == ("True", "sd_v2_v", "1.5")
    assert found["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert "ss_tag_frequency" not in found and "modelspec.trigger_phrase" not in found
    folders = [{"folder": f"/data/{name}/train", "pictures": count} for name, count in (("a", 3), ("b", 2))]
    both = lora_metadata(
        read_checkpoint_format(sd2_model, {}), {**run, "arguments": {"trigger": "sks"}, "folders": folders}, "x", layer
    )
    assert json.loads(both["ss_tag_frequency"]) == {"a/train": {"sks": 3}, "b/train": {"sks": 2}}
    hub = lora_metadata(read_checkpoint_format(sd2_model, {}), {**run, "base_model": "someone/model"}, "jeans", layer)
    assert hub["ss_sd_model_name"] == "someone/model"

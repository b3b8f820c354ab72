"""What is trained: a LoRA is one small file that other tools read; a bf16 copy learns as fp32 does."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from models.loading import load_unet
from models.lora import LORA_FILE, read_lora, write_lora
from optimization.parameters import FullUNet, LoraAdapter, MasterWeights, ModelParameters
from tiny_model import tiny_unet


@pytest.fixture
def unet():
    return tiny_unet()


def inputs():
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(1, 4, 8, 8, generator=generator),
        torch.tensor([500]),
        torch.randn(1, 77, 16, generator=generator),
    )


@torch.no_grad()
def output(unet) -> torch.Tensor:
    return unet(*inputs()).sample


def changed_lora(tiny_model):
    """A UNet with an adapter that is not zero any more."""
    unet = LoraAdapter(2, 4.0).load(tiny_model, None)
    with torch.no_grad():
        for parameter in ModelParameters(unet).parameters:
            parameter += 0.1
    return unet


def test_a_new_lora_changes_nothing_and_trains_the_adapter_alone(tiny_model):
    unet = LoraAdapter(2, None).load(tiny_model, None)
    assert torch.allclose(output(unet), output(load_unet(tiny_model)), atol=1e-6)
    trained, whole = (sum(p.numel() for p in ps) for ps in (ModelParameters(unet).parameters, unet.parameters()))
    assert 0 < trained < whole / 4


def test_without_an_alpha_a_loras_output_counts_once():
    assert LoraAdapter(16, None).config.lora_alpha == 16 and LoraAdapter(16, 4.0).config.lora_alpha == 4


def test_a_lora_is_read_back_for_training(tiny_model, tmp_path):
    unet = changed_lora(tiny_model)
    write_lora(unet, tmp_path)
    again = LoraAdapter(2, 4.0).load(tiny_model, tmp_path)
    assert torch.allclose(output(again), output(unet), atol=1e-6)
    assert not torch.allclose(output(load_unet(tiny_model)), output(unet), atol=1e-3)


def test_plain_diffusers_reads_the_lora_with_its_alpha(tiny_model, tmp_path):
    unet = changed_lora(tiny_model)
    write_lora(unet, tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, torch_dtype=torch.float32)
    pipeline.load_lora_weights(tmp_path)
    assert torch.allclose(output(pipeline.unet), output(unet), atol=1e-5)


def test_a_file_of_another_rank_does_not_pass_for_ours(tiny_model, tmp_path):
    write_lora(changed_lora(tiny_model), tmp_path)
    with pytest.raises(RuntimeError, match="size mismatch"):
        read_lora(LoraAdapter(3, None).load(tiny_model, None), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LORA_FILE]


def test_the_whole_unets_checkpoint_is_read_back(unet, tiny_model, tmp_path):
    FullUNet().save_checkpoint(unet, tmp_path)
    assert torch.allclose(output(FullUNet().load(tiny_model, tmp_path)), output(unet), atol=1e-5)


def test_small_steps_are_not_lost_in_the_copys_half_precision(unet):
    """bf16 has 8 bits: 1 + 1e-4 is 1 there, and a weight that only lived there would never move."""
    weights = MasterWeights(unet, processes=1)
    assert unet.dtype == torch.bfloat16 and weights.parameters[0].dtype == torch.float32
    before = [p.detach().clone() for p in weights.parameters]
    copied = [p.clone() for p in weights.copies]
    with torch.no_grad():
        for _ in range(100):
            for p in weights.parameters:
                p.mul_(1 + 1e-4)
    weights.sync_to_model()
    moved = [
        ((p - b).abs().sum() / b.abs().sum().clamp(min=1e-9)).item()
        for p, b in zip(weights.parameters, before, strict=True)
    ]
    assert max(moved) == pytest.approx(0.01, rel=0.05)
    assert any(not torch.equal(p, c) for p, c in zip(weights.copies, copied, strict=True))
    with weights.full_precision():
        assert unet.dtype == torch.float32
        assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), weights.parameters, strict=True))
    assert unet.dtype == torch.bfloat16


def test_gradients_of_many_parts_are_added_in_full_precision(unet):
    """In bf16 the hundredth part of a sum is lost: 1 + 1/512 is 1."""
    weights = MasterWeights(unet, processes=1)
    for _ in range(512):
        for copied in weights.copies:
            copied.grad = torch.full_like(copied, 1.0)
        weights.collect_gradients(last=False)
    assert all((p.grad == 512).all() for p in weights.parameters)


def test_gradients_go_to_the_weights_and_leave_the_copies(unet):
    weights = MasterWeights(unet, processes=1)
    latents, timesteps, text = inputs()
    unet(latents.bfloat16(), timesteps, text.bfloat16()).sample.float().square().mean().backward()
    weights.collect_gradients(last=True)
    assert all(copied.grad is None for copied in weights.copies)
    assert any(p.grad is not None and p.grad.dtype == torch.float32 and p.grad.abs().sum() for p in weights.parameters)

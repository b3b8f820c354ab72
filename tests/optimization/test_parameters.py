"""What is trained: a LoRA is one small file that other tools read; a bf16 copy learns as fp32 does."""

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline

from models.loading import load_unet
from models.lora import LORA_FILE, read_lora, write_lora
from optimization import parameters
from optimization.parameters import (
    FullUNet,
    LoraAdapter,
    MasterWeights,
    ModelParameters,
    cast_weights,
    split_into_chunks,
)
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


def compute_gradients(unet) -> None:
    latents, timesteps, text = (tensor.to(unet.dtype) for tensor in inputs())
    unet(latents, timesteps, text).sample.float().square().mean().backward()


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(parameters.split_into_chunks, "__defaults__", (1000,))


@pytest.mark.parametrize("passes", [1, 2])
def test_clipped_gradients_reach_the_optimizer_in_fp32_chunk_by_chunk(unet, small_chunks, passes):
    weights, accelerator = MasterWeights(unet, processes=1), Accelerator(cpu=True)
    expected = [torch.zeros_like(p) for p in weights.parameters]
    for turn in range(passes):
        compute_gradients(unet)
        for total, copied in zip(expected, weights.copies, strict=True):
            total += 0 if copied.grad is None else copied.grad
        weights.collect_gradients(last=turn == passes - 1)
    norm = torch.stack([e.norm() for e in expected]).norm()
    assert weights.clip_gradients(accelerator, norm.item() / 2).item() == pytest.approx(norm.item(), rel=1e-3)
    seen = []
    for chunk in weights.gradient_chunks():
        seen += [(p, p.grad) for p in chunk]
        if passes == 1:
            assert sum(p.grad is not None for p in weights.parameters) == len(chunk)
    assert [id(p) for p, _ in seen] == [id(p) for p in weights.parameters]
    assert all(torch.allclose(g, e / 2, rtol=1e-3) for (_, g), e in zip(seen, expected, strict=True))
    assert all(p.grad is None for p in (*weights.parameters, *weights.copies))


def test_a_step_in_fp32_chunk_by_chunk_is_the_step_of_all_parameters(unet, small_chunks):
    whole = tiny_unet()
    whole.load_state_dict(unet.state_dict())
    weights = ModelParameters(unet)
    optimizers = [torch.optim.AdamW(list(net.parameters()), lr=0.01, fused=True) for net in (whole, unet)]
    for _ in range(2):
        compute_gradients(whole)
        optimizers[0].step()
        optimizers[0].zero_grad()
        compute_gradients(unet)
        assert len([optimizers[1].step() for _ in weights.gradient_chunks()]) > 2
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), unet.parameters(), strict=True))


@pytest.mark.parametrize(
    ("precision", "trained", "frozen"),
    [
        ("no", torch.float32, torch.float32),
        ("fp16", torch.float32, torch.float16),
        ("bf16", torch.float32, torch.bfloat16),
        ("pure_bf16", torch.bfloat16, torch.bfloat16),
    ],
)
def test_what_a_lora_leaves_as_it_is_takes_half_the_memory(tiny_model, precision, trained, frozen):
    unet = LoraAdapter(2, None).load(tiny_model, None)
    cast_weights(unet, precision)
    assert {(p.requires_grad, p.dtype) for p in unet.parameters()} == {(True, trained), (False, frozen)}


def test_chunks_are_whole_tensors_in_order_and_never_empty():
    tensors = [torch.empty(size) for size in (3, 3, 9, 1, 1, 1)]
    sizes = [[t.numel() for t in tensors[chunk]] for chunk in split_into_chunks(tensors, 6)]
    assert sizes == [[3, 3], [9], [1, 1, 1]]

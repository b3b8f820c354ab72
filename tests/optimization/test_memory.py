"""Memory foretold without a GPU: as published, linear in the batch, and each setting costs what it should."""

import json
import time
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel

from clone import ROOT
from models.loading import quiet_libraries
from optimization import memory
from optimization.memory import GB, MemorySettings, forecast_memory, largest_batch, trace_step
from unet_configs import SD15

SD15_PARAMETERS = 859_520_964
# The published numbers are the whole card's: beside PyTorch's tensors CUDA's context, the kernels of cuDNN, xformers
# and bitsandbytes, and what PyTorch's allocator holds unused.
T4_OVERHEAD = 1.5 * GB
# github.com/ShivamShrirao/diffusers, examples/dreambooth/README.md, Tesla T4, 512 px: GB VRAM usage by precision,
# batch, accumulated batches, checkpointing, optimizer. Its script removes the gradients after a step. In its text
# AdamW without checkpointing takes 17.7 GB: of no stated precision, and more than a T4 has.
PUBLISHED = {
    ("fp16", 1, 1, True, "adamw8bit"): 9.92,
    ("no", 1, 1, True, "adamw8bit"): 10.08,
    ("fp16", 2, 1, True, "adamw8bit"): 10.4,
    ("fp16", 1, 1, False, "adamw8bit"): 11.17,
    ("no", 1, 1, False, "adamw8bit"): 11.17,
    ("fp16", 1, 2, True, "adamw8bit"): 11.56,
    ("fp16", 1, 2, False, "adamw8bit"): 13.7,
    ("fp16", 1, 1, True, "adamw"): 15.79,
    # Foretold 10.9: half as much for a second picture as was measured.
    ("fp16", 2, 1, False, "adamw8bit"): 13.67,
}
UNMET = {("fp16", 2, 1, False, "adamw8bit")}


SMALL = {
    "sample_size": 32, "cross_attention_dim": 16, "attention_head_dim": 4, "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "layers_per_block": 1,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def quiet():
    quiet_libraries()


SMALL_PARAMETERS = sum(p.numel() for p in UNet2DConditionModel(**SMALL).parameters())

FORETOLD_TOO_LOW = pytest.mark.xfail(strict=True, reason="a fifth less is foretold than was published")


def small(**settings) -> MemorySettings:
    usual = {"unet_config": SMALL, "height": 64, "width": 64, "vae_factor": 2}
    return MemorySettings(**{**usual, **settings})


@pytest.mark.slow
@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=[FORETOLD_TOO_LOW] if row in UNMET else []) for row in PUBLISHED],
)
def test_the_published_table_of_a_t4_is_met_within_8_percent(row):
    precision, batch, batches, checkpointing, optimizer = row
    settings = MemorySettings(
        SD15, precision=precision, optimizer=optimizer, gradient_checkpointing=checkpointing, accumulated=batches > 1
    )
    foretold = forecast_memory(settings, batch).total + T4_OVERHEAD
    assert foretold == pytest.approx(PUBLISHED[row] * GB, rel=0.08)


@pytest.mark.slow
def test_stable_diffusions_weights_take_their_bytes():
    """bf16: fp32 master weights and a copy; AdamW: two numbers of fp32 each. Blocks of 512 bytes add little."""
    forecast = forecast_memory(MemorySettings(SD15, precision="bf16", ema=True), 4)
    assert forecast.weights == pytest.approx(6 * SD15_PARAMETERS, rel=1e-3)
    assert forecast.optimizer == pytest.approx(8 * SD15_PARAMETERS, rel=1e-3)
    assert forecast.ema == pytest.approx(4 * SD15_PARAMETERS, rel=1e-3)
    assert forecast.gradients == pytest.approx(2 * SD15_PARAMETERS, rel=1e-3)
    assert 18 * GB < forecast.total < 21 * GB


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "lora_rank", "checkpointing"),
    [("no", 2, False), ("bf16", None, False), ("bf16", 2, True), ("fp16", None, True), ("pure_bf16", None, False)],
)
def test_a_large_batch_takes_what_two_small_ones_foretell(precision, lora_rank, checkpointing, monkeypatch):
    settings = small(precision=precision, lora_rank=lora_rank, gradient_checkpointing=checkpointing)
    foretold = forecast_memory(settings, 40)
    trace_step.cache_clear()
    monkeypatch.setattr(memory, "PROBES", (40, 41))
    traced = forecast_memory(settings, 40)
    assert foretold.total == pytest.approx(traced.total, rel=0.01)
    assert foretold.activations == pytest.approx(traced.activations, rel=0.01)
    trace_step.cache_clear()


def test_activations_grow_with_batch_and_size():
    few, twice, larger = (
        forecast_memory(settings, batch).activations
        for settings, batch in ((small(), 20), (small(), 40), (small(height=128), 20))
    )
    assert 1.9 < twice / few < 2.1
    assert 1.9 < larger / few < 2.2  # attention keeps no scores, which would grow with the square


def test_a_small_model_takes_no_time_to_speak_of():
    forecast_memory(small(), 1)  # loads what is needed at the first use
    started = time.process_time()
    forecast_memory(small(precision="bf16", height=32), 1)
    assert time.process_time() - started < 10  # seconds; a tenth of one on a machine that does nothing else


@pytest.mark.parametrize(
    ("settings", "weights", "gradients", "optimizer"),  # bytes for each parameter
    [
        ({}, 4, 4, 8),
        ({"precision": "fp16"}, 4, 4, 8),
        ({"precision": "bf16"}, 6, 2, 8),
        ({"precision": "pure_bf16"}, 2, 2, 4),
        ({"optimizer": "adamw8bit"}, 4, 4, 2),
        ({"optimizer": "adafactor"}, 4, 4, 0.1),
    ],
)
def test_a_parameter_costs_what_precision_and_optimizer_keep_of_it(settings, weights, gradients, optimizer):
    forecast = forecast_memory(small(**settings), 1)
    count = SMALL_PARAMETERS
    blocks = 0.5 * count  # allocations come in blocks of 512 bytes
    assert forecast.weights == pytest.approx(weights * count, abs=blocks)
    assert forecast.gradients == pytest.approx(gradients * count, abs=blocks)
    assert forecast.optimizer == pytest.approx(optimizer * count, abs=blocks)


def test_an_average_costs_a_copy_of_the_weights():
    plain, averaged = (forecast_memory(small(ema=ema), 1) for ema in (False, True))
    assert averaged.ema == plain.weights and averaged.total == plain.total + plain.weights
    pure = forecast_memory(small(ema=True, precision="pure_bf16"), 1)
    assert pure.ema == plain.weights  # in fp32 all the same


def test_what_a_lora_leaves_as_it_is_reaches_the_gpu_in_half_precision_alone():
    forecast = forecast_memory(small(lora_rank=2, precision="bf16", height=8, width=8), 1)
    assert forecast.loading <= forecast.step and forecast.weights < 2.5 * SMALL_PARAMETERS


@pytest.mark.slow
def test_a_lora_trains_little_and_its_frozen_weights_are_in_half_precision():
    whole, lora = forecast_memory(small(), 1), forecast_memory(small(lora_rank=2), 1)
    assert lora.optimizer < whole.optimizer / 2 and lora.gradients < whole.gradients / 2
    half = forecast_memory(small(lora_rank=2, precision="fp16"), 1)
    assert half.weights < lora.weights and half.total < lora.total


def test_earlier_gradients_of_a_step_stay_while_later_ones_are_computed():
    once, twice = (forecast_memory(small(precision="bf16", accumulated=more), 40) for more in (False, True))
    assert twice.total == pytest.approx(once.total + 2 * once.gradients, rel=0.02)  # kept in fp32


def test_processes_that_exchange_gradients_keep_their_buffers():
    alone, together = (forecast_memory(small(precision="bf16", processes=n), 1) for n in (1, 2))
    assert together.total > alone.total


def test_checkpointing_keeps_less_and_more_fits():
    plain, less = (small(height=256, width=256, gradient_checkpointing=c) for c in (False, True))
    assert forecast_memory(less, 8).activations < forecast_memory(plain, 8).activations / 2
    assert largest_batch(less, 8) > largest_batch(plain, 8) > 1


def test_the_largest_batch_fits_and_one_more_does_not():
    room, settings = 3.0, small(height=256, width=256)
    batch = largest_batch(settings, room)
    totals = [forecast_memory(settings, n).total + memory.CONTEXT_BYTES for n in (batch, batch + 1)]
    assert totals[0] <= room * GB < totals[1]
    assert largest_batch(settings, 1.0) == 0


def test_long_captions_with_masks_cost_little():
    short, long = (forecast_memory(small(precision="bf16", text_tokens=tokens), 8) for tokens in (77, 231))
    assert short.activations < long.activations < short.activations * 1.5


def test_a_unet_that_reads_sizes_and_pooled_text_can_be_traced():
    """As Stable Diffusion XL's does."""
    sizes = {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 8 + 6 * 4}
    config = {**SMALL, "addition_embed_type": "text_time", **sizes}
    assert forecast_memory(small(unet_config=config), 1).weights > forecast_memory(small(), 1).weights


def test_the_starters_own_config_can_be_traced():
    config = json.loads((ROOT / "text_to_image/starter/base/unet/config.json").read_text())
    assert forecast_memory(MemorySettings(config, height=256, width=256), 4).total < GB


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="lion"):
        forecast_memory(replace(small(), optimizer="lion"), 1)


def test_foretelling_leaves_random_numbers_alone():
    before = torch.get_rng_state()
    forecast_memory(small(lora_rank=3, gradient_checkpointing=True), 1)
    assert torch.equal(torch.get_rng_state(), before)

"""A LoRA on SDXL's UNet at 1024 px, the UNet alone: random weights, no text encoders, no VAE.

The scripts do not train XL yet; this says what they would have to reach.
"""

import time
from functools import cached_property

import torch
from diffusers import UNet2DConditionModel

from gpu.rows import Measurement
from gpu.settings import Settings
from gpu.training_runs import free_memory, with_largest_batch
from optimization.parameters import LoraAdapter
from runtime.devices import peak_memory_gb, synchronize
from unet_configs import SDXL

TINY = {
    **SDXL,
    "sample_size": 8,
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 1,
    "transformer_layers_per_block": 1,
    "attention_head_dim": (2, 4, 4),
    "cross_attention_dim": 32,
    "projection_class_embeddings_input_dim": 6 * 256 + 16,
}
RANK = 16


def measurements(group: str, settings: Settings) -> list[Measurement]:
    xl = XlUNet(settings)
    return [
        Measurement(f"LoRA {RANK}, 1024 px, bf16, UNet alone, batch {batch}", lambda b=batch: xl.train(b), seconds)
        for batch, seconds in ((1, 20), (4, 15))
    ]


class XlUNet:
    """The UNet and the adapter in bf16, as `LoraAdapter` configures it, and AdamW."""

    def __init__(self, settings: Settings):
        self.settings, self.config = settings, TINY if settings.tiny else SDXL
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def unet(self) -> UNet2DConditionModel:
        with torch.device(self.device):
            unet = UNet2DConditionModel(**self.config)
        unet.to(torch.bfloat16, memory_format=torch.channels_last).requires_grad_(False)
        unet.add_adapter(LoraAdapter(RANK, None).config)
        return unet.train()

    def train(self, batch: int) -> dict:
        free_memory()
        return with_largest_batch(self.settings.batch(batch), self.time_steps)

    def time_steps(self, batch: int) -> dict:
        trained = [p for p in self.unet.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        inputs, target = self.random_inputs(batch)
        for step in range(self.settings.warm_up + self.settings.timed):
            if step == self.settings.warm_up:
                synchronize()
                begun = time.perf_counter()
            loss = (self.unet(**inputs).sample.float() - target).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        synchronize()
        seconds = (time.perf_counter() - begun) / self.settings.timed
        assert loss.isfinite().item(), f"the loss is {loss.item()}"
        return {"batch": batch, "images/s": float(f"{batch / seconds:.3g}"), "ms a step": round(1000 * seconds, 1),
                "peak GB": round(peak_memory_gb(), 1)}  # fmt: skip

    def random_inputs(self, batch: int) -> tuple[dict, torch.Tensor]:
        """What the UNet is called with, and what it is to predict."""
        size, pooled = self.config["sample_size"], self.config["projection_class_embeddings_input_dim"] - 6 * 256
        shapes = {"sample": (4, size, size), "text": (77, self.config["cross_attention_dim"]), "pooled": (pooled,)}
        half = {"device": self.device, "dtype": torch.bfloat16}
        random = {name: torch.randn(batch, *shape, **half) for name, shape in shapes.items()}
        time_ids = torch.tensor([[1024.0, 1024, 0, 0, 1024, 1024]], **half).expand(batch, -1)
        inputs = {
            "sample": random["sample"],
            "timestep": torch.randint(1000, (batch,), device=self.device),
            "encoder_hidden_states": random["text"],
            "added_cond_kwargs": {"text_embeds": random["pooled"], "time_ids": time_ids},
        }
        return inputs, torch.randn_like(random["sample"], dtype=torch.float32)

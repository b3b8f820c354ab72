"""What the UNet reads beside noisy latents and timestep: the text, and for XL also the picture's size and crop."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from models.text_encoding import TextEmbedding
from runtime.devices import to_device

# Pixels: the picture's own height and width, the top and left of the crop after resizing, the crop's height and width
# (section 2.2 of arXiv:2307.01952).
TimeIds = tuple[int, int, int, int, int, int]


@dataclass(frozen=True)
class Conditions:
    """Of a batch. Stable Diffusion 1.x and 2.x ignore `pooled` and `time_ids`."""

    hidden_states: torch.Tensor  # (B, L, D)
    attention_mask: torch.Tensor | None  # (B, L): 1 read, 0 padding; None: all are read
    pooled: torch.Tensor  # (B, P)
    time_ids: torch.Tensor  # (B, 6), always fp32: bf16 would make 1365 into 1368

    @classmethod
    def join(cls, embeddings: Sequence[TextEmbedding], time_ids: Sequence[TimeIds]) -> "Conditions":
        """A batch of embeddings; shorter ones are padded and masked, which gives the same result as each alone."""
        hidden_states, mask = join_hidden_states([embedding.hidden_states for embedding in embeddings])
        pooled = torch.stack([embedding.pooled for embedding in embeddings])
        return cls(hidden_states, mask, pooled, torch.tensor(time_ids, dtype=torch.float32, device=pooled.device))

    @property
    def dtype(self) -> torch.dtype:
        return self.hidden_states.dtype

    def to(self, device: torch.device, dtype: torch.dtype) -> "Conditions":
        """`dtype` is the UNet's."""
        mask = self.attention_mask
        return Conditions(
            to_device(self.hidden_states, device, dtype),
            None if mask is None else to_device(mask, device, dtype),
            to_device(self.pooled, device, dtype),
            to_device(self.time_ids, device),
        )

    def unet_inputs(self) -> dict[str, Any]:
        """The arguments of diffusers' UNet2DConditionModel."""
        return {
            "encoder_hidden_states": self.hidden_states,
            "encoder_attention_mask": self.attention_mask,
            "added_cond_kwargs": {"text_embeds": self.pooled, "time_ids": self.time_ids},
        }


def whole_picture(height: int, width: int) -> TimeIds:
    """Of a picture that is not cropped, as generated ones are."""
    return height, width, 0, 0, height, width


def join_hidden_states(hidden_states: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A batch of (L_i, D) as (B, L, D), L the longest, and a mask (B, L) of 1 (read) and 0 (padding).

    The mask is None if all have one length, which keeps the UNet on its faster path without a mask.
    """
    lengths = [len(states) for states in hidden_states]
    if len(set(lengths)) == 1:
        return torch.stack(list(hidden_states)), None
    joined = torch.nn.utils.rnn.pad_sequence(list(hidden_states), batch_first=True)
    positions = torch.arange(max(lengths), device=joined.device)
    mask = positions[None, :] < torch.tensor(lengths, device=joined.device)[:, None]
    return joined, mask.to(joined.dtype)

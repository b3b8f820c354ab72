"""Conditions of Stable Diffusion 1.x, which reads text alone."""

import torch

from models.conditions import Conditions, TimeIds, whole_picture

ANY_SIZE: TimeIds = whole_picture(64, 64)


def text_alone(hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Conditions:
    """Of (B, L, D) hidden states: no pooled output, and sizes that are not read."""
    batch = len(hidden_states)
    return Conditions(hidden_states, attention_mask, torch.zeros(batch, 0), torch.tensor([ANY_SIZE] * batch).float())

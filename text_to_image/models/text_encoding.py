"""Prompts of any length → text embeddings, the same for training and generation.

CLIP reads 77 tokens: start, 75 of the prompt, end. A longer prompt is split into chunks of 75 tokens. Each chunk is
encoded separately with its own start and end, and the results are joined along the sequence; the UNet's
cross-attention takes any length. A prompt gets only as many chunks as it needs.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

AT_ONCE = 4096  # prompts that are tokenised together


class TextEmbedding(NamedTuple):
    """What a UNet reads of a prompt."""

    hidden_states: torch.Tensor  # (L, D), of all text encoders side by side
    pooled: torch.Tensor  # (P,), of the prompt as a whole; P is 0 for Stable Diffusion 1.x and 2.x

    def to(self, target: torch.device | torch.dtype | str) -> "TextEmbedding":
        return TextEmbedding(self.hidden_states.to(target), self.pooled.to(target))

    def is_finite(self) -> bool:
        return all(bool(tensor.isfinite().all()) for tensor in self)


@dataclass(frozen=True)
class TextEncoder:
    """One text encoder, and what of it is read."""

    model: CLIPTextModel | CLIPTextModelWithProjection
    pad_token_id: int
    # Which hidden states: of the last layer, normalized, or as XL does of the layer before it, as they are.
    penultimate: bool = False

    def __call__(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, 77) token ids → hidden states (N, 77, D) and pooled output (N, P). No attention mask, as in SD."""
        output = self.model(token_ids.to(self.model.device), output_hidden_states=self.penultimate)
        hidden_states = output.hidden_states[-2] if self.penultimate else output.last_hidden_state
        pooled = output.get("text_embeds")
        return hidden_states, hidden_states.new_zeros(len(hidden_states), 0) if pooled is None else pooled


@dataclass(frozen=True)
class PromptEncoder:
    """A model's tokenizer and its text encoders, one or for XL two, whose tokenizers differ in the padding alone."""

    tokenizer: CLIPTokenizer
    text_encoders: Sequence[TextEncoder]
    max_chunks: int
    zeros_for_empty: bool = False  # an empty prompt is all zeros (XL), not what the text encoders make of it

    @property
    def dtype(self) -> torch.dtype:
        return self.text_encoders[0].model.dtype

    def __call__(self, prompt: str) -> TextEmbedding:
        return self.encode([prompt])[0]

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[TextEmbedding]:
        """Of each prompt, with the chunks of all in one batch: chunks joined along the sequence, pooled of the first.

        A prompt's embedding is (chunks * 77, D) and (P,).
        """
        chunks = [split_tokens(self.tokenizer, prompt, self.max_chunks) for prompt in prompts]
        read = [encoder(self._pad(chunks, encoder.pad_token_id)) for encoder in self.text_encoders]
        hidden_states, pooled = (torch.cat(outputs, dim=-1) for outputs in zip(*read, strict=True))
        lengths = [len(parts) for parts in chunks]
        embeddings = [
            TextEmbedding(states.flatten(0, 1), first[0])
            for states, first in zip(hidden_states.split(lengths), pooled.split(lengths), strict=True)
        ]
        return [
            TextEmbedding(*map(torch.zeros_like, embedding)) if self.zeros_for_empty and not prompt else embedding
            for prompt, embedding in zip(prompts, embeddings, strict=True)
        ]

    def _pad(self, chunks: Sequence[Sequence[list[int]]], pad_token_id: int) -> torch.Tensor:
        length = self.tokenizer.model_max_length
        return torch.tensor([ids + [pad_token_id] * (length - len(ids)) for parts in chunks for ids in parts])


def count_tokens(tokenizer: CLIPTokenizer, prompt: str) -> int:
    """Without the start and end tokens."""
    return len(_token_ids(tokenizer, prompt))


def count_all_tokens(tokenizer: CLIPTokenizer, prompts: Iterable[str]) -> dict[str, int]:
    """`count_tokens` of each, several times as fast."""
    different = list(dict.fromkeys(prompts))
    counts: list[int] = []
    for at in range(0, len(different), AT_ONCE):
        batch = different[at : at + AT_ONCE]
        counts += map(len, tokenizer(batch, add_special_tokens=False, truncation=False, verbose=False).input_ids)
    return dict(zip(different, counts, strict=True))


def chunks_of(tokenizer: CLIPTokenizer, tokens: int, max_chunks: int) -> int:
    """The number of chunks a prompt of so many tokens is split into: 1 for an empty prompt, at most `max_chunks`."""
    return min(max(1, math.ceil(tokens / (tokenizer.model_max_length - 2))), max_chunks)


def split_tokens(tokenizer: CLIPTokenizer, prompt: str, max_chunks: int) -> list[list[int]]:
    """The token ids of each chunk with start and end, at most 77, not padded.

    What does not fit into `max_chunks` is cut off at the end.
    """
    length = tokenizer.model_max_length - 2
    ids = _token_ids(tokenizer, prompt)[: max_chunks * length]
    starts = range(0, max(len(ids), 1), length)
    return [[tokenizer.bos_token_id, *ids[start : start + length], tokenizer.eos_token_id] for start in starts]


def _token_ids(tokenizer: CLIPTokenizer, prompt: str) -> list[int]:
    # verbose=False: the tokenizer would warn of more than 77 tokens, which is no problem here.
    return tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False).input_ids

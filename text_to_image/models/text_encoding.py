"""Prompts of any length → text embeddings, the same for training and generation.

CLIP reads 77 tokens: start, 75 of the prompt, end. A longer prompt is split into chunks of 75 tokens. Each chunk is
encoded separately with its own start and end, and the results are joined along the sequence; the UNet's
cross-attention takes any length. A prompt gets only as many chunks as it needs; in a batch, shorter ones are padded
and masked.
"""

from collections.abc import Sequence

import torch
from transformers import CLIPTextModel, CLIPTokenizer


def count_tokens(tokenizer: CLIPTokenizer, prompt: str) -> int:
    """Without the start and end tokens."""
    return len(_token_ids(tokenizer, prompt))


def count_chunks(tokenizer: CLIPTokenizer, prompt: str, max_chunks: int) -> int:
    """The number of chunks `prompt` is split into: 1 for an empty prompt, at most `max_chunks`."""
    return len(tokenize_chunks(tokenizer, prompt, max_chunks))


def tokenize_chunks(tokenizer: CLIPTokenizer, prompt: str, max_chunks: int) -> torch.Tensor:
    """(chunks, 77) token ids; what does not fit into `max_chunks` is cut off at the end."""
    length = tokenizer.model_max_length
    ids = _token_ids(tokenizer, prompt)[: max_chunks * (length - 2)]
    starts = range(0, max(len(ids), 1), length - 2)
    return torch.tensor([_chunk(tokenizer, ids[start : start + length - 2], length) for start in starts])


def _chunk(tokenizer: CLIPTokenizer, prompt_ids: list[int], length: int) -> list[int]:
    ids = [tokenizer.bos_token_id, *prompt_ids, tokenizer.eos_token_id]
    return ids + [tokenizer.pad_token_id] * (length - len(ids))


def _token_ids(tokenizer: CLIPTokenizer, prompt: str) -> list[int]:
    # verbose=False: the tokenizer would warn of more than 77 tokens, which is no problem here.
    return tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False).input_ids


def encode_prompt(tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, prompt: str, max_chunks: int) -> torch.Tensor:
    """(chunks * 77, D) last hidden states, chunks joined along the sequence; no attention mask, as in SD."""
    return encode_prompts(tokenizer, text_encoder, [prompt], max_chunks)[0]


@torch.no_grad()
def encode_prompts(
    tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, prompts: Sequence[str], max_chunks: int
) -> list[torch.Tensor]:
    """`encode_prompt` of each, with the chunks of all prompts in one batch."""
    token_ids = [tokenize_chunks(tokenizer, prompt, max_chunks) for prompt in prompts]
    hidden_states = text_encoder(torch.cat(token_ids).to(text_encoder.device))[0]
    return [chunks.flatten(0, 1) for chunks in hidden_states.split([len(ids) for ids in token_ids])]


def join_embeddings(embeddings: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A batch of (L_i, D) embeddings as (B, L, D), L the longest, and a mask (B, L) of 1 (read) and 0 (padding).

    The mask is None if all have one length, which keeps the UNet on its faster path without a mask. A masked prompt
    gives the same result as the prompt alone.
    """
    lengths = [len(embedding) for embedding in embeddings]
    if len(set(lengths)) == 1:
        return torch.stack(list(embeddings)), None
    hidden_states = torch.nn.utils.rnn.pad_sequence(list(embeddings), batch_first=True)
    positions = torch.arange(max(lengths), device=hidden_states.device)
    mask = positions[None, :] < torch.tensor(lengths, device=hidden_states.device)[:, None]
    return hidden_states, mask.to(hidden_states.dtype)

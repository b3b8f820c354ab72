"""Prompts of any length → text embeddings, the same for training and inference.

CLIP reads 77 tokens: start, 75 of the prompt, end. A longer prompt is cut into chunks of 75 tokens that are encoded
separately, each with its own start and end, and joined along the sequence, which the UNet's cross-attention reads at
any length. A prompt uses only as many chunks as it needs; in a batch the shorter ones are padded and masked.
"""

from collections.abc import Sequence

import torch


def count_tokens(tokenizer, prompt: str) -> int:
    return len(_token_ids(tokenizer, prompt))


def count_chunks(tokenizer, prompt: str, max_chunks: int) -> int:
    """How many chunks `prompt` is given: one for an empty prompt, at most `max_chunks`."""
    return len(tokenize_chunks(tokenizer, prompt, max_chunks))


def tokenize_chunks(tokenizer, prompt: str, max_chunks: int) -> torch.Tensor:
    """(chunks, 77) token ids; what does not fit into `max_chunks` is cut off at the end."""
    length = tokenizer.model_max_length
    words = _token_ids(tokenizer, prompt)[: max_chunks * (length - 2)]
    starts = range(0, max(len(words), 1), length - 2)
    return torch.tensor([_chunk(tokenizer, words[start : start + length - 2], length) for start in starts])


def _chunk(tokenizer, words: list[int], length: int) -> list[int]:
    ids = [tokenizer.bos_token_id, *words, tokenizer.eos_token_id]
    return ids + [tokenizer.pad_token_id] * (length - len(ids))


def _token_ids(tokenizer, prompt: str) -> list[int]:
    # verbose=False: the tokenizer would warn of more than 77 tokens, which is no problem here.
    return tokenizer(prompt, add_special_tokens=False, truncation=False, verbose=False).input_ids


def encode_prompt(tokenizer, text_encoder, prompt: str, max_chunks: int) -> torch.Tensor:
    """(chunks * 77, D) last hidden states, chunks joined along the sequence; no attention mask, as in SD."""
    return encode_prompts(tokenizer, text_encoder, [prompt], max_chunks)[0]


@torch.no_grad()
def encode_prompts(tokenizer, text_encoder, prompts: Sequence[str], max_chunks: int) -> list[torch.Tensor]:
    """The same of each, (chunks * 77, D), the chunks of all of them read together."""
    token_ids = [tokenize_chunks(tokenizer, prompt, max_chunks) for prompt in prompts]
    hidden_states = text_encoder(torch.cat(token_ids).to(text_encoder.device))[0]
    return [own.flatten(0, 1) for own in hidden_states.split([len(ids) for ids in token_ids])]


def join_embeddings(embeddings: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A batch of (L_i, D) embeddings as (B, L, D), L the longest, and a mask (B, L) of 1 (read) and 0 (padding).

    The mask is None where all have one length, so that such a batch takes the plain path. A masked prompt gives what
    it gives alone.
    """
    lengths = [len(embedding) for embedding in embeddings]
    if len(set(lengths)) == 1:
        return torch.stack(list(embeddings)), None
    hidden_states = torch.nn.utils.rnn.pad_sequence(list(embeddings), batch_first=True)
    positions = torch.arange(max(lengths), device=hidden_states.device)
    mask = positions[None, :] < torch.tensor(lengths, device=hidden_states.device)[:, None]
    return hidden_states, mask.to(hidden_states.dtype)

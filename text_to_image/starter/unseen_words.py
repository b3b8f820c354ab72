"""Embeddings for the words that no caption of the pre-training used."""

import numpy as np
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from describe import caption_of
from render_garments import sample_spec


@torch.no_grad()
def initialise_unseen_words(text_encoder: CLIPTextModel, seen: set[int], rounds: int = 8) -> None:
    """Gives words that no caption used embeddings to which the encoder responds, so that fine-tuning can teach them.

    The encoder responds to words for garments and colours alone. With a random embedding of the right length its
    output is nearly that of the empty caption. So an unseen word becomes a random mixture of words with a strong
    response, mixed again until its own response is strong enough.
    """
    embeddings, generator = text_encoder.get_input_embeddings().weight, torch.Generator().manual_seed(0)
    seen_ids = torch.tensor(sorted(seen))
    responses = response_to_words(text_encoder, seen_ids)
    strong = embeddings[seen_ids[responses >= responses.quantile(0.85)]].clone()
    threshold = 0.5 * responses.quantile(0.85)
    weak = torch.tensor(sorted(set(range(len(embeddings) - 2)) - seen))  # the last two mark start and end
    for _ in range(rounds):
        shares = torch.rand(len(weak), len(strong), generator=generator) ** 12  # so that two or three words dominate
        embeddings[weak] = shares / shares.sum(1, keepdim=True) @ strong * 1.2
        weak = weak[response_to_words(text_encoder, weak) < threshold]
        if not len(weak):
            break


def response_to_words(text_encoder: CLIPTextModel, words: torch.Tensor) -> torch.Tensor:
    """(N,) how far each word alone moves the encoder's output from that of the empty caption."""
    bos, eos = text_encoder.config.bos_token_id, text_encoder.config.eos_token_id
    ends = torch.full((len(words), 3), eos)
    ids = torch.cat([torch.full((len(words), 1), bos), words[:, None], ends], 1)
    empty = torch.tensor([[bos, eos, eos, eos, eos]])
    hidden = torch.cat([text_encoder(part)[0] for part in ids.split(512)])
    return (hidden - text_encoder(empty)[0]).flatten(1).norm(dim=1)


def token_ids_in_captions(tokenizer: CLIPTokenizer) -> set[int]:
    texts = [caption_of(sample_spec(i), np.random.default_rng(i), w) for i in range(1500) for w in (0, 12, 150)]
    return {i for ids in tokenizer(texts, verbose=False).input_ids for i in ids}

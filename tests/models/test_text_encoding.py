"""Prompts of any length: one chunk is as in CLIP, more are joined, and a batch gives the same as each prompt alone."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from models.loading import load_text_encoder, load_tokenizer, load_unet
from models.text_encoding import count_tokens, encode_prompt, encode_prompts, join_embeddings, tokenize_chunks

SHORT, LONG = "denim jeans", "a red t-shirt, " * 20


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(tiny_model)


@pytest.fixture(scope="module")
def text_encoder(tiny_model):
    return load_text_encoder(tiny_model)


@pytest.mark.parametrize("prompt", ["", SHORT, "laid flat " * 37])
def test_a_prompt_of_one_chunk_is_tokenised_as_by_clip(tokenizer, prompt):
    clip = tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(tokenize_chunks(tokenizer, prompt, 3), clip)


def test_truncation_to_one_chunk_is_clips_own(tokenizer):
    clip = tokenizer(LONG, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(tokenize_chunks(tokenizer, LONG, 1), clip)


def test_every_token_of_a_long_prompt_is_in_exactly_one_chunk(tokenizer):
    ids = tokenizer(LONG, add_special_tokens=False).input_ids
    chunks = tokenize_chunks(tokenizer, LONG, 3)
    assert len(ids) == count_tokens(tokenizer, LONG) > 75
    assert len(chunks) == -(-len(ids) // 75)
    assert (chunks[:, 0] == tokenizer.bos_token_id).all()
    assert torch.cat([chunk[1:76] for chunk in chunks])[: len(ids)].tolist() == ids
    assert len(tokenize_chunks(tokenizer, LONG, 2)) == 2


def test_exactly_75_tokens_are_one_chunk_and_76_are_two(tokenizer):
    assert [len(tokenize_chunks(tokenizer, "denim " * number, 3)) for number in (75, 76)] == [1, 2]


def test_chunks_are_encoded_separately_and_joined(tokenizer, text_encoder):
    embedding = encode_prompt(tokenizer, text_encoder, LONG, 3)
    first, *_ = tokenize_chunks(tokenizer, LONG, 3)
    with torch.no_grad():
        alone = text_encoder(first[None])[0][0]
    assert embedding.shape == (len(tokenize_chunks(tokenizer, LONG, 3)) * 77, 16)
    assert torch.allclose(embedding[:77], alone, atol=1e-6)


def test_prompts_encoded_together_equal_prompts_encoded_alone(tokenizer, text_encoder):
    prompts = [SHORT, LONG, ""]
    together = encode_prompts(tokenizer, text_encoder, prompts, 3)
    for prompt, embedding in zip(prompts, together, strict=True):
        assert torch.allclose(embedding, encode_prompt(tokenizer, text_encoder, prompt, 3), atol=1e-5)


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
def test_in_a_batch_of_mixed_lengths_each_prompt_gives_the_same_as_alone(
    tiny_model, tokenizer, text_encoder, processor
):
    unet = load_unet(tiny_model).eval()
    unet.set_attn_processor(processor())
    embeddings = [encode_prompt(tokenizer, text_encoder, prompt, 3) for prompt in (SHORT, LONG)]
    hidden_states, mask = join_embeddings(embeddings)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = unet(latents, 500, hidden_states, encoder_attention_mask=mask).sample
        alone = [unet(latents[i : i + 1], 500, embeddings[i][None]).sample for i in (0, 1)]
        unmasked = unet(latents, 500, hidden_states).sample
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    assert not torch.allclose(unmasked[0], alone[0][0], atol=1e-5)


def test_prompts_of_one_length_need_no_mask(tokenizer, text_encoder):
    embeddings = [encode_prompt(tokenizer, text_encoder, prompt, 3) for prompt in (SHORT, "")]
    hidden_states, mask = join_embeddings(embeddings)
    assert mask is None and hidden_states.shape == (2, 77, 16)

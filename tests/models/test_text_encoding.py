"""Prompts of any length: one chunk is as in CLIP, more are joined, and a batch gives the same as each prompt alone."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from models.conditions import Conditions
from models.loading import load_prompt_encoder, load_unet
from models.text_encoding import count_tokens, split_tokens
from plain_conditions import ANY_SIZE

SHORT, LONG = "denim jeans", "a red t-shirt, " * 20


@pytest.fixture(scope="module")
def encoder(tiny_model):
    return load_prompt_encoder(tiny_model, 3)


@pytest.fixture(scope="module")
def tokenizer(encoder):
    return encoder.tokenizer


@pytest.mark.parametrize("prompt", ["", SHORT, "laid flat " * 37])
def test_a_prompt_of_one_chunk_is_tokenised_as_by_clip(encoder, tokenizer, prompt):
    clip = tokenizer(prompt, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(encoder._pad([split_tokens(tokenizer, prompt, 3)], tokenizer.pad_token_id), clip)


def test_truncation_to_one_chunk_is_clips_own(tokenizer):
    clip = tokenizer(LONG, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    assert split_tokens(tokenizer, LONG, 1) == clip.tolist()


def test_every_token_of_a_long_prompt_is_in_exactly_one_chunk(tokenizer):
    ids = tokenizer(LONG, add_special_tokens=False).input_ids
    chunks = split_tokens(tokenizer, LONG, 3)
    assert len(ids) == count_tokens(tokenizer, LONG) > 75
    assert len(chunks) == -(-len(ids) // 75)
    assert all(chunk[0] == tokenizer.bos_token_id and chunk[-1] == tokenizer.eos_token_id for chunk in chunks)
    assert [token for chunk in chunks for token in chunk[1:-1]] == ids
    assert len(split_tokens(tokenizer, LONG, 2)) == 2


def test_exactly_75_tokens_are_one_chunk_and_76_are_two(tokenizer):
    assert [len(split_tokens(tokenizer, "denim " * number, 3)) for number in (75, 76)] == [1, 2]


def test_chunks_are_encoded_separately_and_joined(encoder, tokenizer):
    hidden_states, pooled = encoder(LONG)
    first, *others = split_tokens(tokenizer, LONG, 3)
    with torch.no_grad():
        alone = encoder.text_encoders[0].model(torch.tensor([first])).last_hidden_state[0]
    assert hidden_states.shape == ((1 + len(others)) * 77, 16) and pooled.shape == (0,)
    assert torch.allclose(hidden_states[:77], alone, atol=1e-6)


def test_prompts_encoded_together_equal_prompts_encoded_alone(encoder):
    prompts = [SHORT, LONG, ""]
    for prompt, embedding in zip(prompts, encoder.encode(prompts), strict=True):
        assert torch.allclose(embedding.hidden_states, encoder(prompt).hidden_states, atol=1e-5)


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0])
def test_in_a_batch_of_mixed_lengths_each_prompt_gives_the_same_as_alone(tiny_model, encoder, processor):
    unet = load_unet(tiny_model).eval()
    unet.set_attn_processor(processor())
    embeddings = encoder.encode([SHORT, LONG])
    conditions = Conditions.join(embeddings, [ANY_SIZE] * 2)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together = unet(latents, 500, **conditions.unet_inputs()).sample
        alone = [unet(latents[i : i + 1], 500, embeddings[i].hidden_states[None]).sample for i in (0, 1)]
        unmasked = unet(latents, 500, conditions.hidden_states).sample
    assert torch.allclose(together, torch.cat(alone), atol=1e-5)
    assert not torch.allclose(unmasked[0], alone[0][0], atol=1e-5)


def test_prompts_of_one_length_need_no_mask(encoder):
    conditions = Conditions.join(encoder.encode([SHORT, ""]), [ANY_SIZE] * 2)
    assert conditions.attention_mask is None and conditions.hidden_states.shape == (2, 77, 16)


def test_a_unet_that_reads_text_alone_gives_the_same_bits_with_sizes_and_without(tiny_model, encoder):
    unet, latents = load_unet(tiny_model).eval(), torch.randn(1, 4, 8, 8)
    embedding = encoder(SHORT)
    with torch.no_grad():
        told = unet(latents, 500, **Conditions.join([embedding], [(512, 768, 0, 64, 8, 8)]).unet_inputs()).sample
        assert torch.equal(told, unet(latents, 500, embedding.hidden_states[None]).sample)

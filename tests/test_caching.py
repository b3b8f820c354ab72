"""What is stored before training is what encoding at every step would give."""

import pytest
import torch

from batches import DATA, PRIOR
from caching import add_prior, encode_texts, store_encodings
from data import load_picture, read_pictures
from draws import SampleId, Source, draw_sample
from models import load_text_encoder, load_tokenizer, load_vae
from prompts import encode_prompt


@pytest.fixture(scope="module")
def models(tiny_model):
    return load_vae(tiny_model), load_tokenizer(tiny_model), load_text_encoder(tiny_model)


@pytest.fixture(scope="module")
def pictures(captioned_folder):
    return read_pictures(captioned_folder, short_captions=True)


@pytest.fixture(scope="module")
def encodings(models, pictures):
    vae, tokenizer, text_encoder = models
    texts = encode_texts(tokenizer, text_encoder, [text for p in pictures for text in p.captions], 3, quiet=True)
    return store_encodings(pictures, 72, 56, vae, texts, quiet=True)


def draws(pictures, numbers, dropout=0.0):
    source = Source([picture.forms for picture in pictures], (4, 36, 28))
    return [draw_sample(0, SampleId(DATA, number), source, dropout, 1000) for number in numbers]


@torch.no_grad()
def test_stored_latents_are_the_vaes_own_sample(models, pictures, encodings):
    vae, *_ = models
    drawn = draws(pictures, range(4))
    latents, _, _ = encodings.encode(drawn)
    for latent, draw in zip(latents, drawn, strict=True):
        posterior = vae.encode(load_picture(pictures[draw.picture].path, 72, 56)[None]).latent_dist
        live = (posterior.mean + posterior.std * draw.posterior_noise) * vae.config.scaling_factor
        assert torch.allclose(latent, live[0], atol=1e-5)


def test_a_picture_gives_another_sample_of_its_posterior_every_time(pictures, encodings):
    drawn = [draw for draw in draws(pictures, range(30)) if draw.picture == 0][:2]
    first, second = encodings.encode(drawn)[0]
    assert not torch.allclose(first, second)


def test_stored_text_is_the_text_encoders_own(models, pictures, encodings):
    _, tokenizer, text_encoder = models
    drawn = draws(pictures, range(6))
    _, hidden_states, mask = encodings.encode(drawn)
    for row, draw in enumerate(drawn):
        live = encode_prompt(tokenizer, text_encoder, draw.caption, 3)
        assert torch.allclose(hidden_states[row, : len(live)], live, atol=1e-5)
        assert mask is None or mask[row].sum() == len(live)


def test_a_dropped_caption_is_the_empty_one(models, pictures, encodings):
    _, tokenizer, text_encoder = models
    _, hidden_states, mask = encodings.encode(draws(pictures, range(2), dropout=1.0))
    empty = encode_prompt(tokenizer, text_encoder, "", 3)
    assert mask is None and torch.allclose(hidden_states, torch.stack([empty, empty]), atol=1e-5)


def test_the_bases_own_pictures_have_no_spread(encodings):
    latent = torch.randn(4, 36, 28)
    add_prior(encodings, [latent])
    source = Source([((next(iter(encodings.text)),),)], (4, 36, 28))
    drawn = [draw_sample(0, SampleId(PRIOR, number), source, 0.0, 1000) for number in range(2)]
    assert torch.equal(encodings.encode(drawn)[0], torch.stack([latent, latent]))

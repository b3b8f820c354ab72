"""What is stored before training is what encoding at every step would give, and never stale."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from conftest import write_captioned_folder
from data.augmentation import NO_AUGMENTATION, list_augmentations
from data.buckets import ImageToEncode
from data.dataset import read_pictures
from data.images import load_pixel_values
from models.loading import load_text_encoder, load_tokenizer, load_vae
from models.text_encoding import encode_prompt
from tiny_model import make_tiny_model
from training.batches import DATA, PRIOR
from training.encodings import CachedEncodings, LiveEncodings, TextEncoding, is_intact, store_latents, store_texts
from training.samples import SampleKey, SampleSettings, SampleSource, make_sample

SIZES = [(72, 56), (72, 56), (64, 64)]
ALL = slice(None)
BOTH = list_augmentations(True, 0.0)


@pytest.fixture(scope="module")
def vae(tiny_model):
    return load_vae(tiny_model)


@pytest.fixture(scope="module")
def text(tiny_model):
    return TextEncoding(load_tokenizer(tiny_model), load_text_encoder(tiny_model), 3, "hash")


def subjects_of(folder, augmentations=NO_AUGMENTATION):
    pictures = read_pictures(folder, short_captions=True)
    return {
        (DATA, i): ImageToEncode(picture, size, augmentations, "lanczos")
        for i, (picture, size) in enumerate(zip(pictures, SIZES, strict=True))
    }


@pytest.fixture(scope="module")
def images_to_encode(captioned_folder):
    return subjects_of(captioned_folder, BOTH)


def store(folder, subjects, vae, text, shares=(ALL,)) -> CachedEncodings:
    for share in shares:
        encodings = CachedEncodings(folder)
        store_latents(encodings, subjects, vae, "hash", share, workers=0, quiet=True)
        store_texts(encodings, [s.captions for s in subjects.values()] + [[""]], text, share, quiet=True)
    return encodings


@pytest.fixture(scope="module")
def encodings(tmp_path_factory, subjects, vae, text):
    return store(tmp_path_factory.mktemp("cache"), subjects, vae, text)


def draws(subjects, numbers, dropout=0.0, flip=False, indices=range(3)):
    own = [subjects[DATA, i] for i in indices]
    shapes = tuple((4, s.size[0] // 2, s.size[1] // 2) for s in own)
    source = SampleSource(
        [s.picture.caption_groups for s in own], shapes, [BOTH if flip else NO_AUGMENTATION] * len(own)
    )
    return [make_sample(0, SampleKey(DATA, number), source, SampleSettings(dropout, 1000)) for number in numbers]


@torch.no_grad()
def test_stored_latents_are_the_vaes_own_sample_also_mirrored(vae, subjects, encodings):
    drawn = draws(subjects, range(12), flip=True)
    assert {draw.augmentation.mirrored for draw in drawn} == {True, False}
    for draw in drawn:
        pixels = load_pixel_values(subjects[DATA, draw.picture].picture.path, *SIZES[draw.picture])[None]
        posterior = vae.encode(pixels.flip(-1) if draw.augmentation.mirrored else pixels).latent_dist
        live = (posterior.mean + posterior.std * draw.posterior_noise) * vae.config.scaling_factor
        assert torch.allclose(encodings.latent(draw), live[0], atol=1e-5)


def test_stored_equals_live(vae, text, subjects, encodings):
    live = LiveEncodings(Path("unused"), subjects, vae, text)
    for encoded in (encodings, live):
        encoded.prior = [torch.ones(4, 36, 28)]
    for draw in draws(subjects, range(20), dropout=0.2, flip=True):
        for kept, now in zip(encodings.encode([draw]), live.encode([draw]), strict=True):
            assert (kept is None and now is None) or torch.allclose(kept, now, atol=1e-5)


def test_a_picture_gives_another_sample_of_its_posterior_every_time(subjects, encodings):
    drawn = [draw for draw in draws(subjects, range(30)) if draw.picture == 0][:2]
    first, second = encodings.encode(drawn)[0]
    assert not torch.allclose(first, second)


def test_a_batch_of_long_and_short_captions_is_padded_and_masked(text, subjects, encodings):
    drawn = draws(subjects, range(6), indices=range(2))
    _, hidden_states, mask = encodings.encode(drawn)
    for row, draw in enumerate(drawn):
        live = encode_prompt(text.tokenizer, text.text_encoder, draw.caption, 3)
        assert torch.allclose(hidden_states[row, : len(live)], live, atol=1e-5)
        assert mask is None or mask[row].sum() == len(live)


def test_the_bases_own_pictures_have_no_spread(subjects, encodings):
    latent = torch.randn(4, 36, 28)
    encodings.prior = [latent]
    source = SampleSource([((next(iter(encodings.texts)),),)], ((4, 36, 28),), [NO_AUGMENTATION])
    drawn = [make_sample(0, SampleKey(PRIOR, number), source, SampleSettings(0.0, 1000)) for number in range(2)]
    assert torch.equal(encodings.encode(drawn)[0], torch.stack([latent, latent]))


# --- files ----------------------------------------------------------------------------------------------------------


class Counting:
    """A VAE that counts how many pictures it has encoded."""

    def __init__(self, vae):
        self.vae, self.config, self.device, self.dtype, self.encoded = vae, vae.config, vae.device, vae.dtype, 0

    def encode(self, pixel_values):
        self.encoded += len(pixel_values)
        return self.vae.encode(pixel_values)


def encoded_anew(folder, subjects, vae, text) -> int:
    counting = Counting(vae)
    store(folder, subjects, counting, text)
    return counting.encoded


def test_nothing_is_encoded_twice_and_what_has_changed_is_encoded_again(tmp_path, vae, text):
    data = write_captioned_folder(tmp_path / "data")
    cache = tmp_path / "cache"
    assert encoded_anew(cache, subjects_of(data), vae, text) == 3
    assert encoded_anew(cache, subjects_of(data), vae, text) == 0
    assert encoded_anew(cache, subjects_of(data, BOTH), vae, text) == 6
    Image.new("RGB", (48, 64), "green").save(data / "11 (1).JPG", format="JPEG")
    assert encoded_anew(cache, subjects_of(data), vae, text) == 1
    store_latents(CachedEncodings(cache), subjects_of(data), counting := Counting(vae), "another VAE", ALL, 0, True)
    assert counting.encoded == 3


def test_a_changed_caption_is_never_served_stale(tmp_path, vae, text):
    data = write_captioned_folder(tmp_path / "data", {"1.jpg": "a red t-shirt", "2.jpg": "a", "3.jpg": "the"})
    store(tmp_path / "cache", subjects_of(data), vae, text)
    rows = (data / "metadata.jsonl").read_text()
    (data / "metadata.jsonl").write_text(rows.replace("red", "white"))
    encodings = store(tmp_path / "cache", subjects_of(data), vae, text)
    live = encode_prompt(text.tokenizer, text.text_encoder, "a white t-shirt", 3)
    assert torch.allclose(encodings.text("a white t-shirt"), live, atol=1e-6)
    assert "a red t-shirt" not in encodings.texts


@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_file_is_made_again(tmp_path, vae, text, subjects, encodings, damage):
    cache = shutil.copytree(encodings.folder, tmp_path / "cache")
    for path in [next((cache / kind).glob("*.safetensors")) for kind in ("latents", "text")]:
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        damaged = {"cut": content[:-9], "flip": content}.get(damage)
        path.write_bytes(damaged) if damaged else path.unlink()
        assert not is_intact(path)
    again = store(cache, subjects, vae, text)
    assert all(is_intact(path) for path in cache.rglob("*.safetensors"))
    draw = draws(subjects, [0])[0]
    assert torch.allclose(again.latent(draw), encodings.latent(draw), atol=1e-5)


def test_processes_share_the_work(tmp_path, vae, text, subjects, encodings):
    for share in (slice(0, None, 2), slice(1, None, 2)):
        counting = Counting(vae)
        store(tmp_path, subjects, counting, text, [share])
        assert counting.encoded in (2, 4)
    names = lambda folder: sorted(path.name for path in folder.rglob("*.safetensors"))  # noqa: E731
    assert names(tmp_path) == names(encodings.folder)


class Elsewhere(str):
    """What torch takes for the CPU, and `store_latents` for a GPU."""

    type = "cuda"


def test_pictures_that_are_encoded_together_keep_their_own_views(tmp_path, vae, subjects, encodings):
    together = SimpleNamespace(device=Elsewhere("cpu"), dtype=vae.dtype, config=vae.config, encode=vae.encode)
    store_latents(again := CachedEncodings(tmp_path), subjects, together, "hash", ALL, 0, True)
    for draw in draws(subjects, range(12), flip=True):
        assert torch.allclose(again.latent(draw), encodings.latent(draw), atol=1e-5)


def test_another_text_encoders_or_lengths_embeddings_are_never_served(tmp_path, text):
    caption = "the white " * 60
    other = load_text_encoder(make_tiny_model(tmp_path / "model", seed=1))
    readers = text, TextEncoding(text.tokenizer, other, 3, "another"), replace(text, max_chunks=1)
    for reader in readers:
        store_texts(cached := CachedEncodings(tmp_path / "cache"), [[caption]], reader, ALL, quiet=True)
        [live] = reader.encode([caption])
        assert cached.text(caption).shape == live.shape and torch.allclose(cached.text(caption), live, atol=1e-6)
    shapes = {tuple(reader.encode([caption])[0].shape) for reader in readers}
    assert len(shapes) == 2

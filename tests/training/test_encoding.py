"""What is stored before training is what encoding at every step would give, and never stale."""

import os
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from captioned_folder import write_captioned_folder
from data.augmentation import NO_AUGMENTATION, list_augmentations
from data.buckets import ImageToEncode
from data.dataset import read_pictures, with_masks
from data.images import load_pixel_values
from models.conditions import whole_picture
from models.folders import ModelShape
from models.loading import load_prompt_encoder, load_vae
from models.text_encoding import PromptEncoder, TextEmbedding
from runs.disk_space import latents_bytes
from runtime import tensor_shards
from runtime.errors import WorkError
from tiny_model import make_tiny_model
from training.encoding import CaptionEncoder, Encodings, LivePosteriors, PictureCache, TextCache, picture_key
from training.samples import DATA, PRIOR, SampleKey, SampleSettings, SampleSource, make_sample

HALF_PRECISION = 2e-3  # of what is stored in fp16, where values are about 1
SIZES = [(72, 56), (72, 56), (64, 64)]
BOTH = list_augmentations(True, 0.0)


@pytest.fixture(scope="module")
def vae(tiny_model):
    return load_vae(tiny_model)


@pytest.fixture(scope="module")
def text(tiny_model):
    return CaptionEncoder(load_prompt_encoder(tiny_model, 3))


def images_of(folder, augmentations=NO_AUGMENTATION):
    pictures = read_pictures(folder, short_captions=True)
    return {
        (DATA, i): ImageToEncode(picture, size, augmentations, "lanczos")
        for i, (picture, size) in enumerate(zip(pictures, SIZES, strict=True))
    }


def share_of(process: int, processes: int):
    return lambda count: range(process, count, processes)


ALL = share_of(0, 1)


@pytest.fixture(scope="module")
def images(captioned_folder):
    return images_of(captioned_folder, BOTH)


def store(folder, images, vae, text, share=ALL) -> Encodings:
    groups = [image.captions for image in images.values()] + [[""]]
    return Encodings(
        store_texts(folder / "captions", groups, text, share), store_pictures(folder / "pictures", images, vae, share)
    )


def store_texts(folder, groups, text, share=ALL, text_hash="hash") -> TextCache:
    cache = TextCache(folder, groups, text_hash, text.prompt_encoder.max_chunks)
    cache.store(lambda: text, share, quiet=True)
    return cache


def store_pictures(folder, images, vae, share=ALL, vae_hash="hash") -> PictureCache:
    cache = PictureCache(folder, images, vae_hash)
    cache.store(lambda: vae, share, workers=0, quiet=True)
    return cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def encodings(cache, images, vae, text):
    return store(cache, images, vae, text)


def make_samples(images, numbers, dropout=0.0, flip=False, indices=range(3)):
    own = [images[DATA, i] for i in indices]
    shapes = tuple((4, s.size[0] // 2, s.size[1] // 2) for s in own)
    source = SampleSource(
        [s.picture.caption_groups for s in own],
        shapes,
        [BOTH if flip else NO_AUGMENTATION] * len(own),
        [s.time_ids for s in own],
    )
    return [make_sample(0, SampleKey(DATA, number), source, SampleSettings(dropout, 1000)) for number in numbers]


@torch.no_grad()
def test_stored_latents_are_the_vaes_own_sample_also_mirrored(vae, images, encodings):
    samples = make_samples(images, range(12), flip=True)
    assert {sample.augmentation.mirrored for sample in samples} == {True, False}
    for sample in samples:
        pixels = load_pixel_values(images[DATA, sample.picture].picture.path, *SIZES[sample.picture])[None]
        posterior = vae.encode(pixels.flip(-1) if sample.augmentation.mirrored else pixels).latent_dist
        live = (posterior.mean + posterior.std * sample.posterior_noise) * vae.config.scaling_factor
        assert torch.allclose(encodings.latent(sample), live[0], atol=1e-5)


def test_stored_equals_live(vae, text, images, encodings):
    live = Encodings(text, LivePosteriors(images, vae))
    for sample in make_samples(images, range(20), dropout=0.2, flip=True):
        kept, now = encodings.encode([sample]), live.encode([sample])
        assert torch.allclose(kept.latents, now.latents, atol=1e-5)
        assert torch.equal(kept.conditions.time_ids, now.conditions.time_ids)
        for name in ("hidden_states", "pooled"):
            assert torch.equal(getattr(kept.conditions, name), getattr(now.conditions, name).half().float())


def test_a_picture_gives_another_sample_of_its_posterior_every_time(images, encodings):
    samples = [sample for sample in make_samples(images, range(30)) if sample.picture == 0][:2]
    first, second = encodings.encode(samples)[0]
    assert not torch.allclose(first, second)


def test_a_batch_of_long_and_short_captions_is_padded_and_masked(text, images, encodings):
    samples = make_samples(images, range(6), indices=range(2))
    conditions = encodings.encode(samples).conditions
    for row, sample in enumerate(samples):
        live = text(sample.caption).hidden_states
        assert torch.allclose(conditions.hidden_states[row, : len(live)], live, atol=HALF_PRECISION)
        assert conditions.attention_mask is None or conditions.attention_mask[row].sum() == len(live)


@pytest.mark.parametrize(("factor", "stored"), [(1e6, torch.float32), (1.0, torch.float16), (float("nan"), None)])
def test_text_is_kept_in_fp16_unless_it_is_too_large_and_refused_where_it_is_not_finite(
    tmp_path, text, monkeypatch, factor, stored
):
    encode = PromptEncoder.encode

    def scaled(self, prompts):
        return [TextEmbedding(*(tensor * factor for tensor in embedding)) for embedding in encode(self, prompts)]

    monkeypatch.setattr(PromptEncoder, "encode", scaled)
    if stored is None:
        with pytest.raises(WorkError, match="not finite for 'denim jeans'"):
            store_texts(tmp_path, [["denim jeans"]], text)
        return
    found = store_texts(tmp_path, [["denim jeans"]], text)("denim jeans")
    assert torch.allclose(found.hidden_states, text("denim jeans").hidden_states, rtol=1e-3, atol=HALF_PRECISION)
    [file] = tmp_path.glob("*.safetensors")
    assert [tensor.dtype for tensor in load_file(file).values()] == [stored]


def test_the_bases_own_pictures_have_no_spread(images, encodings):
    latent = torch.randn(4, 36, 28)
    encodings = replace(encodings, prior=[latent])
    source = SampleSource(
        [((encodings.text.groups[0][0],),)], ((4, 36, 28),), [NO_AUGMENTATION], [whole_picture(72, 56)]
    )
    samples = [make_sample(0, SampleKey(PRIOR, number), source, SampleSettings(0.0, 1000)) for number in range(2)]
    assert torch.equal(encodings.encode(samples)[0], torch.stack([latent, latent]))


# --- masks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def masked(tmp_path):
    """The data of a folder whose first picture has a mask, and what is encoded of it, with 32 augmentations each."""
    data = write_captioned_folder(tmp_path / "data")
    mask = Image.new("L", (48, 64))
    mask.paste(255, (0, 8, 20, 50))
    mask.save(data / "11 (1).mask.png")
    return data, with_masks_of(data)


def with_masks_of(data):
    images = images_of(data, list_augmentations(True, 0.3))
    pictures = with_masks(data, [image.picture for image in images.values()], from_alpha=False)
    return {key: replace(image, picture=p) for (key, image), p in zip(images.items(), pictures, strict=True)}


def samples_of(images, numbers):
    """Any augmentation of any picture."""
    shapes = tuple((4, image.size[0] // 2, image.size[1] // 2) for image in images.values())
    augmentations = [image.augmentations for image in images.values()]
    captions, time_ids = zip(*((s.picture.caption_groups, s.time_ids) for s in images.values()), strict=True)
    source = SampleSource(captions, shapes, augmentations, time_ids)
    return [make_sample(0, SampleKey(DATA, number), source, SampleSettings(0.0, 1000)) for number in numbers]


def test_stored_masks_are_the_live_ones_and_stay_when_they_are_kept(tmp_path, vae, text, masked):
    images, samples = masked[1], samples_of(masked[1], range(12))
    stored = store(tmp_path / "cache", images, vae, text)
    stored = replace(stored, mask=stored.posterior.mask, unmasked_weight=0.25)
    live = LivePosteriors(images, vae)
    live = Encodings(text, live, mask=live.mask, unmasked_weight=0.25)
    kept = stored.keep(samples, [sample.caption for sample in samples])
    shutil.rmtree(tmp_path / "cache")
    for sample in samples:
        weights = [reader.encode([sample]).loss_weights for reader in (kept, live)]
        assert [own is None for own in weights] == [sample.picture != 0] * 2
        assert weights[0] is None or torch.equal(*weights) and weights[0].mean().item() == pytest.approx(1)
    shown = [sample.augmentation for sample in samples if sample.picture == 0]
    assert len(shown) == 4 and {a.mirrored for a in shown} == {True, False}


def test_the_room_that_latents_and_masks_take_is_foretold(tmp_path, vae, masked):
    images = masked[1]
    store_pictures(tmp_path, images, vae)
    stored = sum(tensor.nbytes for file in tmp_path.glob("*.safetensors") for tensor in load_file(file).values())
    assert stored == latents_bytes(images.values(), ModelShape(2, 2, 4, 64, (1,)))


def test_the_bases_own_pictures_have_no_mask(tmp_path, vae, masked):
    sample = replace(samples_of(masked[1], [0])[0], stream=PRIOR, picture=0)
    assert LivePosteriors(masked[1], vae).mask(sample) is None
    assert PictureCache(tmp_path, masked[1], "hash").mask(sample) is None


def test_a_mask_enters_the_key_of_its_picture_alone_and_a_changed_one_is_never_served_stale(masked):
    data, images = masked
    without = images_of(data, list_augmentations(True, 0.3))
    keys = [[picture_key(image, "hash") for image in those.values()] for those in (images, without)]
    assert [with_mask == plain for with_mask, plain in zip(*keys, strict=True)] == [False, True, True]
    Image.new("L", (48, 64), 255).save(data / "11 (1).mask.png")
    assert picture_key(with_masks_of(data)[DATA, 0], "hash") not in (keys[0][0], keys[1][0])


# --- files ----------------------------------------------------------------------------------------------------------


class Counting:
    """A VAE that counts how many pictures it has encoded."""

    def __init__(self, vae):
        self.vae, self.config, self.device, self.dtype, self.encoded = vae, vae.config, vae.device, vae.dtype, 0

    def encode(self, pixel_values):
        self.encoded += len(pixel_values)
        return self.vae.encode(pixel_values)


def encoded_anew(folder, images, vae, text) -> int:
    counting = Counting(vae)
    store(folder, images, counting, text)
    return counting.encoded


def test_nothing_is_encoded_twice_and_what_has_changed_is_encoded_again(tmp_path, vae, text):
    data = write_captioned_folder(tmp_path / "data")
    cache = tmp_path / "cache"
    assert encoded_anew(cache, images_of(data), vae, text) == 3
    assert encoded_anew(cache, images_of(data), vae, text) == 0
    assert encoded_anew(cache, images_of(data, BOTH), vae, text) == 6
    Image.new("RGB", (48, 64), "green").save(data / "11 (1).JPG", format="JPEG")
    assert encoded_anew(cache, images_of(data), vae, text) == 1
    store_pictures(cache / "pictures", images_of(data), counting := Counting(vae), vae_hash="another VAE")
    assert counting.encoded == 3


def test_a_changed_caption_is_never_served_stale(tmp_path, vae, text):
    data = write_captioned_folder(tmp_path / "data", {"1.jpg": "a red t-shirt", "2.jpg": "a", "3.jpg": "the"})
    store(tmp_path / "cache", images_of(data), vae, text)
    rows = (data / "metadata.jsonl").read_text()
    (data / "metadata.jsonl").write_text(rows.replace("red", "white"))
    encodings = store(tmp_path / "cache", images_of(data), vae, text)
    found, live = encodings.text("a white t-shirt"), text("a white t-shirt")
    assert torch.allclose(found.hidden_states, live.hidden_states, atol=HALF_PRECISION)
    assert "a red t-shirt" not in encodings.text


def write_half_and_die(tensors, path, *_):
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)


def test_encoding_goes_on_where_kill_minus_9_ended_it(tmp_path, vae, text, images, monkeypatch):
    monkeypatch.setattr(tensor_shards, "MOST_ROWS", 1)
    first, second, _ = images
    store_pictures(tmp_path / "pictures", {first: images[first]}, vae)
    child = os.fork()
    if not child:  # dies when half of the second one's shard is written
        monkeypatch.setattr(tensor_shards, "save_file", write_half_and_die)
        with tensor_shards.ShardWriter(tmp_path / "pictures") as writer:
            writer.add({f"{picture_key(images[second], 'hash')} 0": torch.zeros(2, 4, 36, 28)})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert list((tmp_path / "pictures").glob(".*.part"))
    assert encoded_anew(tmp_path, images, vae, text) == 2 * len(BOTH)
    assert not list((tmp_path / "pictures").glob(".*"))


def test_processes_share_the_work(tmp_path, vae, text, images, encodings, cache):
    for share in (share_of(0, 2), share_of(1, 2)):
        counting = Counting(vae)
        store(tmp_path, images, counting, text, share)
        assert counting.encoded in (2, 4)
    assert encoded_anew(tmp_path, images, vae, text) == 0


class Elsewhere(str):
    """What torch takes for the CPU, and `pixels_at_once` for a GPU."""

    type = "cuda"


def test_pictures_that_are_encoded_together_keep_their_own_augmentations(tmp_path, vae, images, encodings):
    together = SimpleNamespace(device=Elsewhere("cpu"), dtype=vae.dtype, config=vae.config, encode=vae.encode)
    posteriors = store_pictures(tmp_path, images, together)
    again = Encodings(encodings.text, posteriors)
    for sample in make_samples(images, range(12), flip=True):
        assert torch.allclose(again.latent(sample), encodings.latent(sample), atol=1e-5)


def test_another_text_encoders_or_lengths_embeddings_are_never_served(tmp_path, text):
    caption = "the white " * 60
    other = load_prompt_encoder(make_tiny_model(tmp_path / "model", seed=1), 3)
    shorter = replace(text, prompt_encoder=replace(text.prompt_encoder, max_chunks=1))
    readers = {"hash": text, "another": CaptionEncoder(other), "hash ": shorter}
    for text_hash, reader in readers.items():
        cached = store_texts(tmp_path / "cache", [[caption]], reader, text_hash=text_hash.strip())
        found, live = cached(caption).hidden_states, reader(caption).hidden_states
        assert found.shape == live.shape and torch.allclose(found, live, atol=HALF_PRECISION)
    shapes = {tuple(reader(caption).hidden_states.shape) for reader in readers.values()}
    assert len(shapes) == 2

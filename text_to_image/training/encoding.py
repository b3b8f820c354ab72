"""Latents, masks and text embeddings that training reads: encoded once and kept on disk, or at every step.

A latent is kept as mean and standard deviation, so that every step still samples the posterior anew. What is kept is
named by the hash of all that it follows from, so a changed picture, caption or model is never served stale.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cache
from pathlib import Path

import torch
from accelerate.utils import gather_object
from diffusers import AutoencoderKL
from torch.utils.data import DataLoader

from data.augmentation import Augmentation, apply_augmentation
from data.buckets import ImageToEncode
from data.file_facts import FILE
from data.images import load_pixel_values
from data.masks import latent_mask, loss_weights
from models.conditions import Conditions
from models.folders import fingerprint_model, text_parts
from models.loading import load_prompt_encoder, load_vae
from models.text_encoding import PromptEncoder, TextEmbedding
from runs.records import cache_folder
from runtime.devices import loading_workers
from runtime.errors import InputChanged, WorkError
from runtime.files import hash_key
from runtime.processes import run_on_all
from runtime.progress import progress_bar
from runtime.tensor_shards import ShardWriter, TensorShards
from training.prior import prior_latents
from training.samples import PRIOR, Encoded, Sample
from training.setup import PreparedRun

STORED = "fp16"  # text embeddings in the cache, a part of their key
PICTURES, CAPTIONS = "pictures", "captions"  # folders in the cache
OLD_FOLDERS = ("latents", "text")  # of earlier versions, a file for each picture
PIXELS_AT_ONCE = 1 << 19  # per VAE batch on a GPU: two pictures of 512 x 512 take 2 GB

ImageKey = tuple[str, int]  # stream and number
Images = Mapping[ImageKey, ImageToEncode]
Posterior = tuple[torch.Tensor, torch.Tensor]  # mean and standard deviation of the scaled latents, (C, h, w) each


@dataclass(frozen=True)
class Encodings:
    """Latents and embeddings of samples, which `text` and `posterior` read from the cache or compute."""

    text: Callable[[str], TextEmbedding]  # caption -> its embedding
    posterior: Callable[[Sample], Posterior]
    prior: Sequence[torch.Tensor] = ()  # the base's own pictures: latents (C, h, w), already sampled
    mask: Callable[[Sample], torch.Tensor | None] = lambda _: None  # (1, h, w), 1 where the loss counts
    unmasked_weight: float = 0.0

    def encode(self, samples: Sequence[Sample]) -> Encoded:
        """The tensors of samples of one shape."""
        latents = torch.stack([self.latent(sample) for sample in samples])
        texts = [self.text(sample.caption) for sample in samples]
        conditions = Conditions.join(texts, [sample.time_ids for sample in samples])
        return Encoded(latents, conditions, loss_weights(list(map(self.mask, samples)), self.unmasked_weight))

    def latent(self, sample: Sample) -> torch.Tensor:
        """(C, h, w)"""
        if sample.stream == PRIOR:
            return self.prior[sample.picture]
        mean, std = self.posterior(sample)
        return mean + std * sample.posterior_noise

    def keep(self, samples: Iterable[Sample], prompts: Iterable[str]) -> "Encodings":
        """Those of these samples and prompts alone, read now and kept in memory: whatever becomes of the files."""
        by_picture = {(sample.stream, sample.picture, sample.augmentation): sample for sample in samples}
        posteriors = {key: self.posterior(sample) for key, sample in by_picture.items()}
        captions = dict.fromkeys([*(sample.caption for sample in by_picture.values()), *prompts])
        texts = {caption: self.text(caption) for caption in captions}
        masks = {key: self.mask(sample) for key, sample in by_picture.items()}
        return replace(
            self,
            text=texts.__getitem__,
            posterior=lambda sample: posteriors[sample.stream, sample.picture, sample.augmentation],
            mask=lambda sample: masks[sample.stream, sample.picture, sample.augmentation],
        )


def encode_dataset(run: PreparedRun) -> Encodings:
    """Encodes what is not cached yet, generates the prior images, and returns the readers of both.

    The processes share the work, and all raise InputChanged where a picture is not what it was, WorkError where the
    encodings cannot be written or read. Without --no_cache the VAE and the text encoder are freed when this returns.
    """
    folder = cache_folder(run.args, run.folder)
    text, posterior = _encode_once(run, folder) if run.args.cache else run_on_all(lambda: _encode_live(run))
    prior = prior_latents(run, folder, text)
    return Encodings(text, posterior, prior, posterior.mask, run.args.unmasked_weight)


def _encode_live(run: PreparedRun) -> tuple["CaptionEncoder", "LivePosteriors"]:
    return _load_text(run), LivePosteriors(run.plan.images_to_encode, _load_vae(run))


def _encode_once(run: PreparedRun, folder: Path) -> tuple["TextCache", "PictureCache"]:
    plan, args, quiet = run.plan, run.args, not run.is_main
    prompts = ["", *plan.prior_prompts, *run.validation_prompts]
    groups = [image.captions for image in plan.images_to_encode.values()] + [[prompt] for prompt in prompts]
    text_hash = fingerprint_model(plan.base, text_parts(plan.base))
    pictures = PictureCache(folder / PICTURES, plan.images_to_encode, fingerprint_model(plan.base, ("vae",)))
    texts = TextCache(folder / CAPTIONS, groups, text_hash, args.max_token_chunks)
    workers = loading_workers(args.dataloader_num_workers, run.accelerator.device)
    if run.is_main:
        plan.facts.save(folder / FILE)
        _note_old_folders(folder)
    plan.facts.clear()

    def store() -> None:
        pictures.store(lambda: _load_vae(run), run.process_share, workers, quiet)
        texts.store(lambda: _load_text(run), run.process_share, quiet)

    run_on_all(store)
    for shards in (pictures.shards, texts.shards):  # what one process sees another may not see yet
        shards.refresh(name for names in gather_object([shards.file_names]) for name in names)
    return texts, pictures


def _note_old_folders(folder: Path) -> None:
    if old := [str(folder / name) for name in OLD_FOLDERS if (folder / name).is_dir()]:
        print(f"{' and '.join(old)}: encodings of an earlier version, not read any more; remove them", flush=True)


def _load_vae(run: PreparedRun) -> AutoencoderKL:
    return load_vae(run.plan.base).to(run.accelerator.device)


def _load_text(run: PreparedRun) -> "CaptionEncoder":
    return CaptionEncoder(load_prompt_encoder(run.plan.base, run.args.max_token_chunks, run.accelerator.device))


# --- Captions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaptionEncoder:
    """The base's prompt encoder, its embeddings in fp32."""

    prompt_encoder: PromptEncoder

    def __call__(self, caption: str) -> TextEmbedding:
        return self.encode([caption])[0]

    def encode(self, captions: Sequence[str]) -> list[TextEmbedding]:
        """Of each, read together. WorkError where one is not finite."""
        embeddings = [embedding.to(torch.float32).to("cpu") for embedding in self.prompt_encoder.encode(captions)]
        if broken := [caption for caption, each in zip(captions, embeddings, strict=True) if not each.is_finite()]:
            raise WorkError(f"the model's text encoder gives numbers that are not finite for {broken[0]!r}")
        return embeddings


class TextCache:
    """Embeddings on disk; one is read when a step needs it, so a large data set takes no memory.

    The captions of each group are read together: all variants of a picture's captions, or one prompt.
    """

    def __init__(self, folder: Path, groups: Iterable[Sequence[str]], text_hash: str, max_chunks: int):
        """`text_hash`: the fingerprint of the base's tokenizers and text encoders."""
        self.shards = TensorShards(folder)
        self.groups = list(dict.fromkeys(map(tuple, groups)))
        self.keys = [hash_key("text", STORED, text_hash, max_chunks, *group) for group in self.groups]
        self._group_of = {caption: number for number, group in enumerate(self.groups) for caption in group}

    def __call__(self, caption: str) -> TextEmbedding:
        """In fp32."""
        number = self._group_of[caption]
        name = f"{self.keys[number]} {self.groups[number].index(caption)}"
        hidden_states = self.shards.read(name)
        pooled = self.shards.read(f"{name} pooled") if self.shards.has([f"{name} pooled"])[0] else torch.empty(0)
        return TextEmbedding(hidden_states, pooled).to(torch.float32)

    def __contains__(self, caption: str) -> bool:
        return caption in self._group_of

    def store(
        self, load_encoder: Callable[[], CaptionEncoder], process_share: Callable[[int], range], quiet: bool
    ) -> None:
        """Encodes those of this process's share that are missing. Raises WorkError."""
        there = self.shards.has([f"{key} 0" for key in self.keys])
        missing = [number for number in process_share(len(self.keys)) if not there[number]]
        if not missing:
            return
        encoder = load_encoder()
        with ShardWriter(self.shards.folder) as writer:
            for number in progress_bar(missing, desc="encoding captions", unit="picture", disable=quiet, leave=False):
                tensors = stored_tensors(encoder.encode(self.groups[number]))
                writer.add({f"{self.keys[number]} {name}": tensor for name, tensor in tensors.items()})
        self.shards.refresh(writer.written)


def stored_tensors(embeddings: Sequence[TextEmbedding]) -> dict[str, torch.Tensor]:
    """In fp16, by the ends of the names that `TextCache` reads; in fp32 where one is too large for fp16."""
    tensors: dict[str, torch.Tensor] = {}
    for number, embedding in enumerate(embeddings):
        half = embedding.to(torch.float16)
        stored = half if half.is_finite() else embedding
        tensors[str(number)] = stored.hidden_states
        if len(stored.pooled):
            tensors[f"{number} pooled"] = stored.pooled
    return tensors


# --- Pictures -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LivePosteriors:
    """Pictures that are opened and encoded at every step."""

    images: Images
    vae: AutoencoderKL

    def __call__(self, sample: Sample) -> Posterior:
        pixel_values = load_image(self.images[sample.stream, sample.picture])
        return encode_pixels(self.vae, apply_augmentation(pixel_values, sample.augmentation)[None])[0]

    def mask(self, sample: Sample) -> torch.Tensor | None:
        """(1, h, w); None where the picture has none."""
        image = self.images.get((sample.stream, sample.picture))
        if image is None or image.picture.mask is None:
            return None
        return latent_mask(image.picture.mask.load(*image.size), sample.augmentation, sample.noise.shape[-2:])


class PictureCache:
    """Posteriors and masks of pictures on disk, in all their augmentations."""

    def __init__(self, folder: Path, images: Images, vae_hash: str):
        """`vae_hash`: the VAE's fingerprint."""
        self.shards, self.images = TensorShards(folder), images
        self.keys = {which: picture_key(image, vae_hash) for which, image in images.items()}

    def __call__(self, sample: Sample) -> Posterior:
        mean, std = self.shards.read(self._name(sample)).unbind()
        return mean, std

    def mask(self, sample: Sample) -> torch.Tensor | None:
        """(1, h, w); None where the picture has none."""
        image = self.images.get((sample.stream, sample.picture))
        if image is None or image.picture.mask is None:
            return None
        return self.shards.read(_mask_name(self._name(sample)))

    def _name(self, sample: Sample) -> str:
        which = sample.stream, sample.picture
        return f"{self.keys[which]} {self.images[which].augmentations.index(sample.augmentation)}"

    def store(
        self, load_vae: Callable[[], AutoencoderKL], process_share: Callable[[int], range], workers: int, quiet: bool
    ) -> None:
        """Encodes those of this process's share that are missing. Raises InputChanged and WorkError."""
        there = self.shards.has([f"{key} 0" for key in self.keys.values()])
        keys = list(self.keys)
        missing = [keys[i] for i in process_share(len(keys)) if not there[i]]
        if not missing:
            return
        vae = load_vae()
        bar = progress_bar(total=len(missing), desc="encoding pictures", unit="picture", disable=quiet, leave=False)
        with bar, ShardWriter(self.shards.folder) as writer:
            for batch, pixel_values in _prefetch_pixels(self.images, missing, workers, pixels_at_once(vae)):
                for which, tensors in zip(batch, self._encode(vae, batch, pixel_values), strict=True):
                    writer.add({f"{self.keys[which]} {name}": tensor for name, tensor in tensors.items()})
                bar.update(len(batch))
        self.shards.refresh(writer.written)

    def _encode(
        self, vae: AutoencoderKL, batch: Sequence[ImageKey], pixel_values: torch.Tensor
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Of each of the pictures (B, 3, H, W) of one size, posterior and mask in every augmentation."""
        augmentations = self.images[batch[0]].augmentations
        augmented = [apply_augmentation(picture, a) for picture in pixel_values for a in augmentations]
        size = max(1, pixels_at_once(vae) // pixel_values[0, 0].numel())
        batches = (torch.stack(augmented[at : at + size]) for at in range(0, len(augmented), size))
        posteriors = iter([posterior for part in batches for posterior in encode_pixels(vae, part)])
        for which in batch:
            stored = {str(i): torch.stack(next(posteriors)) for i in range(len(augmentations))}
            yield stored | _masks_to_store(self.images[which], stored["0"].shape[-2:])


def picture_key(image: ImageToEncode, vae_hash: str) -> str:
    """What the encodings of a picture are known by: the hash of all that they follow from."""
    mask_parts = [image.picture.mask.key] if image.picture.mask else []
    key_parts = (image.picture.sha256, *image.size, _augmentations_repr(image.augmentations), image.interpolation)
    return hash_key("latents", vae_hash, *key_parts, *mask_parts)


@cache
def _augmentations_repr(augmentations: tuple[Augmentation, ...]) -> str:
    return repr([astuple(augmentation) for augmentation in augmentations])


def pixels_at_once(vae: AutoencoderKL) -> int:
    """On a CPU one picture at a time: no slower, and the result does not depend on which others were missing."""
    return 1 if vae.device.type == "cpu" else PIXELS_AT_ONCE


def _mask_name(name: str) -> str:
    """Beside the latents `name`, of an augmentation."""
    return f"{name} mask"


def _masks_to_store(image: ImageToEncode, latent_size: Sequence[int]) -> dict[str, torch.Tensor]:
    """The picture's mask in every augmentation, by the name in the file; empty where it has none."""
    if image.picture.mask is None:
        return {}
    mask = image.picture.mask.load(*image.size)
    return {_mask_name(str(i)): latent_mask(mask, a, latent_size) for i, a in enumerate(image.augmentations)}


def _prefetch_pixels(
    images: Images, keys: Sequence[ImageKey], workers: int, pixels_at_once: int
) -> Iterator[tuple[list[ImageKey], torch.Tensor]]:
    """Batches of pictures of one size and the same augmentations, (B, 3, H, W), read ahead by `workers` processes.

    Raises InputChanged in the turn of the picture that it is about.
    """
    by_size: dict[tuple, list[ImageKey]] = {}
    for key in keys:
        by_size.setdefault((images[key].size, images[key].augmentations), []).append(key)
    batches = []
    for (size, augmentations), group in by_size.items():
        length = max(1, pixels_at_once // (size[0] * size[1] * len(augmentations)))
        batches += [group[at : at + length] for at in range(0, len(group), length)]
    loader = DataLoader(_Pixels(images, batches), batch_size=None, num_workers=min(workers, len(batches)))
    for batch, pixel_values in zip(batches, loader, strict=True):
        if isinstance(pixel_values, InputChanged):
            raise pixel_values
        yield batch, pixel_values


@dataclass(frozen=True)
class _Pixels(torch.utils.data.Dataset):
    """Batches of pixel values by their number, as a DataLoader asks for them.

    InputChanged is returned: raised, the DataLoader would put a traceback into its message.
    """

    images: Images
    batches: Sequence[Sequence[ImageKey]]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> torch.Tensor | InputChanged:
        try:
            return torch.stack([load_image(self.images[key]) for key in self.batches[number]])
        except InputChanged as error:
            return error


def load_image(image: ImageToEncode) -> torch.Tensor:
    """(3, H, W) in [-1, 1], not augmented. Raises InputChanged where the file is not what it was, or not a picture."""
    try:
        return load_pixel_values(image.picture.open(), *image.size, image.interpolation)
    except ValueError as fault:
        raise InputChanged(
            f"{image.picture.path}: {fault}; put the picture back, and run the same command again"
        ) from None


@torch.no_grad()
def encode_pixels(vae: AutoencoderKL, pixel_values: torch.Tensor) -> list[Posterior]:
    """(B, 3, H, W) in [-1, 1] -> mean and standard deviation (C, h, w) of each one's latents, scaled for the UNet."""
    posterior = vae.encode(pixel_values.to(vae.device, vae.dtype)).latent_dist
    scale = vae.config.scaling_factor
    mean, std = ((values * scale).float().cpu() for values in (posterior.mean, posterior.std))
    return list(zip(mean, std, strict=True))

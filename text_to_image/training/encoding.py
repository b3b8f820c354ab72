"""Latents, masks and text embeddings that training reads: encoded once and kept on disk, or at every step.

A latent is kept as mean and standard deviation, so that every step still samples the posterior anew. Every file is
named by the hash of all that it follows from, so a changed picture, caption or model is never served stale.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch.utils.data import DataLoader

from data.augmentation import Augmentation, apply_augmentation
from data.buckets import ImageToEncode
from data.images import load_pixel_values
from data.masks import latent_mask, loss_weights
from models.conditions import Conditions
from models.folders import fingerprint_model, text_parts
from models.loading import load_prompt_encoder, load_vae
from models.text_encoding import PromptEncoder, TextEmbedding
from runtime.devices import loading_workers
from runtime.errors import InputChanged, WorkError
from runtime.files import hash_key
from runtime.processes import run_on_all
from runtime.progress import progress_bar
from runtime.tensor_files import is_intact, read_tensor, read_tensors, save_with_checksum
from training.prior import prior_latents
from training.samples import PRIOR, Encoded, Sample
from training.setup import PreparedRun

STORED = "fp16"  # text embeddings in the cache, a part of their key
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

    The processes share the work, and all raise InputChanged where a picture is not what it was. Without --no_cache
    the VAE and the text encoder are freed when this returns.
    """
    cache_folder = run.args.latents_cache_dir or run.folder / "cache"
    encode = _encode_once if run.args.cache else _encode_live
    text, posterior = run_on_all(lambda: encode(run, cache_folder))
    prior = prior_latents(run, cache_folder, text)
    return Encodings(text, posterior, prior, posterior.mask, run.args.unmasked_weight)


def _encode_live(run: PreparedRun, _: Path) -> tuple["CaptionEncoder", "LivePosteriors"]:
    return CaptionEncoder.load(run), LivePosteriors(run.plan.images_to_encode, _load_vae(run))


def _encode_once(run: PreparedRun, cache_folder: Path) -> tuple["CachedTexts", "CachedPosteriors"]:
    plan, args, quiet = run.plan, run.args, not run.is_main
    latents = LatentCache(cache_folder / "latents", _load_vae(run), fingerprint_model(plan.base, ("vae",)))
    workers = loading_workers(args.dataloader_num_workers, run.accelerator.device)
    posteriors = latents.store(plan.images_to_encode, run.process_share, workers, quiet)
    prompts = ["", *plan.prior_prompts, *run.validation_prompts]
    groups = [image.captions for image in plan.images_to_encode.values()] + [[prompt] for prompt in prompts]
    texts = store_texts(cache_folder / "text", groups, CaptionEncoder.load(run), run.process_share, quiet)
    return texts, posteriors


def _load_vae(run: PreparedRun) -> AutoencoderKL:
    return load_vae(run.plan.base).to(run.accelerator.device)


# --- Captions -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaptionEncoder:
    """The base's prompt encoder; `fingerprint` is the hash of its tokenizers and text encoders."""

    prompt_encoder: PromptEncoder
    fingerprint: str

    @classmethod
    def load(cls, run: PreparedRun) -> "CaptionEncoder":
        prompt_encoder = load_prompt_encoder(run.plan.base, run.args.max_token_chunks, run.accelerator.device)
        return cls(prompt_encoder, fingerprint_model(run.plan.base, text_parts(run.plan.base)))

    def __call__(self, caption: str) -> TextEmbedding:
        """In fp32."""
        return self.encode([caption])[0]

    def encode(self, captions: Sequence[str]) -> list[TextEmbedding]:
        """Of each, read together, in fp32. WorkError where one is not finite."""
        embeddings = [embedding.to(torch.float32).to("cpu") for embedding in self.prompt_encoder.encode(captions)]
        if broken := [caption for caption, each in zip(captions, embeddings, strict=True) if not each.is_finite()]:
            raise WorkError(f"the model's text encoder gives numbers that are not finite for {broken[0]!r}")
        return embeddings

    def key(self, captions: Sequence[str]) -> str:
        """The cache key of a group of captions."""
        encoder = self.prompt_encoder
        return hash_key("text", STORED, self.fingerprint, str(encoder.dtype), encoder.max_chunks, *captions)


@dataclass(frozen=True)
class CachedTexts:
    """Embeddings in files; one is read when a step needs it, so a large data set takes no memory."""

    locations: dict[str, tuple[Path, str]] = field(default_factory=dict)  # caption -> its file, its name in there

    def __call__(self, caption: str) -> TextEmbedding:
        """In fp32."""
        path, name = self.locations[caption]
        return TextEmbedding(*read_tensors(path, name, f"{name} pooled")).to(torch.float32)


def store_texts(
    folder: Path, groups: Iterable[Sequence[str]], encoder: CaptionEncoder, process_share: Callable[[int], range],
    quiet: bool,
) -> CachedTexts:  # fmt: skip
    """A file for the captions of each group: all variants of a picture's captions, or one prompt."""
    files = {group: folder / f"{encoder.key(group)}.safetensors" for group in dict.fromkeys(map(tuple, groups))}
    unique = list(files)
    missing = [unique[i] for i in process_share(len(unique)) if not is_intact(files[unique[i]])]
    for group in progress_bar(
        missing, desc="encoding captions", unit="picture", disable=quiet or not missing, leave=False
    ):
        save_with_checksum(files[group], stored_tensors(encoder.encode(group)))
    return CachedTexts({caption: (path, str(i)) for group, path in files.items() for i, caption in enumerate(group)})


def stored_tensors(embeddings: Sequence[TextEmbedding]) -> dict[str, torch.Tensor]:
    """In fp16, by the names that `CachedTexts` reads; in fp32 where one is too large for fp16."""
    tensors: dict[str, torch.Tensor] = {}
    for number, embedding in enumerate(embeddings):
        half = embedding.to(torch.float16)
        stored = half if half.is_finite() else embedding
        tensors |= {str(number): stored.hidden_states, f"{number} pooled": stored.pooled}
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


@dataclass(frozen=True)
class CachedPosteriors:
    """Posteriors and masks in files, a file for each picture with all its augmentations."""

    locations: dict[tuple[str, int, Augmentation], tuple[Path, str]] = field(default_factory=dict)
    masked: frozenset[ImageKey] = frozenset()  # the pictures that have a mask

    def __call__(self, sample: Sample) -> Posterior:
        mean, std = read_tensor(*self.locations[sample.stream, sample.picture, sample.augmentation]).unbind()
        return mean, std

    def mask(self, sample: Sample) -> torch.Tensor | None:
        """(1, h, w); None where the picture has none."""
        if (sample.stream, sample.picture) not in self.masked:
            return None
        file, name = self.locations[sample.stream, sample.picture, sample.augmentation]
        return read_tensor(file, _mask_name(name))


def _mask_name(name: str) -> str:
    """In a file of latents, beside those of an augmentation."""
    return f"mask {name}"


@dataclass(frozen=True)
class LatentCache:
    """A folder of encoded pictures; `vae_hash` is the VAE's fingerprint."""

    folder: Path
    vae: AutoencoderKL
    vae_hash: str

    @property
    def pixels_at_once(self) -> int:
        """On a CPU one picture at a time: no slower, and the result does not depend on which others were missing."""
        return 1 if self.vae.device.type == "cpu" else PIXELS_AT_ONCE

    def store(
        self, images: Images, process_share: Callable[[int], range], workers: int, quiet: bool
    ) -> CachedPosteriors:
        """Encodes those of this process's share that the folder lacks; returns the reader of all."""
        files = {key: self.file(image) for key, image in images.items()}
        keys = list(images)
        missing = [keys[i] for i in process_share(len(keys)) if not is_intact(files[keys[i]])]
        bar = progress_bar(
            total=len(missing), desc="encoding pictures", unit="picture", disable=quiet or not missing, leave=False
        )
        with bar:
            for batch, pixel_values in _prefetch_pixels(images, missing, workers, self.pixels_at_once):
                self._encode([images[key] for key in batch], pixel_values)
                bar.update(len(batch))
        return CachedPosteriors(
            {(*key, a): (files[key], str(i)) for key in keys for i, a in enumerate(images[key].augmentations)},
            frozenset(key for key in keys if images[key].picture.mask),
        )

    def file(self, image: ImageToEncode) -> Path:
        augmentations = repr([astuple(augmentation) for augmentation in image.augmentations])  # numbers, no names
        mask_parts = [image.picture.mask.key] if image.picture.mask else []
        key_parts = (image.picture.sha256, *image.size, augmentations, image.interpolation)
        return (
            self.folder
            / f"{hash_key('latents', self.vae_hash, str(self.vae.dtype), *key_parts, *mask_parts)}.safetensors"
        )

    def _encode(self, images: Sequence[ImageToEncode], pixel_values: torch.Tensor) -> None:
        """Pictures (B, 3, H, W) of one size, a file for each with its posterior and mask in every augmentation."""
        augmentations = images[0].augmentations
        augmented = [apply_augmentation(picture, a) for picture in pixel_values for a in augmentations]
        size = max(1, self.pixels_at_once // pixel_values[0, 0].numel())
        batches = (torch.stack(augmented[at : at + size]) for at in range(0, len(augmented), size))
        posteriors = iter([posterior for batch in batches for posterior in encode_pixels(self.vae, batch)])
        for image in images:
            stored = {str(i): torch.stack(next(posteriors)) for i in range(len(augmentations))}
            save_with_checksum(self.file(image), stored | _masks_to_store(image, stored["0"].shape[-2:]))


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

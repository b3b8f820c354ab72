"""Batches for the pre-training of the starter's UNet and text encoder, and the losses on them.

Most batches are pictures with whole captions. Focused batches train a single attribute: the corner of the marker,
front or back, or the fold. In whole captions these words were drowned out by colour and kind, and after 220 k samples
the UNet's output did not depend on them at all. So in focused batches they are the whole caption or its end, and the
loss counts where they show.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPTokenizer

from describe import FOLDS, NAMES, VIEWS, caption_of, marker_phrase, place, subject
from pictures import PAIRS, SETS, pair_specs
from pretrain_vae import latents_file
from render_garments import Spec, mirrored_spec
from sentences import OPENINGS, among_others, attribute_sentences, scattered_caption

NO_MARKER = ("no reference marker", "no marker", "without a marker", "There is no reference marker.")
CHUNK = 77  # tokens that the text encoder reads at once: 75, and one each for start and end


class CaptionSampler:
    """Random captions as token ids. All captions of a batch have the same number of chunks, so none needs a mask."""

    # number of chunks, share of the batches, numbers of words to choose from
    LENGTHS = ((1, 0.74, (0, 12, 12, 12, 30, 45)), (2, 0.16, (70, 85, 100)), (3, 0.10, (125, 140, 150)))

    def __init__(self, tokenizer: CLIPTokenizer, dropout: float = 0.12):
        self.tokenizer, self.dropout = tokenizer, dropout

    def sample(self, specs: list[Spec], rng: np.random.Generator) -> torch.Tensor:
        """Token ids (B, chunks, 77) of whole captions, some of them empty."""
        chunks, _, words = self.LENGTHS[rng.choice(3, p=[share for _, share, _ in self.LENGTHS])]
        texts = [caption_of(spec, rng, int(rng.choice(words))) for spec in specs]
        if chunks == 1:
            texts = ["" if rng.random() < self.dropout else text for text in texts]
        return self.encode(texts, chunks)

    def encode(self, texts: list[str], chunks: int = 1) -> torch.Tensor:
        """Token ids (B, chunks, 77) of these texts."""
        ids = self.tokenizer(texts, add_special_tokens=False, verbose=False).input_ids  # one call: each costs 0.2 ms
        return torch.tensor([self._chunks(text_ids, chunks) for text_ids in ids])

    def _chunks(self, ids: list[int], chunks: int) -> list[list[int]]:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        rows = [ids[i * 75 : (i + 1) * 75] for i in range(chunks)]
        return [[bos, *row] + [eos] * (CHUNK - 1 - len(row)) for row in rows]


def encode_text(text_encoder, input_ids: torch.Tensor) -> torch.Tensor:
    """(B, chunks, 77) token ids -> (B, chunks * 77, width): chunks are encoded one by one and concatenated."""
    hidden = text_encoder(input_ids.flatten(0, 1))[0]
    return hidden.reshape(len(input_ids), -1, hidden.shape[-1])


@dataclass(frozen=True)
class Picks:
    """Which pictures a batch shows: rows of one set in one size, and whether each is mirrored."""

    of: str  # one of SETS, or PAIRS
    size: int  # index into SIZES
    rows: torch.Tensor  # (B,)
    mirrored: torch.Tensor  # (B,) 0 or 1


class PictureSampler:
    """Chooses random pictures of one size, and pairs that differ in front and back alone."""

    def __init__(self, size: int, count: int, shares: dict[str, float]):
        """`shares`: how often a batch takes its pictures from each of SETS."""
        self.size, self.shares = size, shares
        self.specs = {name: SETS[name](size, count) for name in shares}
        self.pair_specs = pair_specs(size, count)
        # How many pictures there are so far, counted from the first; a GPU starts before all are rendered.
        self.ready = {**{name: len(specs) for name, specs in self.specs.items()}, PAIRS: 2 * len(self.pair_specs)}

    def sample(self, count: int, rng: np.random.Generator, of: str | None = None) -> tuple[list[Spec], Picks]:
        """Random pictures of one set, half of them mirrored."""
        of = of or str(rng.choice(list(self.shares), p=list(self.shares.values())))
        rows, mirrored = rng.integers(self.ready[of], size=count), rng.integers(2, size=count)
        specs = [_mirrored_if(self.specs[of][i], flip) for i, flip in zip(rows, mirrored, strict=True)]
        return specs, Picks(of, self.size, torch.from_numpy(rows), torch.from_numpy(mirrored))

    def sample_pairs(self, count: int, rng: np.random.Generator) -> tuple[list[Spec], Picks]:
        """The fronts of random garments, then the backs of the same."""
        pairs, mirrored = rng.integers(self.ready[PAIRS] // 2, size=count // 2), rng.integers(2, size=count // 2)
        garments = [_mirrored_if(self.pair_specs[i], flip) for i, flip in zip(pairs, mirrored, strict=True)]
        specs = [replace(spec, view=view) for view in ("front", "back") for spec in garments]
        rows = torch.from_numpy(np.concatenate([2 * pairs, 2 * pairs + 1]))
        return specs, Picks(PAIRS, self.size, rows, torch.from_numpy(np.tile(mirrored, 2)))


class LatentTable:
    """The latents of all pictures of one size, (N, 2, 4, h, w) for each set; the second axis is the mirror image."""

    def __init__(self, tables: dict[str, torch.Tensor]):
        self.tables = tables

    @classmethod
    def load(cls, work: Path, size: int, scale: int, sets: Iterable[str]) -> "LatentTable":
        files = {name: latents_file(work, size, scale, name) for name in (*sets, PAIRS)}
        # Copy on write: torch warns about arrays that it may not write to.
        return cls({name: torch.from_numpy(np.load(file, mmap_mode="c")) for name, file in files.items()})

    def __getitem__(self, picks: Picks) -> torch.Tensor:
        """(B, 4, h, w), on the device of the table."""
        table = self.tables[picks.of]
        rows, mirrored = (i.to(table.device, non_blocking=True) for i in (picks.rows, picks.mirrored))
        return table[rows, mirrored].float()


def _mirrored_if(spec: Spec, mirrored: int) -> Spec:
    return mirrored_spec(spec) if mirrored else spec


# --- batches --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingBatch:
    """What one optimisation step learns from, without the latents."""

    picks: Picks
    input_ids: torch.Tensor  # (B, chunks, 77)
    timesteps: tuple[int, int]  # the range they are drawn from, the end not included
    area: str  # where the loss counts, one of AREAS
    min_snr: bool = False  # whether the loss is weighted by timestep too
    noise_repeats: int = 1  # so many equal parts of the batch share their noise and timesteps
    view_signs: torch.Tensor | None = None  # (B,) 1 where the caption says front, -1 where back, 0 where neither


def make_batch(
    captions: CaptionSampler,
    pictures: PictureSampler,
    size: int,
    focus_shares: dict[str, float],
    rng: np.random.Generator,
) -> TrainingBatch:
    """`size` pictures with whole captions, or with probabilities `focus_shares` a focused batch."""
    focus = rng.choice([*focus_shares, "none"], p=[*focus_shares.values(), 1 - sum(focus_shares.values())])
    if focus == "view":
        return view_batch(captions, *pictures.sample_pairs(size, rng), rng)
    if focus == "fold":
        return fold_batch(captions, *pictures.sample(size, rng, "trousers"), rng)
    if focus == "corner":
        return corner_batch(captions, *pictures.sample(size, rng, "pictures"), rng)
    specs, picks = pictures.sample(size, rng)
    if focus == "sentence":
        return sentence_batch(captions, specs, picks, rng)
    return TrainingBatch(picks, captions.sample(specs, rng), (0, 1000), "corners more", min_snr=True)


def corner_batch(captions: CaptionSampler, specs: list[Spec], picks: Picks, rng: np.random.Generator) -> TrainingBatch:
    """In which corner the marker is; the loss counts in the corners alone."""
    phrases = [marker_phrase(s, rng) if s.marker else str(rng.choice(NO_MARKER)) for s in specs]
    texts = [_alone_or_last(s, phrase, rng) for s, phrase in zip(specs, phrases, strict=True)]
    return TrainingBatch(picks, captions.encode(texts), (400, 1000), "corners")


def sentence_batch(
    captions: CaptionSampler, specs: list[Spec], picks: Picks, rng: np.random.Generator
) -> TrainingBatch:
    """Attributes in sentences of their own, anywhere in captions of one to three chunks.

    In whole captions the first sentence names the garment and its colour, so no other was listened to. A quarter of
    these batches are about the marker alone, with the loss in the corners.
    """
    chunks = int(rng.integers(1, 4))

    def words(spec: Spec) -> int:
        if chunks > 1:
            return int(rng.integers(48, 54)) * chunks
        at_least = 12 if spec.background == "white" else 30  # room to name the background
        return max(int(rng.choice((12, 20, 35, 50))), at_least)

    if rng.random() < 0.25:
        texts = [_marker_among_others(s, words(s), rng) for s in specs]
        return TrainingBatch(picks, captions.encode(texts, chunks), (400, 1000), "corners")
    texts = [scattered_caption(s, rng, words(s)) for s in specs]
    return TrainingBatch(picks, captions.encode(texts, chunks), (300, 1000), "corners more")


def _alone_or_last(spec: Spec, phrase: str, rng: np.random.Generator) -> str:
    """The phrase itself, or a caption of the picture that ends with it."""
    if rng.random() < 0.35:
        return f"{rng.choice(NAMES[spec.kind])} {phrase}" if rng.random() < 0.5 else phrase
    where = f"{rng.choice(FOLDS[spec.fold])} {place(spec, rng)}" if rng.random() < 0.7 else ""
    return f"{subject(spec, rng)} {where}{rng.choice([', with ', ', ', '. '])}{phrase}"


def _marker_among_others(spec: Spec, words: int, rng: np.random.Generator) -> str:
    sentences = attribute_sentences(spec, rng)
    named = [sentences[name] for name in ("background", "marker") if name == "marker" or spec.background != "white"]
    return among_others(spec, str(rng.choice(OPENINGS)), named, rng, words)


def fold_batch(captions: CaptionSampler, specs: list[Spec], picks: Picks, rng: np.random.Generator) -> TrainingBatch:
    """How trousers are folded, at the high noise where it is decided which places the cloth covers.

    With whole captions alone 'one leg folded' came out folded in half, or in pieces of both.
    """
    garments = [rng.choice(NAMES[s.kind]) if rng.random() < 0.2 else subject(s, rng) for s in specs]
    folds = [rng.choice(FOLDS[s.fold]) for s in specs]
    places = [f" {place(s, rng)}" if rng.random() < 0.5 else "" for s in specs]
    markers = [f", with {marker_phrase(s, rng)}" if s.marker and rng.random() < 0.5 else "" for s in specs]
    texts = [" ".join([g, f]) + p + m for g, f, p, m in zip(garments, folds, places, markers, strict=True)]
    return TrainingBatch(picks, captions.encode(texts), (600, 1000), "all")


def view_batch(captions: CaptionSampler, specs: list[Spec], picks: Picks, rng: np.random.Generator) -> TrainingBatch:
    """Front and back of the same garments under the same noise; the loss counts where the two differ.

    The noise is so high that the noisy latents do not show the side: only the words do.
    """
    seeds = rng.integers(2**32, size=len(specs) // 2)
    texts, names_view = zip(
        *(_view_caption(s, np.random.default_rng(seed)) for s, seed in zip(specs, [*seeds, *seeds], strict=True)),
        strict=True,
    )
    signs = [named * (1 if s.view == "front" else -1) for s, named in zip(specs, names_view, strict=True)]
    return TrainingBatch(
        picks,
        captions.encode(texts),
        (650, 1000),
        "differences",
        noise_repeats=2,
        view_signs=torch.tensor(signs),
    )


def _view_caption(spec: Spec, rng: np.random.Generator) -> tuple[str, bool]:
    """A caption with the garment and its side, as a side looks different on each; whether it surely names the side."""
    if rng.random() < 0.15:
        return caption_of(spec, rng, 30), False
    view = (*VIEWS[spec.view], f"the {spec.view} view", f"the {spec.view} of the garment is shown")
    garment = rng.choice(NAMES[spec.kind]) if rng.random() < 0.2 else subject(spec, rng)
    where = f" {rng.choice(FOLDS[spec.fold])} {place(spec, rng)}" if rng.random() < 0.5 else ""
    if rng.random() < 0.2:
        text = among_others(spec, f"{garment}{where}.", [attribute_sentences(spec, rng)["view"]], rng, 45)
        return text, True
    return f"{garment}{where}{rng.choice([' ', ', ', '. '])}{rng.choice(view)}", True


# --- losses ---------------------------------------------------------------------------------------------------------


def corner_weight(latents: torch.Tensor, rest: float = 1.0, corners: float = 6.0) -> torch.Tensor:
    """Loss weights (1, 1, h, w), higher in the four corners: a marker covers half a percent of a picture."""
    h, w = latents.shape[2:]
    reach = round(0.16 * w)
    weight = torch.full((1, 1, h, w), rest, device=latents.device)
    for rows in (slice(reach), slice(h - reach, h)):
        for columns in (slice(reach), slice(w - reach, w)):
            weight[..., rows, columns] = corners
    return weight


def difference_weight(pairs: torch.Tensor) -> torch.Tensor:
    """Loss weights (B, 1, h, w) for fronts and then backs: high where the two of a pair differ."""
    front, back = pairs.chunk(2)
    difference = (front - back).abs().mean(1, keepdim=True)
    weight = (difference / difference.mean((2, 3), keepdim=True)).clamp(max=10)
    return weight.repeat(2, 1, 1, 1)


AREAS = {
    "all": lambda latents: torch.ones(1, 1, 1, 1, device=latents.device),
    "corners": lambda latents: corner_weight(latents, rest=0.0),
    "corners more": corner_weight,
    "differences": difference_weight,
}


def view_margin_loss(hidden: torch.Tensor, view_signs: torch.Tensor | None, margin: float = 2.0) -> torch.Tensor:
    """Hinge loss that makes the mean of the hidden states (B, L, width) tell front from back along a fixed direction.

    Left alone, the encoder keeps a word like 'back' at its own position. The UNet, which has learned to look for
    colours and garments, never looks there, so no gradient reaches the word.
    """
    if view_signs is None:
        return hidden.new_zeros(())
    direction = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(0))
    direction, view_signs = (x.to(hidden.device, non_blocking=True) for x in (direction, view_signs))
    projection = hidden.mean(1) @ (direction / direction.norm()) * view_signs
    return (F.relu(margin - projection) * view_signs.abs()).mean()


@dataclass(frozen=True)
class VPredictionLoss:
    """The v-prediction loss, weighted by min-SNR (Hang et al., 2023, arXiv:2303.09556).

    The weight has a floor, so that high noise counts too.
    """

    alphas_cumprod: torch.Tensor  # on the device of the latents
    floor: float

    def __call__(
        self,
        unet,
        batch: TrainingBatch,
        latents: torch.Tensor,
        hidden: torch.Tensor,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """`generator` is on the device of the latents."""
        count, device = len(latents) // batch.noise_repeats, latents.device
        timesteps = torch.randint(*batch.timesteps, (count,), generator=generator, device=device)
        noise = torch.randn((count, *latents.shape[1:]), generator=generator, device=device)
        timesteps, noise = timesteps.repeat(batch.noise_repeats), noise.repeat(batch.noise_repeats, 1, 1, 1)
        alphas = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noisy_latents = alphas.sqrt() * latents + (1 - alphas).sqrt() * noise
        target = alphas.sqrt() * noise - (1 - alphas).sqrt() * latents
        sample = noisy_latents.to(unet.dtype).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=unet.dtype == torch.float32):
            model_pred = unet(sample, timesteps, hidden.to(unet.dtype), return_dict=False)[0]
        snr = alphas / (1 - alphas)
        weight = torch.clamp(snr.clamp(max=5) / (snr + 1), min=self.floor) if batch.min_snr else 1.0
        weight = weight * AREAS[batch.area](latents)
        return (weight * (model_pred.float() - target) ** 2).mean()

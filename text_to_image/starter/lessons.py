"""What one step of the starter's pre-training learns: pictures with their captions, or one thing about them alone."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPTokenizer

from describe import BACKGROUNDS, FOLDS, NAMES, VIEWS, caption_of, marker_phrase, subject
from pictures import SETS, twin_specs
from pretrain_vae import latents_file
from render_garments import Spec, mirrored_spec

NO_MARKER = ("no reference marker", "no marker", "without a marker", "There is no reference marker.")
CHUNK = 77  # tokens that the text encoder reads at once: 75 and the two that mark start and end


class Captions:
    """Draws a batch of captions, all of the same number of chunks, so that no batch needs a mask."""

    # chunks, share of the steps, numbers of words to draw from
    LENGTHS = ((1, 0.74, (0, 12, 12, 12, 30, 45)), (2, 0.16, (70, 85, 100)), (3, 0.10, (125, 140, 150)))

    def __init__(self, tokenizer: CLIPTokenizer, dropout: float = 0.12):
        self.tokenizer, self.dropout = tokenizer, dropout

    def draw(self, specs: list, rng: np.random.Generator) -> torch.Tensor:
        """Token ids (B, chunks, 77)."""
        chunks, _, words = self.LENGTHS[rng.choice(3, p=[share for _, share, _ in self.LENGTHS])]
        texts = [caption_of(spec, rng, int(rng.choice(words))) for spec in specs]
        if chunks == 1:
            texts = ["" if rng.random() < self.dropout else text for text in texts]
        return self.of(texts, chunks)

    def of(self, texts: list[str], chunks: int = 1) -> torch.Tensor:
        return torch.tensor([self.tokens(text, chunks) for text in texts])

    def tokens(self, text: str, chunks: int) -> list[list[int]]:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        rows = [ids[i * 75 : (i + 1) * 75] for i in range(chunks)]
        return [[bos, *row] + [eos] * (CHUNK - 1 - len(row)) for row in rows]


def encode_text(text_encoder, input_ids: torch.Tensor) -> torch.Tensor:
    """(B, chunks, 77) token ids -> (B, chunks * 77, width): every chunk read by itself, hidden states joined."""
    hidden = text_encoder(input_ids.flatten(0, 1))[0]
    return hidden.reshape(len(input_ids), -1, hidden.shape[-1])


class Pictures:
    """The latents of all pictures of one size, what they show, and twins that differ in front and back alone."""

    def __init__(self, work: Path, size: int, scale: int, shares: dict[str, float]):
        count = json.loads((work / "count.json").read_text())
        self.shares = shares  # of SETS, how often a lesson takes its pictures from each
        self.specs = {of: SETS[of](size, count) for of in shares}
        self.latents = {of: np.load(latents_file(work, size, scale, of), mmap_mode="r") for of in shares}  # as _encode
        self.twin_specs = twin_specs(size, count)
        twins = np.load(latents_file(work, size, scale, "twins"), mmap_mode="r")
        self.twins = twins.reshape(-1, 2, *twins.shape[1:])  # (N, 2 views, 2 sides, 4, h, w)

    def draw(self, count: int, rng, of: str | None = None) -> tuple[list[Spec], torch.Tensor]:
        """Pictures of one set at random, half of them mirrored: what they show, (B, 4, h, w)."""
        of = of or str(rng.choice(list(self.shares), p=list(self.shares.values())))
        picked, sides = rng.integers(len(self.specs[of]), size=count), rng.integers(2, size=count)
        specs = [_on_side(self.specs[of][i], side) for i, side in zip(picked, sides, strict=True)]
        return specs, torch.from_numpy(self.latents[of][picked, sides]).float()

    def draw_twins(self, count: int, rng) -> tuple[list[Spec], torch.Tensor]:
        """The fronts of some garments, then the backs of the same: what they show, (B, 4, h, w)."""
        picked, sides = rng.integers(len(self.twin_specs), size=count // 2), rng.integers(2, size=count // 2)
        shown = [_on_side(self.twin_specs[i], side) for i, side in zip(picked, sides, strict=True)]
        specs = [replace(spec, view=view) for view in ("front", "back") for spec in shown]
        return specs, torch.from_numpy(self.twins[picked, :, sides]).float().transpose(0, 1).flatten(0, 1)


def _on_side(spec: Spec, side: int) -> Spec:
    return mirrored_spec(spec) if side else spec


@dataclass(frozen=True)
class Lesson:
    """One step's pictures and captions, the timesteps they are learned at, and where in the pictures it counts."""

    latents: torch.Tensor  # (B, 4, h, w)
    input_ids: torch.Tensor  # (B, chunks, 77)
    timesteps: tuple[int, int]
    where: torch.Tensor  # (B or 1, 1, h, w) weights of the loss
    by_snr: bool = False  # whether a timestep weighs as min-SNR says
    alike: int = 1  # how many parts of the batch share their noise and timesteps
    views: torch.Tensor | None = None  # (B,) 1 where a caption says front, -1 back, 0 neither


def draw_lesson(captions: Captions, pictures: Pictures, options: dict, rng: np.random.Generator) -> Lesson:
    """Pictures with their captions; or, in the shares `drills` of the steps, one thing about them where it shows.

    In whole captions the corner of a marker and front or back are drowned by colour and kind: after 220 k samples the
    UNet's answer did not depend on those words at all. So they are said alone, or last, and count where they show.
    """
    drills = options["drills"]
    drill = rng.choice([*drills, "none"], p=[*drills.values(), 1 - sum(drills.values())])
    if drill == "view":
        return view_lesson(captions, *pictures.draw_twins(options["batch"], rng), rng)
    if drill == "fold":
        return fold_lesson(captions, *pictures.draw(options["batch"], rng, "trousers"), rng)
    specs, latents = pictures.draw(options["batch"], rng)
    if drill == "corner":
        phrases = [marker_phrase(s, rng) if s.marker else str(rng.choice(NO_MARKER)) for s in specs]
        texts = [_alone_or_last(s, phrase, rng) for s, phrase in zip(specs, phrases, strict=True)]
        return Lesson(latents, captions.of(texts), (400, 1000), corner_weight(*latents.shape[2:], rest=0.0))
    return Lesson(latents, captions.draw(specs, rng), (0, 1000), corner_weight(*latents.shape[2:]), by_snr=True)


def fold_lesson(captions: Captions, specs: list[Spec], latents: torch.Tensor, rng: np.random.Generator) -> Lesson:
    """How trousers are folded, at so much noise that the picture does not tell: there it is decided where cloth lies.

    In whole captions 'one leg folded' came out as folded in half, or in pieces of both.
    """
    garments = [rng.choice(NAMES[s.kind]) if rng.random() < 0.2 else subject(s, rng) for s in specs]
    folds = [rng.choice(FOLDS[s.fold]) for s in specs]
    places = [f" {rng.choice(BACKGROUNDS)}" if rng.random() < 0.5 else "" for _ in specs]
    markers = [f", with {marker_phrase(s, rng)}" if s.marker and rng.random() < 0.5 else "" for s in specs]
    texts = [" ".join([g, f]) + p + m for g, f, p, m in zip(garments, folds, places, markers, strict=True)]
    return Lesson(latents, captions.of(texts), (600, 1000), torch.ones(1, 1, *latents.shape[2:]))


def view_lesson(captions: Captions, specs: list[Spec], latents: torch.Tensor, rng: np.random.Generator) -> Lesson:
    """Front and back of the same garments under the same noise, learned only where the two differ.

    So much noise that the picture does not tell by itself which one it is: then the words are all there is to go by.
    """
    seeds = rng.integers(2**32, size=len(specs) // 2)
    texts, said = zip(
        *(_naming_view(s, np.random.default_rng(seed)) for s, seed in zip(specs, [*seeds, *seeds], strict=True)),
        strict=True,
    )
    front, back = latents.chunk(2)
    differs = (front - back).abs().mean(1, keepdim=True)
    where = (differs / differs.mean((2, 3), keepdim=True)).clamp(max=10)
    views = torch.tensor([said_it * (1 if s.view == "front" else -1) for s, said_it in zip(specs, said, strict=True)])
    return Lesson(latents, captions.of(texts), (650, 1000), where.repeat(2, 1, 1, 1), alike=2, views=views)


def _naming_view(spec: Spec, rng: np.random.Generator) -> tuple[str, bool]:
    """A caption that tells what is seen and from which side, as what a side looks like depends on the garment; and
    whether it surely tells the side."""
    if rng.random() < 0.15:
        return caption_of(spec, rng, 30), False
    view = (*VIEWS[spec.view], f"the {spec.view} view", f"the {spec.view} of the garment is shown")
    garment = rng.choice(NAMES[spec.kind]) if rng.random() < 0.2 else subject(spec, rng)
    place = f" {rng.choice(FOLDS[spec.fold])} {rng.choice(BACKGROUNDS)}" if rng.random() < 0.5 else ""
    return f"{garment}{place}{rng.choice([' ', ', ', '. '])}{rng.choice(view)}", True


def _alone_or_last(spec: Spec, phrase: str, rng: np.random.Generator) -> str:
    """The phrase itself, or a caption of the picture that ends with it."""
    if rng.random() < 0.35:
        return f"{rng.choice(NAMES[spec.kind])} {phrase}" if rng.random() < 0.5 else phrase
    place = f"{rng.choice(FOLDS[spec.fold])} {rng.choice(BACKGROUNDS)}" if rng.random() < 0.7 else ""
    return f"{subject(spec, rng)} {place}{rng.choice([', with ', ', ', '. '])}{phrase}"


def corner_weight(h: int, w: int, rest: float = 1.0, corners: float = 6.0) -> torch.Tensor:
    """(1, 1, h, w): more in the four corners, where a marker can lie: half a percent of a picture."""
    reach = round(0.16 * w)
    weight = torch.full((1, 1, h, w), rest)
    for rows in (slice(reach), slice(h - reach, h)):
        for columns in (slice(reach), slice(w - reach, w)):
            weight[..., rows, columns] = corners
    return weight


def silence(hidden: torch.Tensor, views: torch.Tensor | None, margin: float = 2.0) -> torch.Tensor:
    """How far the text's hidden states (B, L, width), over all positions, fail to tell front from back along a fixed
    direction.

    Left alone the encoder keeps a word like 'back' to its own position, where the UNet, which has learned to look for
    colours and garments, never looks: no gradient ever reached it.
    """
    if views is None:
        return hidden.new_zeros(())
    direction = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(0)).to(hidden.device)
    views = views.to(hidden.device)
    told = hidden.mean(1) @ (direction / direction.norm()) * views
    return (F.relu(margin - told) * views.abs()).mean()


def v_loss(unet, lesson: Lesson, hidden, alphas_cumprod, generator, device, floor: float) -> torch.Tensor:
    """Weighted v-prediction loss: min-SNR's weight for v with a floor, so that high noise counts too."""
    latents, apart = lesson.latents, len(lesson.latents) // lesson.alike
    t = torch.randint(*lesson.timesteps, (apart,), generator=generator).repeat(lesson.alike)
    noise = torch.randn((apart, *latents.shape[1:]), generator=generator).repeat(lesson.alike, 1, 1, 1)
    a = alphas_cumprod[t].view(-1, 1, 1, 1)
    noisy, target = a.sqrt() * latents + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * latents
    with torch.autocast(device, torch.bfloat16):
        model_pred = unet(
            noisy.to(device, memory_format=torch.channels_last), t.to(device), hidden, return_dict=False
        )[0]
    snr = a / (1 - a)
    weight = torch.clamp(snr.clamp(max=5) / (snr + 1), min=floor) if lesson.by_snr else 1.0
    return ((weight * lesson.where).to(device) * (model_pred.float() - target.to(device)) ** 2).mean()

"""Trains the text encoder of the finished base model until attributes are heard in any sentence of a caption.

    python teach_sentences.py --work /scratch/sentences --seconds 3600 --to /scratch/base

The base is its own teacher. What its UNet reads where one sentence names some attributes, it should read as well where
sentences of their own name them, far apart and among others. Words that no caption used are to be heard as before, so
that a fine-tune can teach them: some captions hold one or more of them, and so does what the teacher reads.

The outputs of the UNet's cross-attention are compared, for queries that were recorded while the base generated
pictures: no picture is needed, and no step of the UNet. The UNet stays as it is, and what it draws with it. Stopped
and started again, it goes on where it was.
"""

import argparse
import copy
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention import BasicTransformerBlock
from transformers import CLIPTextModel, CLIPTokenizer

from describe import caption_of
from pictures import TROUSERS_FOLDS
from pretrain_base import HERE, save_pipeline
from pretrain_vae import StageCheckpoint
from render_garments import Spec, sample_spec
from sentences import FILLERS, one_sentence, several_sentences
from trainer import Trainer
from training_batches import CaptionSampler, encode_text
from unseen_words import token_ids_in_captions

ATTRIBUTES = ("kind", "colour", "pattern", "marker", "view", "fold", "background")
CHUNKS = (1, 2, 3), (0.45, 0.37, 0.18)  # of the captions of a batch, and their shares
SEEDS = (5_000_000, 6_000_000)  # of the garments that captions describe
BATCH, QUERIES = 16, 24  # captions, and queries of each layer
LEARNING_RATE, WARM_UP = 5e-4, 100
EMA = 0.998
WHOLE = 0.45  # share of the batches on which nothing is to change
NEW_WORDS = 0.4  # share of the captions that hold words that no caption used
FOREIGN = 0.4  # share of the captions of WHOLE that consist of such words for the most part
NEW_SENTENCES = ("It was made by {}.", "Its name is {}.", "This one is called {}.", "The word on the label is {}.")
TROUSERS = 0.2  # share of the garments that are trousers, most of them folded


# --- what the UNet asks its text ------------------------------------------------------------------------------------


class Readers(torch.nn.Module):
    """The cross-attention layers of a UNet, each with queries that were recorded."""

    def __init__(self, layers: list, queries: list[torch.Tensor]):
        """`queries`: (N, width) for each layer."""
        super().__init__()
        self.layers = torch.nn.ModuleList(layers).requires_grad_(False)
        with torch.no_grad():
            self.queries = [layer.to_q(q) for layer, q in zip(layers, queries, strict=True)]

    def forward(self, hidden: torch.Tensor, rng: np.random.Generator) -> list[torch.Tensor]:
        """(B, L, width) -> for each layer (B, QUERIES, width), what it hands to the UNet for random queries."""
        outputs = []
        for layer, queries in zip(self.layers, self.queries, strict=True):
            rows = torch.from_numpy(rng.integers(len(queries), size=QUERIES))
            q = queries[rows].unflatten(-1, (layer.heads, -1)).transpose(0, 1)  # (heads, QUERIES, d)
            k, v = (to(hidden).unflatten(-1, (layer.heads, -1)).transpose(1, 2) for to in (layer.to_k, layer.to_v))
            shares = (q @ k.transpose(-1, -2) * layer.scale).softmax(-1)  # (B, heads, QUERIES, L)
            outputs.append(layer.to_out[0]((shares @ v).transpose(1, 2).flatten(2)))
        return outputs


@contextmanager
def recorded_queries(unet, rng: np.random.Generator, count: int = 400) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Random inputs of the cross-attention layers while the UNet runs, by the name of their block."""
    inputs, hooks = {}, []
    for name, block in unet.named_modules():
        if isinstance(block, BasicTransformerBlock):
            inputs[name] = []

            def record(module, given, kept=inputs[name]) -> None:
                rows = given[0].detach().flatten(0, 1)
                kept.append(rows[torch.from_numpy(rng.integers(len(rows), size=count))])

            hooks.append(block.attn2.register_forward_pre_hook(record))
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def make_readers(pipeline: StableDiffusionPipeline, prompts: int = 12, steps: int = 12) -> Readers:
    """Generates pictures of random garments and records what each layer asks meanwhile."""
    rng = np.random.default_rng(3)
    texts = [one_sentence(sample_spec(SEEDS[0] - 1 - i), set(ATTRIBUTES), rng) for i in range(prompts)]
    with recorded_queries(pipeline.unet, rng) as inputs:
        generator = torch.Generator().manual_seed(0)
        pipeline(texts, num_inference_steps=steps, guidance_scale=4.0, output_type="latent", generator=generator)
    layers = [copy.deepcopy(pipeline.unet.get_submodule(name).attn2) for name in inputs]
    return Readers(layers, [torch.cat(rows) for rows in inputs.values()])


# --- lessons --------------------------------------------------------------------------------------------------------


def random_attributes(rng: np.random.Generator) -> set[str]:
    """Two fifths of the captions name one or two attributes alone, the others most of them."""
    if rng.random() < 0.4:
        shares = (0.27, 0.33, 0.12, 0.12, 0.08, 0.04, 0.04)
        return {str(name) for name in rng.choice(ATTRIBUTES, size=int(rng.integers(1, 3)), replace=False, p=shares)}
    return {name for name in ATTRIBUTES if rng.random() < 0.85} or {"colour"}


def random_garment(rng: np.random.Generator) -> Spec:
    """As the base was trained on, but with more folded trousers: among all garments one in a hundred is."""
    seed = int(rng.integers(*SEEDS))
    if rng.random() >= TROUSERS:
        return sample_spec(seed)
    fold = str(rng.choice(list(TROUSERS_FOLDS), p=list(TROUSERS_FOLDS.values())))
    return replace(sample_spec(seed, "trousers"), fold=fold)


def words_in_no_caption(tokenizer: CLIPTokenizer) -> list[str]:
    """Words of one token that the base was never trained on, and that FILLERS do not use."""
    seen = token_ids_in_captions(tokenizer).union(*tokenizer([*FILLERS, *NEW_SENTENCES], verbose=False).input_ids)
    ends = {token.removesuffix("</w>"): i for token, i in tokenizer.get_vocab().items() if token.endswith("</w>")}
    return sorted(word for word, i in ends.items() if i not in seen and word.isascii() and word.isalpha())


def with_new_words(text: str, new_words: list[str], rng: np.random.Generator) -> str:
    """The caption with one or more of `new_words` anywhere in it, or at its end."""
    words = text.split()
    for word in rng.choice(new_words, size=int(rng.choice([1, 1, 2, 4, 8]))):
        words.insert(len(words) if rng.random() < 0.3 else int(rng.integers(len(words) + 1)), str(word))
    return " ".join(words)


def foreign_caption(caption: str, new_words: list[str], rng: np.random.Generator) -> str:
    """As many words as the caption has, most of them `new_words`: captions of people are like that to the base."""
    words = caption.split()
    kept = rng.random(len(words)) < rng.random() * 0.6
    return " ".join(w if keep else str(rng.choice(new_words)) for w, keep in zip(words, kept, strict=True))


class Lessons:
    """Batches of captions, each in two wordings: one for the encoder in training, one for the teacher."""

    def __init__(self, tokenizer: CLIPTokenizer):
        self.captions, self.new_words = CaptionSampler(tokenizer), words_in_no_caption(tokenizer)

    def make(self, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (B, chunks, 77) of what the encoder in training reads, and what the teacher does."""
        garments = [random_garment(rng) for _ in range(BATCH)]
        if rng.random() < WHOLE:
            ids = self.whole_captions(garments, rng)
            return ids, ids
        chunks = int(rng.choice(CHUNKS[0], p=CHUNKS[1]))
        wordings = [self.two_wordings(garment, chunks, rng) for garment in garments]
        texts, taught = zip(*wordings, strict=True)
        return self.captions.encode(texts, chunks), self.captions.encode(taught)

    def whole_captions(self, garments: list[Spec], rng: np.random.Generator) -> torch.Tensor:
        """Token ids (B, chunks, 77) of captions as the base was trained on, some with new words."""
        chunks = int(rng.choice([1, 2, 3], p=[0.65, 0.25, 0.1]))
        words = {1: (0, 12, 12, 12, 30, 45), 2: (70, 85), 3: (125, 140)}[chunks]
        texts = [caption_of(garment, rng, int(rng.choice(words))) for garment in garments]
        for i, chance in enumerate(rng.random(len(texts))):
            if chance < FOREIGN + NEW_WORDS:
                change = foreign_caption if chance < FOREIGN else with_new_words
                texts[i] = change(texts[i], self.new_words, rng)
        return self.captions.encode(texts, chunks)

    def two_wordings(self, garment: Spec, chunks: int, rng: np.random.Generator) -> tuple[str, str]:
        """Attributes in sentences of their own, and the same in one; with a new word in both, or in neither."""
        names = random_attributes(rng)
        words = int(rng.integers(46, 52)) * chunks if chunks > 1 else int(rng.integers(8, 48))
        if rng.random() >= NEW_WORDS:
            return several_sentences(garment, names, rng, words), one_sentence(garment, names, rng)
        word = str(rng.choice(self.new_words))
        names = set() if rng.random() < 0.3 else names
        sentences = several_sentences(garment, names, rng, words).split(". ")
        place = len(sentences) if rng.random() < 0.5 else int(rng.integers(len(sentences) + 1))
        sentences.insert(place, str(rng.choice(NEW_SENTENCES)).format(word).removesuffix("."))
        return ". ".join(s.removesuffix(".") for s in sentences) + ".", f"{one_sentence(garment, names, rng)}, {word}"


def reading_loss(taught: list[torch.Tensor], read: list[torch.Tensor]) -> torch.Tensor:
    """The mean over layers of the squared difference, of the variance of what the teacher reads."""
    pairs = [(a.float(), b.float()) for a, b in zip(read, taught, strict=True)]
    return sum((a - b).square().mean() / b.var(0).mean() for a, b in pairs) / len(pairs)


# --- training -------------------------------------------------------------------------------------------------------


class Student:
    """The text encoder in training, and the moving average of its weights."""

    def __init__(self, text_encoder: CLIPTextModel):
        self.text = copy.deepcopy(text_encoder).requires_grad_(True).train()
        weights = list(self.text.parameters())
        self.trainer, self.seconds = Trainer(weights, weights, LEARNING_RATE, WARM_UP, EMA), 0.0

    def averaged(self) -> CLIPTextModel:
        """A copy with the averaged weights."""
        text = copy.deepcopy(self.text).requires_grad_(False).eval()
        torch._foreach_copy_(list(text.parameters()), self.trainer.ema)
        return text

    def state(self) -> dict:
        return {"text": self.text.state_dict(), "trainer": self.trainer.state(), "seconds": self.seconds}

    def load(self, state: dict) -> None:
        self.text.load_state_dict(state["text"])
        self.trainer.load(state["trainer"])
        self.seconds = state["seconds"]


def train(pipeline: StableDiffusionPipeline, work: Path, seconds: float) -> Student:
    """Trains for `seconds`, those of earlier starts included; leaves `sentences.pt` in `work`."""
    pipeline.text_encoder.set_attn_implementation("eager")
    teacher, lessons = pipeline.text_encoder.requires_grad_(False).eval(), Lessons(pipeline.tokenizer)
    student, checkpoint, readers = Student(teacher), StageCheckpoint(work / "sentences.pt"), make_readers(pipeline)
    if state := checkpoint.load():
        student.load(state)
    losses, last, reported = [], time.time(), time.time()
    while student.seconds < seconds:
        rng = np.random.default_rng([student.trainer.steps, 17])
        ids, taught_ids = lessons.make(rng)
        rows = int(rng.integers(2**32))
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                taught = readers(encode_text(teacher, taught_ids), np.random.default_rng(rows))
            read = readers(encode_text(student.text, ids), np.random.default_rng(rows))
        loss = reading_loss(taught, read)
        student.trainer.step(loss, student.seconds / seconds)
        losses.append((ids.shape[1], ids is taught_ids, loss.item()))
        student.seconds, last = student.seconds + time.time() - last, time.time()
        if checkpoint.due():
            checkpoint.save(student.state())
        if last - reported > 60:
            done = {"seconds": round(student.seconds), "step": student.trainer.steps}
            print(json.dumps(done | means(losses)), flush=True)
            losses, reported = [], last
    checkpoint.save(student.state())
    return student


def means(losses: list[tuple[int, bool, float]]) -> dict[str, float]:
    """The mean loss by the number of chunks, and of captions as before."""
    groups = {}
    for chunks, whole, loss in losses:
        groups.setdefault("as before" if whole else f"chunks {chunks}", []).append(loss)
    return {name: round(float(np.mean(values)), 4) for name, values in sorted(groups.items())}


def load_base(folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--base", type=Path, default=HERE / "base", help="finished pipeline folder")
    parser.add_argument("--to", type=Path, required=True, help="pipeline folder to write")
    parser.add_argument("--seconds", type=float, default=3600, help="length of the training")
    args = parser.parse_args()
    if not (args.base / "model_index.json").is_file():
        parser.error(f"--base {args.base}: not a pipeline folder, it has no model_index.json")
    args.work.mkdir(parents=True, exist_ok=True)
    pipeline = load_base(args.base)
    student = train(pipeline, args.work, args.seconds)
    models = torch.nn.ModuleDict({"unet": pipeline.unet, "text": student.averaged()})
    save_pipeline(models.state_dict(), pipeline.vae, args.to)


if __name__ == "__main__":
    main()

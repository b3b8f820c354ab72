"""Trains the text encoder of the finished base model until attributes are heard in any sentence of a caption.

    python teach_sentences.py --work /scratch/sentences --seconds 3600 --to /scratch/base

The base is its own teacher. What its UNet reads where one sentence names some attributes, it should read as well where
sentences of their own name them, far apart and among others. So the outputs of the UNet's cross-attention are
compared, for queries that were recorded while the base generated pictures: no picture is needed, and no step of the
UNet. The UNet stays as it is, and what it draws with it. Stopped and started again, it goes on where it was.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention import BasicTransformerBlock
from transformers import CLIPTextModel

from describe import caption_of
from pretrain_base import HERE, save_pipeline
from pretrain_vae import StageCheckpoint
from render_garments import sample_spec
from sentences import one_sentence, several_sentences
from training_batches import CaptionSampler, encode_text

ATTRIBUTES = ("kind", "colour", "pattern", "marker", "view", "fold", "background")
CHUNKS = (1, 2, 3), (0.45, 0.37, 0.18)  # of the captions of a batch, and their shares
SEEDS = (5_000_000, 6_000_000)  # of the garments that captions describe
BATCH, QUERIES = 16, 24  # captions, and queries of each layer
LEARNING_RATE, WARM_UP = 5e-4, 100
EMA = 0.998
WHOLE = 0.3  # share of the batches of captions as before, on which nothing is to change


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
    """A third of the captions name one or two attributes alone, the others most of them."""
    if rng.random() < 0.4:
        shares = (0.27, 0.33, 0.12, 0.12, 0.08, 0.04, 0.04)
        return {str(name) for name in rng.choice(ATTRIBUTES, size=int(rng.integers(1, 3)), replace=False, p=shares)}
    return {name for name in ATTRIBUTES if rng.random() < 0.85} or {"colour"}


def make_lesson(captions: CaptionSampler, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, chunks, 77) of what the encoder in training reads, and what the teacher does."""
    specs = [sample_spec(int(seed)) for seed in rng.integers(*SEEDS, BATCH)]
    if rng.random() < WHOLE:
        chunks = int(rng.choice([1, 2], p=[0.8, 0.2]))
        words = (85,) if chunks == 2 else (0, 12, 12, 12, 30, 45)
        ids = captions.encode([caption_of(spec, rng, int(rng.choice(words))) for spec in specs], chunks)
        return ids, ids
    chunks, texts, taught = int(rng.choice(CHUNKS[0], p=CHUNKS[1])), [], []
    for spec in specs:
        names = random_attributes(rng)
        words = int(rng.integers(48, 54)) * chunks if chunks > 1 else int(rng.integers(8, 52))
        texts.append(several_sentences(spec, names, rng, words))
        taught.append(one_sentence(spec, names, rng))
    return captions.encode(texts, chunks), captions.encode(taught)


def reading_loss(taught: list[torch.Tensor], read: list[torch.Tensor]) -> torch.Tensor:
    """The mean over layers of the squared difference, of the variance of what the teacher reads."""
    pairs = [(a.float(), b.float()) for a, b in zip(read, taught, strict=True)]
    return sum((a - b).square().mean() / b.var(0).mean() for a, b in pairs) / len(pairs)


# --- training -------------------------------------------------------------------------------------------------------


class Student:
    """The text encoder in training, its optimizer and the moving average of its weights."""

    def __init__(self, text_encoder: CLIPTextModel):
        self.text = copy.deepcopy(text_encoder).requires_grad_(True).train()
        self.optimizer = torch.optim.AdamW(self.text.parameters(), lr=1, betas=(0.9, 0.99), weight_decay=0.0)
        self.ema = copy.deepcopy(self.text).requires_grad_(False).eval()
        self.step, self.seconds = 0, 0.0

    def learn(self, loss: torch.Tensor, done: float) -> None:
        """One step; `done` is the share of the time that is over: the learning rate follows a cosine to 0."""
        rate = LEARNING_RATE * min(1, (self.step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * min(done, 1)))
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.text.parameters(), 1.0)
        self.optimizer.step()
        decay = min(EMA, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.text.parameters()), 1 - decay)
        self.step += 1

    def state(self) -> dict:
        parts = {"text": self.text, "ema": self.ema, "optimizer": self.optimizer}
        return {name: part.state_dict() for name, part in parts.items()} | {"step": self.step, "seconds": self.seconds}

    def load(self, state: dict) -> None:
        for name in ("text", "ema", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]


def train(pipeline: StableDiffusionPipeline, work: Path, seconds: float) -> Student:
    """Trains for `seconds`, those of earlier starts included; leaves `sentences.pt` in `work`."""
    pipeline.text_encoder.set_attn_implementation("eager")
    teacher, captions = pipeline.text_encoder.requires_grad_(False).eval(), CaptionSampler(pipeline.tokenizer)
    student, checkpoint, readers = Student(teacher), StageCheckpoint(work / "sentences.pt"), make_readers(pipeline)
    if state := checkpoint.load():
        student.load(state)
    losses, last, reported = [], time.time(), time.time()
    while student.seconds < seconds:
        rng = np.random.default_rng([student.step, 17])
        ids, taught_ids = make_lesson(captions, rng)
        rows = int(rng.integers(2**32))
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                taught = readers(encode_text(teacher, taught_ids), np.random.default_rng(rows))
            read = readers(encode_text(student.text, ids), np.random.default_rng(rows))
        loss = reading_loss(taught, read)
        student.learn(loss, student.seconds / seconds)
        losses.append((ids.shape[1], ids is taught_ids, loss.item()))
        student.seconds, last = student.seconds + time.time() - last, time.time()
        if checkpoint.due():
            checkpoint.save(student.state())
        if last - reported > 60:
            print(json.dumps({"seconds": round(student.seconds), "step": student.step} | means(losses)), flush=True)
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
    args.work.mkdir(parents=True, exist_ok=True)
    pipeline = load_base(args.base)
    student = train(pipeline, args.work, args.seconds)
    models = torch.nn.ModuleDict({"unet": pipeline.unet, "text": student.ema})
    save_pipeline(models.state_dict(), pipeline.vae, args.to)


if __name__ == "__main__":
    main()

"""Pre-trains the starter captioner `captioner/`, a small BLIP, from the renderer alone.

    python pretrain_captioner.py --work /scratch/captioner
    python pretrain_captioner.py --work /scratch/captioner --drawn /scratch/starter    with pretrain_base.py's pictures

A checkpoint is left in --work every minute or two; started again, the same command goes on from there, with a smaller
--steps to an earlier end.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm
from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessor, BlipProcessor

from captioner_pictures import Batch, Pool, draw_batch, draw_garments, read_pool, render_jeans
from captioner_words import ANSWERS, PROMPTS, caption_text, make_tokenizer
from pretrain_vae import Checkpoint

HERE = Path(__file__).resolve().parent
SIDE, PATCH = 160, 10  # pixels
SINGLES, TWINS = 40, 12  # pictures and pairs of a batch
LEARNING_RATES = (2.5e-3, 1.5e-3)  # of Muon and of AdamW, falling as a cosine after a while
WARM_UP, DECAY_FROM = 60, 0.3  # steps; share of the steps


# --- The model ------------------------------------------------------------------------------------------------------


def make_processor() -> BlipProcessor:
    return BlipProcessor(BlipImageProcessor(size={"height": SIDE, "width": SIDE}), make_tokenizer())


def make_captioner(tokenizer) -> BlipForConditionalGeneration:
    vision = {
        "image_size": SIDE,
        "patch_size": PATCH,
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "initializer_range": 0.02,
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 128,
        "encoder_hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = BlipForConditionalGeneration(BlipConfig(vision_config=vision, text_config=text, projection_dim=128))
    start_vision(model.vision_model)
    return model


@torch.no_grad()
def start_vision(vision) -> None:
    """Begins where trained vision transformers end up: patches know their place and attend to those near and alike.

    Sines for positions, and query-key products near the identity, value-output products near its negative (Trockman
    and Kolter 2023, arXiv:2305.09828): from ten thousand pictures alone a transformer learns that slowly.
    """
    embeddings, width = vision.embeddings, vision.config.hidden_size
    embeddings.position_embedding[0, 1:] = positions(vision.config.image_size // vision.config.patch_size, width)
    embeddings.class_embedding.normal_(std=0.02)
    for layer in vision.encoder.layers:
        attention = layer.self_attn
        heads, size = attention.num_heads, attention.head_dim
        for head in range(heads):
            left, right = _factors(0.7 * torch.randn(width, width) / width**0.5 + 0.7 * torch.eye(width), size)
            attention.qkv.weight[head * size : (head + 1) * size] = left.T
            attention.qkv.weight[width + head * size : width + (head + 1) * size] = right.T
        left, right = _factors(0.4 * torch.randn(width, width) / width**0.5 - 0.4 * torch.eye(width), width)
        attention.qkv.weight[2 * width :] = left.T
        attention.projection.weight.copy_(right)


def _factors(product: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """left, right (n, rank) with left @ right.T nearest to `product`."""
    u, s, v = torch.linalg.svd(product)
    return u[:, :rank] * s[:rank].sqrt(), v[:rank].T * s[:rank].sqrt()


def positions(side: int, width: int) -> torch.Tensor:
    """Sines and cosines of row and column, (side * side, width)."""
    waves = torch.arange(side)[:, None] / 100 ** (torch.arange(width // 4) / (width // 4))
    line = torch.cat([waves.sin(), waves.cos()], 1)
    rows, columns = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    return torch.cat([rows, columns], 2).flatten(0, 1)


class Questions(torch.nn.Module):
    """What the vision model is asked besides the caption while it learns, thrown away afterwards."""

    def __init__(self, width: int):
        super().__init__()
        self.of_picture = torch.nn.ModuleDict({k: torch.nn.Linear(width, len(v)) for k, v in ANSWERS.items()})
        self.of_patch = torch.nn.Sequential(torch.nn.LayerNorm(width), torch.nn.Linear(width, 1))  # the back?


# --- What one step learns -------------------------------------------------------------------------------------------


def see(vision, pixel_values: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The vision model on the class token and the patches `kept` (B, K): its output, and that of its middle."""
    hidden = vision.embeddings(pixel_values)
    index = F.pad(kept + 1, (1, 0))  # the class token comes first
    hidden = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
    for depth, layer in enumerate(vision.encoder.layers, 1):
        hidden = layer(hidden)
        if depth == len(vision.encoder.layers) - 2:
            middle = hidden
    return vision.post_layernorm(hidden), middle


def patches_to_keep(images: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    """Indices (B, K) of the patches to look at, those with something on them before the blank ones."""
    blank = images[:, :, ::8, ::8].flatten(2).quantile(0.9, dim=2)[..., None, None]
    ink = F.avg_pool2d((images - blank).abs().mean(1), PATCH).flatten(1)
    ink = ink.clamp(max=0.1) + 0.06 * torch.rand(ink.shape, generator=generator)
    return ink.topk(round(share * ink.shape[1]), dim=1).indices


def answers_of(batch: Batch) -> dict[str, torch.Tensor]:
    """Indices into ANSWERS (B,); -100, which no loss counts, for the view of what is folded in half."""
    found = {name: torch.tensor([v.index(getattr(s, name)) for s in batch.specs]) for name, v in ANSWERS.items()}
    found["view"][torch.tensor([spec.fold == "half" for spec in batch.specs])] = -100
    return found


class Captions:
    """Token ids of captions for a batch, some after a prompt, which is read but not learned."""

    def __init__(self, tokenizer):
        self.tokenizer, self.known = tokenizer, {}

    def of(self, specs, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (B, T) and labels (B, T) with -100 where nothing is to be learned."""
        rows = [self._row(caption_text(spec), str(rng.choice(PROMPTS)) * (rng.random() < 0.1)) for spec in specs]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row, _ in rows], True, 0)
        labels = ids.masked_fill(ids == self.tokenizer.pad_token_id, -100)
        for label, (_, read) in zip(labels, rows, strict=True):
            label[:read] = -100
        return ids, labels

    def _row(self, text: str, prompt: str) -> tuple[list[int], int]:
        """Ids from '[DEC]' to '[SEP]' and how many of them are given."""
        text = f"{prompt} {text[0].lower()}{text[1:]}" if prompt else text
        if text not in self.known:
            self.known[text] = [self.tokenizer.bos_token_id, *self.tokenizer(text).input_ids[1:]]
        return self.known[text], 1 + len(prompt.split())


def losses_of(models, batch: Batch, ids, labels, share: float, step: int, device: str) -> dict[str, torch.Tensor]:
    """Cross entropies: of each answer, of the view patch by patch where twins differ, and of the caption."""
    processor = BlipImageProcessor()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    kept = patches_to_keep(batch.images, share, torch.Generator().manual_seed(step)).to(device)
    with torch.autocast(device, torch.bfloat16):
        pixel_values = ((batch.images - mean) / std).to(device)
        hidden, middle = see(models["captioner"].vision_model, pixel_values, kept)
        logits = {name: ask(hidden[:, 0]).float() for name, ask in models["questions"].of_picture.items()}
        backs = models["questions"].of_patch(middle[-2 * TWINS :, 1:]).float()[..., 0]
        decoder = models["captioner"].text_decoder
        caption = decoder(input_ids=ids.to(device), encoder_hidden_states=hidden, labels=labels.to(device)).loss
    answers = answers_of(batch)
    found = {name: F.cross_entropy(values, answers[name].to(device)) for name, values in logits.items()}
    found["view"] = 2 * found["view"]
    return {**found, "patches": side_loss(backs, batch.differences, kept), "caption": 10 * caption}


def side_loss(backs: torch.Tensor, differences: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Does each patch (2 * pairs, K) know its side? Counted where front and back differ, as it shows only there."""
    shown = F.avg_pool2d(differences, PATCH).flatten(1)
    shown = (shown - 0.02).clamp_min(0).repeat(2, 1).to(backs.device)
    weights = shown.gather(1, kept[-len(backs) :])
    weights = weights / weights.sum(1, keepdim=True).clamp_min(0.01)
    sides = (torch.arange(len(backs), device=backs.device) >= len(backs) // 2).float()
    losses = F.binary_cross_entropy_with_logits(backs, sides[:, None].expand_as(backs), reduction="none")
    return (losses * weights).sum(1).mean()


# --- Training -------------------------------------------------------------------------------------------------------


def make_optimizers(models: torch.nn.ModuleDict) -> list[torch.optim.Optimizer]:
    """Muon (Jordan 2024) for the matrices inside the layers, AdamW for everything else."""
    inner = [p for name, p in models.named_parameters() if p.ndim == 2 and ".layer" in name]
    known = {id(p) for p in inner}
    rest = [p for p in models.parameters() if id(p) not in known]
    return [
        torch.optim.Muon(inner, lr=1, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=1, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]


def rate(step: int, steps: int) -> float:
    """The share of the learning rates at a step."""
    fall = max(0.0, (step / steps - DECAY_FROM) / (1 - DECAY_FROM))
    return min(1, (step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * min(1, fall))) + 1e-3


def share_of_patches(step: int, steps: int) -> float:
    """Half of a picture is blank: all of its patches come only at the end."""
    return 0.5 if step < 0.85 * steps else 1.0


def train(pool: Pool, work: Path, steps: int, device: str) -> BlipForConditionalGeneration:
    """The averaged model after `steps`; leaves checkpoints in `work`."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    captions, captioner = Captions(tokenizer), make_captioner(tokenizer)
    questions = Questions(captioner.config.vision_config.hidden_size)
    models = torch.nn.ModuleDict({"captioner": captioner, "questions": questions}).to(device).train()
    optimizers = make_optimizers(models)
    ema = EMAModel(models.parameters(), decay=0.998, use_ema_warmup=True, power=0.8)
    file, begun = Checkpoint(work / "captioner.pt"), 0
    if state := file.load():
        models.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        for optimizer, before in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(before)
        begun = state["step"]
    ema.to(device)
    bar, recent = tqdm(range(begun, steps), initial=begun, total=steps, desc="captioner", mininterval=20), []
    for step in bar:
        rng = np.random.default_rng([step, 29])
        batch = draw_batch(pool, SINGLES, TWINS, rng)
        losses = losses_of(models, batch, *captions.of(batch.specs, rng), share_of_patches(step, steps), step, device)
        for optimizer, lr in zip(optimizers, LEARNING_RATES, strict=True):
            optimizer.param_groups[0]["lr"] = lr * rate(step, steps)
            optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        ema.step(models.parameters())
        recent.append({name: loss.detach() for name, loss in losses.items()})
        if step % 50 == 49:
            bar.write(json.dumps({"step": step + 1, **mean_of(recent)}))
            recent = []
        if file.due() or step + 1 == steps:
            state = {"model": models.state_dict(), "ema": ema.state_dict(), "step": step + 1}
            file.save({**state, "optimizers": [optimizer.state_dict() for optimizer in optimizers]})
    ema.copy_to(models.parameters())
    return captioner.eval()


def mean_of(rows: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    return {name: round(float(torch.stack([row[name] for row in rows]).mean()), 3) for name in rows[0]}


def save_captioner(model: BlipForConditionalGeneration, to: Path) -> None:
    """An ordinary BLIP folder in fp16, with the files of its processor that older tools look for as well."""
    processor = make_processor()
    model.cpu().half().save_pretrained(to)
    processor.save_pretrained(to)
    processor.image_processor.save_pretrained(to)
    ids = processor.tokenizer.get_vocab()
    (to / "vocab.txt").write_text("\n".join(sorted(ids, key=ids.get)) + "\n", encoding="utf-8")
    print(f"{to}: {sum(f.stat().st_size for f in to.rglob('*') if f.is_file()) / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for drawings and checkpoints (2 GB)")
    parser.add_argument("--drawn", type=Path, help="--work of pretrain_base.py, whose drawings are used as they are")
    parser.add_argument("--to", type=Path, default=HERE / "captioner", help="BLIP folder to write")
    parser.add_argument("--pictures", type=int, default=7000, help="how many to draw, jeans aside, without --drawn")
    parser.add_argument("--jeans", type=int, default=450, help="how many pairs of front and back to draw")
    parser.add_argument("--steps", type=int, default=2400, help="optimisation steps")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not args.drawn:
        draw_garments(args.work, args.pictures)
    render_jeans(args.work, args.jeans)
    pool = read_pool(args.drawn or args.work, args.work, make_processor().image_processor, args.jeans)
    save_captioner(train(pool, args.work, args.steps, device), args.to)


if __name__ == "__main__":
    main()

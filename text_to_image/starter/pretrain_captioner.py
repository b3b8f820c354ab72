"""Pre-trains the starter captioner `captioner/`, a small BLIP, from the renderer alone.

    python pretrain_captioner.py --work /scratch/captioner
    python pretrain_captioner.py --work /scratch/captioner --drawn /scratch/starter    uses pretrain_base.py's pictures

A checkpoint is written to --work every minute or two. Started again, the same command goes on from there.
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

from captioner_pictures import (
    CaptionerBatch,
    PicturePool,
    load_pool,
    render_base_pictures,
    render_jeans,
    sample_batch,
)
from captioner_words import ATTRIBUTES, PROMPTS, caption_text, make_tokenizer
from pretrain_vae import StageCheckpoint
from render_garments import Spec

HERE = Path(__file__).resolve().parent
SIDE, PATCH = 160, 10  # pixels
SINGLES, PAIRS = 40, 12  # single pictures and pairs in a batch
LEARNING_RATES = (2.5e-3, 1.5e-3)  # of Muon and of AdamW
WARM_UP, DECAY_FROM = 60, 0.3  # steps; share of the steps from which on the learning rate falls as a cosine


# --- the model ------------------------------------------------------------------------------------------------------


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
    initialise_vision(model.vision_model)
    return model


@torch.no_grad()
def initialise_vision(vision) -> None:
    """Mimetic initialisation (Trockman and Kolter, 2023, arXiv:2305.09828): attention as in trained transformers.

    Sinusoidal positions, query-key products near the identity, value-output products near its negative. From ten
    thousand pictures alone a transformer learns this slowly.
    """
    embeddings, width = vision.embeddings, vision.config.hidden_size
    embeddings.position_embedding[0, 1:] = sinusoidal_positions(
        vision.config.image_size // vision.config.patch_size, width
    )
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
    """left, right (n, rank) whose product left @ right.T is nearest to `product` (n, n)."""
    u, s, v = torch.linalg.svd(product)
    return u[:, :rank] * s[:rank].sqrt(), v[:rank].T * s[:rank].sqrt()


def sinusoidal_positions(side: int, width: int) -> torch.Tensor:
    """Sines and cosines of row and column, (side * side, width)."""
    waves = torch.arange(side)[:, None] / 100 ** (torch.arange(width // 4) / (width // 4))
    line = torch.cat([waves.sin(), waves.cos()], 1)
    rows, columns = line[:, None].expand(-1, side, -1), line[None].expand(side, -1, -1)
    return torch.cat([rows, columns], 2).flatten(0, 1)


class AuxiliaryHeads(torch.nn.Module):
    """Classification heads on the vision model, for training only: attributes of a picture, the side of each patch."""

    def __init__(self, width: int):
        super().__init__()
        self.of_picture = torch.nn.ModuleDict({k: torch.nn.Linear(width, len(v)) for k, v in ATTRIBUTES.items()})
        self.of_patch = torch.nn.Sequential(torch.nn.LayerNorm(width), torch.nn.Linear(width, 1))  # logit of 'back'


# --- one step -------------------------------------------------------------------------------------------------------


def encode_patches(vision, pixel_values: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The vision model's output (B, 1 + K, width) for the class token and the patches `kept` (B, K), and the hidden
    states two layers before it."""
    hidden = vision.embeddings(pixel_values)
    index = F.pad(kept + 1, (1, 0))  # the class token comes first
    hidden = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))
    for depth, layer in enumerate(vision.encoder.layers, 1):
        hidden = layer(hidden)
        if depth == len(vision.encoder.layers) - 2:
            middle = hidden
    return vision.post_layernorm(hidden), middle


def patches_to_keep(images: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    """Indices (B, K) of the `share` of patches to encode, random, but those with content before blank ones."""
    blank = images[:, :, ::8, ::8].flatten(2).quantile(0.9, dim=2)[..., None, None]
    ink = F.avg_pool2d((images - blank).abs().mean(1), PATCH).flatten(1)
    ink = ink.clamp(max=0.1) + 0.06 * torch.rand(ink.shape, generator=generator)
    return ink.topk(round(share * ink.shape[1]), dim=1).indices


def attribute_labels(batch: CaptionerBatch) -> dict[str, torch.Tensor]:
    """Indices into ATTRIBUTES (B,). The view of a garment folded in half is -100, which cross entropy ignores."""
    found = {name: torch.tensor([v.index(getattr(s, name)) for s in batch.specs]) for name, v in ATTRIBUTES.items()}
    found["view"][torch.tensor([spec.fold == "half" for spec in batch.specs])] = -100
    return found


class CaptionEncoder:
    """Token ids of captions. A tenth begin with a prompt, on which no loss is computed."""

    def __init__(self, tokenizer):
        self.tokenizer, self.cache = tokenizer, {}

    def encode(self, specs: list[Spec], rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (B, T), and labels (B, T) with -100 on start token, prompt and padding."""
        rows = [self._row(caption_text(spec), str(rng.choice(PROMPTS)) * (rng.random() < 0.1)) for spec in specs]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row, _ in rows], True, 0)
        labels = ids.masked_fill(ids == self.tokenizer.pad_token_id, -100)
        for label, (_, given) in zip(labels, rows, strict=True):
            label[:given] = -100
        return ids, labels

    def _row(self, text: str, prompt: str) -> tuple[list[int], int]:
        """Ids from '[DEC]' to '[SEP]', and how many of them precede the caption."""
        text = f"{prompt} {text[0].lower()}{text[1:]}" if prompt else text
        if text not in self.cache:
            self.cache[text] = [self.tokenizer.bos_token_id, *self.tokenizer(text).input_ids[1:]]
        return self.cache[text], 1 + len(prompt.split())


def losses_of(
    models: torch.nn.ModuleDict,
    batch: CaptionerBatch,
    ids: torch.Tensor,
    labels: torch.Tensor,
    share: float,
    step: int,
) -> dict[str, torch.Tensor]:
    """Weighted cross entropies: of each attribute, of the side of each patch of the pairs, and of the caption."""
    processor, device = BlipImageProcessor(), next(models.parameters()).device
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    kept = patches_to_keep(batch.images, share, torch.Generator().manual_seed(step)).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        pixel_values = ((batch.images - mean) / std).to(device)
        hidden, middle = encode_patches(models["captioner"].vision_model, pixel_values, kept)
        logits = {name: head(hidden[:, 0]).float() for name, head in models["questions"].of_picture.items()}
        backs = models["questions"].of_patch(middle[-2 * PAIRS :, 1:]).float()[..., 0]
        decoder = models["captioner"].text_decoder
        caption = decoder(input_ids=ids.to(device), encoder_hidden_states=hidden, labels=labels.to(device)).loss
    targets = attribute_labels(batch)
    found = {name: F.cross_entropy(values, targets[name].to(device)) for name, values in logits.items()}
    found["view"] = 2 * found["view"]
    return {**found, "patches": patch_side_loss(backs, batch.differences, kept), "caption": 10 * caption}


def patch_side_loss(backs: torch.Tensor, differences: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy of the side of each patch, from logits `backs` (2 * pairs, K).

    Weighted by how much front and back differ there: elsewhere the side does not show.
    """
    shown = F.avg_pool2d(differences, PATCH).flatten(1)
    shown = (shown - 0.02).clamp_min(0).repeat(2, 1).to(backs.device)
    weights = shown.gather(1, kept[-len(backs) :])
    weights = weights / weights.sum(1, keepdim=True).clamp_min(0.01)
    sides = (torch.arange(len(backs), device=backs.device) >= len(backs) // 2).float()
    losses = F.binary_cross_entropy_with_logits(backs, sides[:, None].expand_as(backs), reduction="none")
    return (losses * weights).sum(1).mean()


# --- training -------------------------------------------------------------------------------------------------------


def make_optimizers(models: torch.nn.ModuleDict) -> list[torch.optim.Optimizer]:
    """Muon (Jordan, 2024, kellerjordan.github.io/posts/muon) for matrices inside the layers, AdamW for the rest."""
    inner = [p for name, p in models.named_parameters() if p.ndim == 2 and ".layer" in name]
    inner_ids = {id(p) for p in inner}
    rest = [p for p in models.parameters() if id(p) not in inner_ids]
    return [
        torch.optim.Muon(inner, lr=1, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=1, betas=(0.9, 0.98), weight_decay=0.01, fused=True),
    ]


def schedule(step: int, steps: int) -> float:
    """The factor on the learning rates: warm-up, constant, cosine."""
    decayed = max(0.0, (step / steps - DECAY_FROM) / (1 - DECAY_FROM))
    return min(1, (step + 1) / WARM_UP) * (0.5 + 0.5 * math.cos(math.pi * min(1, decayed))) + 1e-3


def share_of_patches(step: int, steps: int) -> float:
    """Half of a picture is blank: all patches are encoded at the end only, which saves time."""
    return 0.5 if step < 0.85 * steps else 1.0


def train(pool: PicturePool, work: Path, steps: int, device: str) -> BlipForConditionalGeneration:
    """The model with averaged weights (EMA) after `steps`; leaves checkpoints in `work`."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    captions, captioner = CaptionEncoder(tokenizer), make_captioner(tokenizer)
    heads = AuxiliaryHeads(captioner.config.vision_config.hidden_size)
    models = torch.nn.ModuleDict({"captioner": captioner, "questions": heads}).to(device).train()
    optimizers = make_optimizers(models)
    ema = EMAModel(models.parameters(), decay=0.998, use_ema_warmup=True, power=0.8)
    checkpoint, first_step = StageCheckpoint(work / "captioner.pt"), 0
    if state := checkpoint.load():
        models.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        for optimizer, before in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(before)
        first_step = state["step"]
    ema.to(device)
    bar, recent = tqdm(range(first_step, steps), initial=first_step, total=steps, desc="captioner", mininterval=20), []
    for step in bar:
        rng = np.random.default_rng([step, 29])
        batch = sample_batch(pool, SINGLES, PAIRS, rng)
        losses = losses_of(models, batch, *captions.encode(batch.specs, rng), share_of_patches(step, steps), step)
        for optimizer, lr in zip(optimizers, LEARNING_RATES, strict=True):
            optimizer.param_groups[0]["lr"] = lr * schedule(step, steps)
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
        if checkpoint.due() or step + 1 == steps:
            state = {"model": models.state_dict(), "ema": ema.state_dict(), "step": step + 1}
            checkpoint.save({**state, "optimizers": [optimizer.state_dict() for optimizer in optimizers]})
    ema.copy_to(models.parameters())
    return captioner.eval()


def mean_of(rows: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    return {name: round(float(torch.stack([row[name] for row in rows]).mean()), 3) for name in rows[0]}


def save_captioner(model: BlipForConditionalGeneration, to: Path) -> None:
    """Writes an ordinary BLIP folder in fp16, with the processor's files that older tools look for as well."""
    processor = make_processor()
    model.cpu().half().save_pretrained(to)
    processor.save_pretrained(to)
    processor.image_processor.save_pretrained(to)
    ids = processor.tokenizer.get_vocab()
    (to / "vocab.txt").write_text("\n".join(sorted(ids, key=ids.get)) + "\n", encoding="utf-8")
    print(f"{to}: {sum(f.stat().st_size for f in to.rglob('*') if f.is_file()) / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures and checkpoints (2 GB)")
    parser.add_argument("--drawn", type=Path, help="--work folder of pretrain_base.py, whose pictures are used")
    parser.add_argument("--to", type=Path, default=HERE / "captioner", help="BLIP folder to write")
    parser.add_argument(
        "--pictures", type=int, default=7000, help="how many pictures to render, besides jeans; without --drawn"
    )
    parser.add_argument("--jeans", type=int, default=450, help="how many pairs of front and back of jeans to render")
    parser.add_argument("--steps", type=int, default=2400, help="optimisation steps")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not args.drawn:
        render_base_pictures(args.work, args.pictures)
    render_jeans(args.work, args.jeans)
    pool = load_pool(args.drawn or args.work, args.work, make_processor().image_processor, args.jeans)
    save_captioner(train(pool, args.work, args.steps, device), args.to)


if __name__ == "__main__":
    main()

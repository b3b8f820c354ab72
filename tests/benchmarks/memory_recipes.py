"""GPU memory foretold for the usual recipes, as Markdown: GB at batches of 1 to 64, and the largest batch per card.

python tests/benchmarks/memory_recipes.py
python tests/benchmarks/memory_recipes.py "Stable Diffusion XL"

Needs no GPU and no weights: some seconds for each row.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "text_to_image"), str(ROOT / "tests")]

from models.loading import quiet_libraries  # noqa: E402
from optimization.memory import GB, MemorySettings, trace_step  # noqa: E402
from unet_configs import SD15, SD21, SDXL  # noqa: E402

BATCHES = 1, 4, 16, 64
CARDS = 8, 12, 16, 24, 48, 80  # GB
# The UNet's config, and the pictures' size in pixels.
MODELS = {
    "Stable Diffusion 1.5": (SD15, 512),
    "Stable Diffusion 2.1": (SD21, 768),
    "Stable Diffusion XL": (SDXL, 1024),
}
LORA = {"precision": "bf16", "lora_rank": 16}
ADAFACTOR = {"precision": "pure_bf16", "optimizer": "adafactor"}
RECIPES = {
    "fp32": {},
    "fp16": {"precision": "fp16"},
    "bf16": {"precision": "bf16"},
    "bf16, EMA": {"precision": "bf16", "ema": True},
    "bf16, 8-bit Adam": {"precision": "bf16", "optimizer": "adamw8bit"},
    "pure bf16, Adafactor": ADAFACTOR,
    "LoRA of rank 16, bf16": LORA,
    "LoRA of rank 16, fp16": {**LORA, "precision": "fp16"},
}


def main() -> None:
    quiet_libraries()
    for name in sys.argv[1:] or MODELS:
        print_table(name)


def print_table(name: str) -> None:
    config, pixels = MODELS[name]
    heads = [*(f"batch {batch}" for batch in BATCHES), *(f"in {card} GB" for card in CARDS)]
    print(f"\n{name}, {pixels} px: GB at a batch size, and the largest batch\n\n| | {' | '.join(heads)} |")
    print("|---|" + "---|" * len(heads))
    for recipe, changes in RECIPES.items():
        for checkpointing in (False, True):
            settings = MemorySettings(
                config, height=pixels, width=pixels, gradient_checkpointing=checkpointing, **changes
            )
            print_row(recipe + ", checkpointing" * checkpointing, settings)


def print_row(name: str, settings: MemorySettings) -> None:
    step = trace_step(settings)
    totals = [f"{step.forecast(batch).total / GB:.1f}" for batch in BATCHES]
    batches = [str(step.largest_batch(card) or "none") for card in CARDS]
    print(f"| {' | '.join([name, *totals, *batches])} |", flush=True)


if __name__ == "__main__":
    main()

"""The model card of an uploaded result: README.md with what it was made from, how, and how to draw with it."""

from pathlib import Path

from runs.records import read_run

CARD = "README.md"
MADE = "<!-- Made by train_text_to_image.py, anew at each upload. Take this line away and the card stays. -->"
TOLD = (
    "epochs", "max_train_steps", "repeats", "learning_rate", "lr_scheduler", "train_batch_size",
    "gradient_accumulation_steps", "resolution", "random_flip", "random_affine", "use_ema", "prior_images",
    "caption_dropout", "snr_gamma", "prediction_type", "trigger", "lora_alpha", "revision", "variant",
)  # fmt: skip
PIPELINE = """\
pipeline = StableDiffusionPipeline.from_pretrained("{repository}", torch_dtype=torch.float16).to("cuda")"""
LORA = """\
pipeline = StableDiffusionPipeline.from_pretrained("{base}", torch_dtype=torch.float16).to("cuda")
pipeline.load_lora_weights("{repository}")"""


def model_card(folder: Path, repository: str) -> str:
    """The card of the run in `folder`, uploaded to `repository`."""
    from huggingface_hub import ModelCardData

    run, pictures = read_run(folder), _last_validation(folder)
    arguments, is_lora = run["arguments"], run["trained"] != "UNet"
    base = run["base_model"]
    local = Path(base).is_absolute()
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=None if local else base,
        tags=["stable-diffusion", "stable-diffusion-diffusers", "text-to-image", *(["lora"] if is_lora else [])],
    )
    prompt = repr(run["example_prompts"][0])
    shown_base = Path(base).name if local else base
    load = (LORA if is_lora else PIPELINE).format(
        repository=repository, base=f"/path/to/{shown_base}" if local else base
    )
    count = sum(size["pictures"] for size in run["sizes"])
    settings = {name: arguments[name] for name in TOLD if arguments.get(name) not in (None, False, 0)}
    if "max_train_steps" in settings:
        settings.pop("epochs", None)
    settings |= {"steps": run["steps"], "precision": run["mixed_precision"], "seed": run["seed"]}
    shown = "".join(f"![after training](validation/{path.name})\n" for path in pictures)
    return f"""\
---
{data.to_yaml()}
---
{MADE}

# {repository}

{run["trained"]} fine-tuned from **{shown_base}** on {count} captioned pictures.

{shown}
```python
import torch
from diffusers import StableDiffusionPipeline

{load}
pipeline({prompt}).images[0].save("picture.png")
```

| setting | value |
|---|---|
{"".join(f"| {name} | {_in_a_cell(value)} |" + chr(10) for name, value in settings.items())}
The whole record is in `run.json`, the losses are in `metrics.jsonl`.
"""


def _in_a_cell(value: object) -> str:
    """Of a table in Markdown."""
    return " ".join(str(value).split()).replace("|", r"\|")


def is_ours(card: Path) -> bool:
    """Whether this is a card of `model_card`, which nobody has taken over since."""
    return MADE in card.read_text(encoding="utf-8", errors="replace")


def _last_validation(folder: Path) -> list[Path]:
    """The pictures that --validation_prompts drew last."""
    drawn = sorted((folder / "validation").glob("step-*.png"))
    step = drawn[-1].name.rsplit("-", 1)[0] if drawn else ""
    return [path for path in drawn if path.name.rsplit("-", 1)[0] == step]

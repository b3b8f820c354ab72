"""The model card of an uploaded result: a README.md that says what it was made from, how, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runs.records import is_lora, read_run

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

CARD_FILE = "README.md"
# Cards on the hub are recognised by this line, so it must not change.
GENERATED_MARK = (
    "<!-- Made by train_text_to_image.py, anew at each upload. Take this line away and the card stays. -->"
)
SHOWN_ARGUMENTS = (
    "epochs", "max_train_steps", "samples", "repeats", "learning_rate", "lr_scheduler", "train_batch_size",
    "gradient_accumulation_steps", "resolution", "random_flip", "random_affine", "use_ema", "prior_images",
    "caption_dropout", "short_captions", "shuffle_tags", "keep_tags", "tag_dropout", "mask_from_alpha",
    "unmasked_weight", "snr_gamma", "timestep_bias_multiplier", "prediction_type", "trigger", "lora_alpha",
    "revision", "variant",
)  # fmt: skip
LOAD_PIPELINE = """\
pipeline = DiffusionPipeline.from_pretrained("{repository}", torch_dtype=torch.float16).to("cuda")"""
LOAD_LORA = """\
pipeline = DiffusionPipeline.from_pretrained("{base}", torch_dtype=torch.float16).to("cuda")
pipeline.load_lora_weights("{repository}")"""
TEMPLATE = """\
---
{metadata}
---
{mark}

# {repository}

{trained} fine-tuned from **{base}** on {pictures} captioned pictures.

{images}
```python
import torch
from diffusers import DiffusionPipeline

{load}
pipeline({prompt}).images[0].save("picture.png")
```

| setting | value |
|---|---|
{rows}
The whole record is in `run.json`, the losses are in `metrics.jsonl`.
"""


def make_model_card(folder: Path, repository: str) -> str:
    """The text of the card for the run in `folder`, uploaded to `repository`."""
    run = read_run(folder)
    assert run is not None  # only a finished run is uploaded
    base_path = Path(run["base_model"])
    base = base_path.name if base_path.is_absolute() else run["base_model"]  # a local path says nothing to others
    load = LOAD_LORA if is_lora(run) else LOAD_PIPELINE
    return TEMPLATE.format(
        metadata=_metadata(run).to_yaml(),
        mark=GENERATED_MARK,
        repository=repository,
        trained=run["trained"],
        base=base,
        pictures=sum(size["pictures"] for size in run["sizes"]),
        images="".join(f"![after training](validation/{path.name})\n" for path in _last_validation_images(folder)),
        load=load.format(repository=repository, base=f"/path/to/{base}" if base_path.is_absolute() else base),
        prompt=repr(run["example_prompts"][0]),
        rows="".join(f"| {name} | {_table_cell(value)} |\n" for name, value in _settings(run).items()),
    )


def _metadata(run: Mapping[str, Any]) -> ModelCardData:
    """The card's YAML header, which the hub reads."""
    from huggingface_hub import ModelCardData

    return ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=None if Path(run["base_model"]).is_absolute() else run["base_model"],
        tags=["stable-diffusion", "stable-diffusion-diffusers", "text-to-image", *(["lora"] if is_lora(run) else [])],
    )


def _settings(run: Mapping[str, Any]) -> dict[str, Any]:
    arguments = run["arguments"]
    settings = {name: arguments[name] for name in SHOWN_ARGUMENTS if arguments.get(name) not in (None, False, 0)}
    if "max_train_steps" in settings or "samples" in settings:  # in the place of the number of epochs
        settings.pop("epochs", None)
    return settings | {"steps": run["steps"], "precision": run["mixed_precision"], "seed": run["seed"]}


def _table_cell(value: object) -> str:
    """A value in one line, with | escaped for a Markdown table."""
    return " ".join(str(value).split()).replace("|", r"\|")


def is_generated_card(card: Path) -> bool:
    """Whether the card is one of `make_model_card` whose mark nobody has removed."""
    return GENERATED_MARK in card.read_text(encoding="utf-8", errors="replace")


def _last_validation_images(folder: Path) -> list[Path]:
    """The images of --validation_prompts from the last step that has some."""
    images = sorted((folder / "validation").glob("step-*.png"))
    step = images[-1].name.rsplit("-", 1)[0] if images else ""
    return [path for path in images if path.name.rsplit("-", 1)[0] == step]

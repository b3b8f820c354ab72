"""What a training run left in its folder."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["train_loss"] for row in rows(folder)]


def weights(folder: Path, part: str = "unet") -> dict[str, torch.Tensor]:
    return load_file(folder / part / "diffusion_pytorch_model.safetensors")


def assert_same_bits(one: Path, other: Path, step: int) -> None:
    """Weights, EMA, the optimizer after `step`, and the rows of metrics.jsonl without the timings."""
    assert_same_tensors(one, other)
    states = (torch.load(f / f"checkpoint-{step}" / "training_state.pt", weights_only=True) for f in (one, other))
    left, right = (state["optimizer"]["state"] for state in states)
    assert all(torch.equal(left[i][name], right[i][name]) for i in left for name in left[i])
    logged = [rows_but_timings(folder) for folder in (one, other)]
    assert logged[0] == logged[1] and len(logged[0]) == step


def assert_same_tensors(one: Path, other: Path, files: str = "**/*.safetensors") -> None:
    for path in sorted(one.glob(files)):
        if "cache" not in path.parts:
            left, right = load_file(path), load_file(other / path.relative_to(one))
            assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left), path


def rows_but_timings(folder: Path) -> list[dict]:
    timings = ("images_per_second", "peak_memory_gb")
    return [{name: value for name, value in row.items() if name not in timings} for row in rows(folder)]

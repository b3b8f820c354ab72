"""The tokenizer of a one-file model, which the file does not hold: from a folder, or CLIP's from the hub."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from transformers import CLIPTokenizer

from models.folders import loading_errors
from runtime.errors import UserError
from runtime.hub import asking_hub

CLIP = "openai/clip-vit-large-patch14"  # Stable Diffusion 2.x has the same vocabulary
VOCABULARY = ("vocab.json", "merges.txt")
CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
OTHER_FILES = ("tokenizer.json", CONFIG, SPECIAL_TOKENS, "added_tokens.json")


def find_tokenizer(folder: Path) -> Path:
    """`folder` itself, or the `tokenizer/` in it. UserError if neither holds a CLIP tokenizer."""
    for candidate in (folder / "tokenizer", folder):
        if all((candidate / name).is_file() for name in VOCABULARY) or (candidate / "tokenizer.json").is_file():
            return candidate
    raise UserError(
        f"--tokenizer {folder}: no tokenizer in this folder (vocab.json and merges.txt), nor in a tokenizer/ below it"
    )


def hash_tokenizer(folder: Path) -> str | None:
    """64 hex digits of the files that make the tokenizer that `find_tokenizer` finds; None if there is none."""
    try:
        tokenizer = find_tokenizer(folder)
    except UserError:
        return None
    digest = hashlib.sha256()
    for path in _files_in(tokenizer):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _files_in(folder: Path) -> list[Path]:
    return [folder / name for name in (*VOCABULARY, *OTHER_FILES) if (folder / name).is_file()]


def locate_tokenizer_files(folder: Path | None, asked: str, cache_dir: Path | None) -> list[Path]:
    """The files in `folder`; None: CLIP's vocabulary, from the hub or its cache.

    UserError that says how to bring a tokenizer, where the hub cannot be reached.
    """
    if folder:
        return _files_in(folder)
    remedy = "run `bash job.sh setup` with this MODEL where there is internet, or name a folder: --tokenizer FOLDER"
    with asking_hub(f"{asked}: a file holds no tokenizer, and {CLIP} is not available from the hub ({remedy})"):
        return [Path(hf_hub_download(CLIP, name, cache_dir=cache_dir)) for name in VOCABULARY]


def write_tokenizer(files: list[Path], padding: str, to: Path, is_second: bool) -> None:
    """The folder `to` of these files. Without a config among them it pads with `padding`; a second tokenizer always,
    as that is all in which it differs from the first."""
    to.mkdir()
    for path in files:
        shutil.copyfile(path, to / path.name)
    if not (to / CONFIG).exists():
        end = "<|endoftext|>"
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": "<|startoftext|>"}
        config |= {"eos_token": end, "unk_token": end, "pad_token": padding}
        _write_config(to / CONFIG, config)
    elif is_second:
        for path in (to / CONFIG, to / SPECIAL_TOKENS):
            if path.exists():
                _write_config(path, {**json.loads(path.read_text(encoding="utf-8")), "pad_token": padding})


def _write_config(path: Path, config: dict[str, Any]) -> None:
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check_vocabulary(folder: Path, name: str, vocab_size: int, asked: str) -> None:
    """UserError if the tokenizer `name` in `folder` does not have as many tokens as its text encoder."""
    with loading_errors(folder, name):
        found = len(CLIPTokenizer.from_pretrained(folder / name))
    if found != vocab_size:
        raise UserError(
            f"{asked}: the tokenizer has {found} tokens, the text encoder in the file {vocab_size}; name the "
            "tokenizer that belongs to it: --tokenizer FOLDER"
        )

"""The length of captions: cut at the end of a sentence, and counted in tokens as training reads them."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

from huggingface_hub import snapshot_download
from transformers import CLIPTokenizer

from bases.tokenizer_files import OTHER_FILES, VOCABULARY
from metadata.reading import ScannedRow
from models.text_encoding import chunks_of, count_all_tokens
from runtime.errors import UserError, first_line
from runtime.hub import asking_hub, refuse_missing_path

SENTENCE_BREAK = re.compile(r"[.!?][\"')\]]*(?=\s|$)")
EMPTY_VOCABULARY = 16  # tokens at most in the tokenizer that transformers makes up where files are missing
TRAINING_CHUNKS = 3  # of 77 tokens, the default of training's --max_token_chunks
LOOSE_ENDS = " ,;:-–—(&/"


def whole_sentences(text: str) -> str:
    """The text up to the end of its last whole sentence; all of it where no sentence ends."""
    ends = [match.end() for match in SENTENCE_BREAK.finditer(text)]
    return text[: ends[-1]] if ends else text


def cut_words(text: str, max_words: int | None) -> str:
    """At most `max_words` words (None: no limit), cut at the end of a sentence where there is one."""
    words = text.split()
    if max_words is None or len(words) <= max_words:
        return text
    cut = " ".join(words[:max_words])
    return whole_sentences(cut) if SENTENCE_BREAK.search(cut) else cut.rstrip(LOOSE_ENDS)


def load_caption_tokenizer(name: str) -> CLIPTokenizer:
    """The CLIP tokenizer of a Stable Diffusion model, a folder or a hub id; downloads nothing else of it.

    Raises UserError where there is none.
    """
    asked, reason = f"--tokenizer {name}: no CLIP tokenizer can be loaded from it", "it has no tokenizer files"
    folder = Path(name)
    if not folder.is_dir():
        refuse_missing_path(f"--tokenizer {name}", name)
        with asking_hub(asked):
            folder = Path(snapshot_download(name, allow_patterns=["tokenizer/*", *VOCABULARY, *OTHER_FILES]))
    for subfolder in ("tokenizer", ""):
        try:
            tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder=subfolder)
        except Exception as error:  # those of broken files have no common class
            reason = first_line(error)
            continue
        if len(tokenizer) > EMPTY_VOCABULARY:
            return tokenizer
    raise UserError(f"{asked}: {reason}")


def describe_lengths(tokenizer: CLIPTokenizer, captions: Sequence[str], max_chunks: int) -> str:
    """One line: how many tokens the captions have, and in how many chunks training reads them."""
    chunk = tokenizer.model_max_length
    tokens = count_all_tokens(tokenizer, captions)
    counts = [tokens[caption] for caption in captions]
    chunks = Counter(chunks_of(tokenizer, count, max_chunks) for count in counts)
    read = ", ".join(f"{chunks[number]} in {_count_chunks(number)}" for number in sorted(chunks))
    cut = sum(count > max_chunks * (chunk - 2) for count in counts)  # a chunk holds its start and end mark, too
    spread = f"{min(counts) + 2} to {max(counts) + 2}, median {median(counts) + 2:.0f}"
    ends = f"; too long and cut: {cut} (--max_token_chunks)" if cut else ""
    return f"tokens of {len(captions)} captions: {spread}; training reads {read} of CLIP's {chunk} tokens{ends}"


def print_lengths(tokenizer: CLIPTokenizer, name: str, rows: Iterable[ScannedRow]) -> None:
    """Prints how long the captions are by the tokenizer of the model `name`; nothing where there are no captions."""
    if captions := [caption for row in rows for caption in row.captions]:
        print(f"{describe_lengths(tokenizer, captions, TRAINING_CHUNKS)} (by the tokenizer of {name})", flush=True)


def _count_chunks(number: int) -> str:
    return "1 chunk" if number == 1 else f"{number} chunks"

"""Captions of a length that suits training: cut where it harms least, and counted as the trainer will read them."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import median

from transformers import CLIPTokenizer

from data.metadata import ScannedRow
from models.text_encoding import count_chunks, count_tokens
from runtime.errors import UserError, first_line

SENTENCE_ENDS = re.compile(r"[.!?][\"')\]]*(?=\s|$)")
EMPTY = 16  # tokens at most in a tokenizer that transformers makes where there are no files
TRAINING_READS = 3  # chunks of CLIP's 77 tokens, as --max_token_chunks of training has it
LOOSE_ENDS = " ,;:-–—(&/"


def whole_sentences(text: str) -> str:
    """The text up to the end of its last whole sentence; all of it where no sentence ends."""
    ends = [match.end() for match in SENTENCE_ENDS.finditer(text)]
    return text[: ends[-1]] if ends else text


def cut_words(text: str, max_words: int | None) -> str:
    """At most `max_words` words (None: all): whole sentences where one fits, else words without a loose comma."""
    words = text.split()
    if max_words is None or len(words) <= max_words:
        return text
    cut = " ".join(words[:max_words])
    return whole_sentences(cut) if SENTENCE_ENDS.search(cut) else cut.rstrip(LOOSE_ENDS)


def load_caption_tokenizer(name: str) -> CLIPTokenizer:
    """The CLIP tokenizer of a Stable Diffusion model, a folder or a hub id; nothing else of it is fetched.

    Raises UserError where there is none.
    """
    why = "its files are not there"
    for subfolder in ("tokenizer", ""):
        try:
            tokenizer = CLIPTokenizer.from_pretrained(name, subfolder=subfolder)
        except Exception as error:  # the hub's errors have no common class
            why = first_line(error)
            continue
        if len(tokenizer) > EMPTY:
            return tokenizer
    raise UserError(f"--tokenizer {name}: no CLIP tokenizer to be had from it: {why}")


def describe_lengths(tokenizer: CLIPTokenizer, captions: Sequence[str], max_chunks: int) -> str:
    """One line: how many tokens the captions have, and in how many chunks each is read."""
    room = tokenizer.model_max_length
    counts = [count_tokens(tokenizer, caption) + 2 for caption in captions]  # with the marks of start and end
    chunks = Counter(count_chunks(tokenizer, caption, max_chunks) for caption in captions)
    read = ", ".join(f"{chunks[number]} in {_chunks(number)}" for number in sorted(chunks))
    cut = sum(count - 2 > max_chunks * (room - 2) for count in counts)
    spread = f"{min(counts)} to {max(counts)}, half of them up to {median(counts):.0f}"
    ends = f"; {cut} of them are cut at the end (--max_token_chunks)" if cut else ""
    return f"tokens of {len(captions)} captions: {spread}; CLIP's {room} at a time, training reads {read}{ends}"


def print_lengths(tokenizer: CLIPTokenizer, name: str, rows: Iterable[ScannedRow]) -> None:
    """Prints how long the captions are to training, by the tokenizer of the model `name`; nothing where none is."""
    if captions := [caption for row in rows for caption in row.captions]:
        print(f"{describe_lengths(tokenizer, captions, TRAINING_READS)} (by the tokenizer of {name})", flush=True)


def _chunks(number: int) -> str:
    return "1 chunk" if number == 1 else f"{number} chunks"

"""Makes the starter's tokenizer: CLIP's own byte-pair merges, reduced to those that common words need.

CLIP's merges (bpe_simple_vocab_16e6.txt.gz, OpenAI, MIT licence; in PyPI's clip-anytorch, for one) are ranked by how
common they are. Kept are all that build one of the first `--words` whole words or a word of the renderer's captions;
those words get exactly CLIP's tokens, others a few more.

The tokenizer in base/ has merges for a hundred further words ('lambda', 'metadata'): it was made when the words were
still taken from the source text of the renderer. It stays, as the text encoder was trained with its token ids.

    python make_tokenizer.py --clip_merges bpe_simple_vocab_16e6.txt.gz --to FOLDER
"""

import argparse
import gzip
import json
import re
from pathlib import Path

import numpy as np

from describe import caption_of
from render_garments import sample_spec

SPECIAL_TOKENS = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}


def byte_characters() -> list[str]:
    """The 256 characters that stand for the bytes in CLIP's vocabulary, in its order (from GPT-2's encoder)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def caption_words(garments: int = 2000) -> set[str]:
    """Every word of the renderer's captions, jeans included: of the longest captions of this many random garments."""
    specs = [sample_spec(seed, kind) for seed in range(garments) for kind in (None, "jeans")]
    captions = [
        caption_of(spec, np.random.default_rng([spec.seed, length]), length) for spec in specs for length in (12, 150)
    ]
    return set(re.findall(r"[a-z]+", " ".join(captions).lower()))


def merges_for(word: str, ranks: dict[tuple[str, str], int]) -> list[tuple[str, str]]:
    """The merges that build `word`, in the order in which byte-pair encoding applies them."""
    parts, used = [*word[:-1], word[-1] + "</w>"], []
    while pairs := [p for p in zip(parts, parts[1:], strict=False) if p in ranks]:
        best = min(pairs, key=ranks.get)
        used.append(best)
        joined, i = [], 0
        while i < len(parts):
            merge = tuple(parts[i : i + 2]) == best
            joined.append("".join(parts[i : i + 1 + merge]))
            i += 1 + merge
        parts = joined
    return used


def reduce_merges(clip_merges: Path, words: int) -> list[tuple[str, str]]:
    """The merges that build the first `words` whole words of CLIP's vocabulary and all words of captions, by rank."""
    lines = gzip.decompress(clip_merges.read_bytes()).decode().split("\n")
    merges = [
        tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]
    ]  # after CLIP's vocabulary come unused ones
    ranks = {merge: i for i, merge in enumerate(merges)}
    whole_words = [a + b for a, b in merges if re.fullmatch(r"[a-z]{2,}</w>", a + b)]
    kept_words = {word.removesuffix("</w>") for word in whole_words[:words]} | caption_words()
    return sorted({merge for word in kept_words for merge in merges_for(word, ranks)}, key=ranks.get)


def save_tokenizer(merges: list[tuple[str, str]], folder: Path) -> int:
    """Writes the files that CLIPTokenizer reads; returns the size of the vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    characters = byte_characters()
    tokens = [*characters, *(c + "</w>" for c in characters), *(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False)
    (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
    rows = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "do_lower_case": True,
        "add_prefix_space": False,
        **SPECIAL_TOKENS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(SPECIAL_TOKENS, indent=2) + "\n")
    return len(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip_merges", type=Path, required=True, help="bpe_simple_vocab_16e6.txt.gz")
    parser.add_argument("--to", type=Path, required=True, help="tokenizer folder to write")
    parser.add_argument("--words", type=int, default=6000, help="how many of CLIP's first whole words to keep")
    args = parser.parse_args()
    tokens = save_tokenizer(reduce_merges(args.clip_merges, args.words), args.to)
    print(f"{tokens} tokens in {args.to}")


if __name__ == "__main__":
    main()

"""Makes the starter's tokenizer: CLIP's own byte-pair merges, reduced to those that common words need.

CLIP's merges (bpe_simple_vocab_16e6.txt.gz, OpenAI, MIT licence; in PyPI's clip-anytorch, for one) are ranked by how
common they are. Kept are all that build one of the first `--words` whole words or a word of the renderer's captions;
those words get exactly CLIP's tokens, others a few more. The result lies in base/tokenizer already.

    python make_tokenizer.py --clip_merges bpe_simple_vocab_16e6.txt.gz --to base/tokenizer
"""

import argparse
import gzip
import inspect
import json
import re
from pathlib import Path

import describe
import render_garments


def byte_characters() -> list[str]:
    """The 256 characters that stand for the bytes in CLIP's vocabulary, in its order (from GPT-2's encoder)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def split(word: str, ranks: dict[tuple[str, str], int]) -> list[tuple[str, str]]:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clip_merges", type=Path, required=True, help="bpe_simple_vocab_16e6.txt.gz")
    parser.add_argument("--to", type=Path, required=True, help="tokenizer folder to write")
    parser.add_argument("--words", type=int, default=6000, help="how many of CLIP's first whole words to keep")
    args = parser.parse_args()
    lines = gzip.decompress(args.clip_merges.read_bytes()).decode().split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    ranks = {merge: i for i, merge in enumerate(merges)}
    whole = [a + b for a, b in merges if re.fullmatch(r"[a-z]{2,}</w>", a + b)]
    captions = set(re.findall(r"[a-z]+", (inspect.getsource(describe) + inspect.getsource(render_garments)).lower()))
    words = {w.removesuffix("</w>") for w in whole[: args.words]} | captions
    kept = sorted({m for w in words for m in split(w, ranks)}, key=ranks.get)
    characters = byte_characters()
    tokens = [*characters, *(c + "</w>" for c in characters), *(a + b for a, b in kept)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    args.to.mkdir(parents=True, exist_ok=True)
    vocabulary = json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False)
    (args.to / "vocab.json").write_text(vocabulary, encoding="utf-8")
    rows = ["#version: 0.2", *(f"{a} {b}" for a, b in kept)]
    (args.to / "merges.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")
    special = dict(  # noqa: C408
        bos_token="<|startoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "do_lower_case": True,
        "add_prefix_space": False,
        **special,
    }
    (args.to / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (args.to / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    print(f"{len(tokens)} tokens, {len(words)} words in {args.to}")


if __name__ == "__main__":
    main()

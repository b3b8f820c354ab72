"""What the starter captioner says: one caption for each thing a render can show, read back word for word."""

import re
import string
from itertools import product
from types import SimpleNamespace

from transformers import BertTokenizer

from describe import DETAILS, NAMES, PAIRS, PATTERN_WORDS
from garments import GARMENTS
from render_garments import COLOURS, CORNERS, PATTERNS, Spec

SECOND_COLOURS = ("black", "navy", "brown", "white", "beige")  # of patterns, as sample_spec draws them
VIEWS = ("front", "back")
# What the vision model is also asked while it learns; None: no pattern, no marker.
ANSWERS = {
    "kind": tuple(GARMENTS),
    "colour": tuple(COLOURS),
    "pattern": PATTERNS,
    "second": (None, *SECOND_COLOURS),
    "fold": ("flat", "half", "knee", "cuffs"),
    "marker": (None, *CORNERS),
    "view": VIEWS,
}
FOLD_WORDS = {
    "flat": "laid flat",
    "half": "folded in half",
    "knee": "laid flat with one leg folded up at the knee",
    "cuffs": "laid flat with both hems rolled up into cuffs",
}
PROMPTS = ("a photograph of", "a photo of", "a picture of", "an image of", "this is")
PUNCTUATED = ("t-shirt",)  # words that the tokenizer would take apart and put together with spaces


def caption_text(spec: Spec) -> str:
    """The caption of a spec, at most 60 tokens; front or back is not told where the garment is folded in half."""
    words = spec.colour if spec.pattern == "plain" else f"{spec.colour} and {spec.second} {_adjective(spec.pattern)}"
    some = "A single pair of" if spec.kind in PAIRS else "A single"
    text = f"{some} {words} {NAMES[spec.kind][0]} {FOLD_WORDS[spec.fold]} on a white background"
    if spec.fold != "half":
        text += f", seen from the {spec.view}"
    if spec.marker:
        text += f", with a small black square reference marker near the {spec.marker} corner"
    return text + "." + (f" {DETAILS[spec.kind, spec.view][0]}" if spec.fold != "half" else "")


def _adjective(pattern: str) -> str:
    return PATTERN_WORDS[pattern][0][0]


def read_caption(text: str) -> dict[str, str | None] | None:
    """What a caption says, {'kind': 'jeans', …} as in ANSWERS; None for one that caption_text would not write.

    'view' is None where it is not told.
    """
    if not (found := _CAPTION.fullmatch(text.strip())):
        return None
    said = found.groupdict()
    said["kind"] = next(kind for kind in GARMENTS if NAMES[kind][0] == said["kind"])
    said["pattern"] = next((p for p in PATTERN_WORDS if _adjective(p) == said["pattern"]), "plain")
    said["fold"] = next(fold for fold, words in FOLD_WORDS.items() if words == said["fold"])
    if (said["view"] is None) != (said["fold"] == "half") or caption_text(SimpleNamespace(**said)) != text.strip():
        return None
    return said


def _any(words) -> str:
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


_CAPTION = re.compile(
    rf"A single (?:pair of )?(?P<colour>{_any(COLOURS)})"
    rf"(?: and (?P<second>{_any(COLOURS)}) (?P<pattern>{_any(map(_adjective, PATTERN_WORDS))}))?"
    rf" (?P<kind>{_any(NAMES[kind][0] for kind in GARMENTS)}) (?P<fold>{_any(FOLD_WORDS.values())})"
    rf" on a white background(?:, seen from the (?P<view>{_any(VIEWS)}))?"
    rf"(?:, with a small black square reference marker near the (?P<marker>{_any(CORNERS)}) corner)?\..*"
)


def make_tokenizer() -> BertTokenizer:
    """BERT's, with the captions' words whole and every other text in letters; '[DEC]' starts a caption, as in BLIP."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    characters = [c for c in string.printable if not c.isspace()]
    words = sorted({word for text in (*_every_wording(), *PROMPTS) for word in re.findall(r"\w+", text)})
    vocabulary = dict.fromkeys([*special, *characters, *(f"##{c}" for c in characters), *words])
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = BertTokenizer(vocab=ids, do_lower_case=False, strip_accents=True, bos_token="[DEC]")
    tokenizer.add_tokens(list(PUNCTUATED))
    return tokenizer


def _every_wording() -> list[str]:
    """Captions in which every word that captions may have comes up."""
    looks = [("plain", None), *product(PATTERN_WORDS, SECOND_COLOURS)]
    kinds = product(GARMENTS, VIEWS, FOLD_WORDS)
    specs = [Spec(k, "red", "plain", None, v, fold, c, 0) for (k, v, fold), c in product(kinds, (None, *CORNERS))]
    specs += [Spec("shirt", colour, *look, "front", "flat", None, 0) for colour, look in product(COLOURS, looks)]
    return [caption_text(spec) for spec in specs]

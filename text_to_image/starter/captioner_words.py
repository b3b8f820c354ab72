"""The starter captioner's captions: one fixed wording for each spec, a strict parser, and the tokenizer."""

import re
import string
from itertools import product
from types import SimpleNamespace

from transformers import BertTokenizer

from describe import DETAILS, NAMES, PATTERN_WORDS, PLURAL_KINDS
from garments import GARMENTS
from render_garments import COLOURS, CORNERS, PATTERNS, Spec

SECOND_COLOURS = ("black", "navy", "brown", "white", "beige")  # of patterns, those that sample_spec chooses
VIEWS = ("front", "back")
# The attributes of a spec and their values; None: no pattern, no marker.
ATTRIBUTES = {
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
PUNCTUATED = ("t-shirt",)  # words that the tokenizer would split, and decode with spaces in between


def caption_text(spec: Spec) -> str:
    """The caption of a spec, at most 60 tokens. Front or back is not named if the garment is folded in half."""
    words = spec.colour if spec.pattern == "plain" else f"{spec.colour} and {spec.second} {_adjective(spec.pattern)}"
    some = "A single pair of" if spec.kind in PLURAL_KINDS else "A single"
    text = f"{some} {words} {NAMES[spec.kind][0]} {FOLD_WORDS[spec.fold]} on a white background"
    if spec.fold != "half":
        text += f", seen from the {spec.view}"
    if spec.marker:
        text += f", with a small black square reference marker near the {spec.marker} corner"
    return text + "." + (f" {DETAILS[spec.kind, spec.view][0]}" if spec.fold != "half" else "")


def _adjective(pattern: str) -> str:
    return PATTERN_WORDS[pattern][0][0]


def read_caption(text: str) -> dict[str, str | None] | None:
    """The attributes in a caption, {'kind': 'jeans', …} as in ATTRIBUTES; None if caption_text would not write it.

    'view' is None where the caption does not name it.
    """
    if not (found := _CAPTION.fullmatch(text.strip())):
        return None
    named = found.groupdict()
    named["kind"] = next(kind for kind in GARMENTS if NAMES[kind][0] == named["kind"])
    named["pattern"] = next((p for p in PATTERN_WORDS if _adjective(p) == named["pattern"]), "plain")
    named["fold"] = next(fold for fold, words in FOLD_WORDS.items() if words == named["fold"])
    if (named["view"] is None) != (named["fold"] == "half") or caption_text(SimpleNamespace(**named)) != text.strip():
        return None
    return named


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
    """A BERT tokenizer with each word of the captions as a token, and single characters for all other text.

    '[DEC]' starts a caption, as in BLIP.
    """
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]"]
    characters = [c for c in string.printable if not c.isspace()]
    words = sorted({word for text in (*_every_wording(), *PROMPTS) for word in re.findall(r"\w+", text)})
    vocabulary = dict.fromkeys([*special, *characters, *(f"##{c}" for c in characters), *words])
    ids = {token: i for i, token in enumerate(vocabulary)}
    tokenizer = BertTokenizer(vocab=ids, do_lower_case=False, strip_accents=True, bos_token="[DEC]")
    tokenizer.add_tokens(list(PUNCTUATED))
    return tokenizer


def _every_wording() -> list[str]:
    """Captions that together contain every word that captions can have."""
    looks = [("plain", None), *product(PATTERN_WORDS, SECOND_COLOURS)]
    kinds = product(GARMENTS, VIEWS, FOLD_WORDS)
    specs = [Spec(k, "red", "plain", None, v, fold, c, 0) for (k, v, fold), c in product(kinds, (None, *CORNERS))]
    specs += [Spec("shirt", colour, *look, "front", "flat", None, 0) for colour, look in product(COLOURS, looks)]
    return [caption_text(spec) for spec in specs]

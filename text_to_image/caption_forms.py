"""Shorter forms of a caption, so that a model trained on long captions also answers to a few words.

`A single pair of denim jeans laid flat on a white background, seen from the back. The legs are apart.` also teaches
'A single pair of denim jeans laid flat on a white background, seen from the back.', the same without 'seen from the
back', 'A single pair of denim jeans' and 'denim jeans'.
"""

import re

SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"'(]?[A-Z0-9])")
CLAUSE_END = re.compile(r"(?<!\d)[,:]|[,:](?!\d)|;")  # not within 1,000 or 10:30
# Where the name of the thing ends and its place, posture or surroundings begin.
LOCATIVE = re.compile(
    r"(?<!\d)[,:.]|[,:.](?!\d)|;|\s[(\"]|\s(?:laid|lying|lies|placed|arranged|spread|hanging|standing|sitting|shown|seen|"
    r"photographed|isolated|is|are|on|in|at|against|over|under|near|with|from|that|which)\b"
)
NOT_THE_THING = re.compile(
    r"^(?:(?:a|an|the|one|this|some|single|individual)\s+"
    r"|(?:pair|piece|set|photo|photograph|picture|image|shot|view|close-up)s?\s+of\s+)+",
    re.IGNORECASE,
)


def caption_forms(caption: str) -> tuple[tuple[str, ...], ...]:
    """The forms of one caption in groups that are drawn equally often; no form stands in two groups.

    (the caption,), (its first sentence, that one's first clause), (the thing it names, with and without determiner),
    (the first sentence with one other sentence, ...). A caption of a few words has one group.
    """
    caption = " ".join(caption.split())
    first, *others = SENTENCE_END.split(caption)
    thing = LOCATIVE.split(first, maxsplit=1)[0].strip()
    groups = [
        [caption],
        [first, _first_clause(first)],
        [thing, _bare(thing)],
        [f"{first} {other}" for other in others],
    ]
    return _without_repeats(groups)


def first_sentence(caption: str) -> str:
    return SENTENCE_END.split(" ".join(caption.split()))[0]


def _first_clause(sentence: str) -> str:
    """Up to the first comma, unless that stands in quotes or brackets."""
    clause = CLAUSE_END.split(sentence, maxsplit=1)[0].strip()
    return clause if clause.count('"') % 2 == 0 and clause.count("(") == clause.count(")") else sentence


def _bare(thing: str) -> str:
    """'A single pair of denim jeans' becomes 'denim jeans'."""
    return NOT_THE_THING.sub("", thing)


def _without_repeats(groups: list[list[str]]) -> tuple[tuple[str, ...], ...]:
    """Each form once, in the first group that has it; empty forms and empty groups left out."""
    seen: set[str] = {""}
    kept = []
    for group in groups:
        fresh = [form for form in dict.fromkeys(group) if form not in seen]
        seen.update(fresh)
        kept.append(tuple(fresh))
    return tuple(group for group in kept if group)

"""Shorter forms of a caption, so that a model trained on long captions also answers to a few words.

`A single pair of denim jeans laid flat on a white background, seen from the back. The legs are apart.` also teaches
'A single pair of denim jeans laid flat on a white background, seen from the back.', the same without 'seen from the
back', 'A single pair of denim jeans' and 'denim jeans'.
"""

import re

ABBREVIATIONS = ("Dr", "Mr", "Mrs", "Ms", "St", "No", "vs", "ca", "approx")
SENTENCE_END = re.compile(
    "".join(rf"(?<!\b{short}\.)" for short in ABBREVIATIONS) + r"(?<=[.!?])\s+(?=[\"'(]?[A-Z0-9])"
)
CLAUSE_END = re.compile(r"(?<!\d)[,:]|[,:](?!\d)|;")  # not within 1,000 or 10:30
# Where the name of the thing ends and its place, posture or surroundings begin.
PLACE = re.compile(
    r"\.+$|\s(?:laid|lying|lies|placed|arranged|spread|hanging|standing|sitting|shown|seen|photographed|isolated|is|are|on"
    r"|in|at|against|over|under|near|with|from|that|which)\b"
)
THING_END = re.compile(rf"{CLAUSE_END.pattern}|\s[(\"]|{PLACE.pattern}")
# Of 'A blue, short-sleeved shirt' and 'A large (XL) shirt' what comes before the comma and the bracket.
HALF_A_THING = re.compile(
    r"(?:an?|the|one|this|some)\s+(?:black|white|gr[ae]y|red|orange|yellow|green|turquoise|blue|navy|purple|pink|brown|beige"
    r"|golden|silver|dark|light|pale|bright|large|big|small|little|tiny|long|short|tall|wide|narrow|old|new|young|vintage"
    r"|modern|beautiful|simple|plain|soft|thick|thin|round|square|wooden|woollen|woolen|cotton|leather)",
    re.IGNORECASE,
)
# With what captioners begin before they come to the thing.
LEAD_IN = re.compile(
    r"^(?:in\s+(?:the|this)\s+(?:photo|photograph|picture|image),?\s+)?"
    r"(?:(?:there(?:\s+(?:is|are)|['’]s)|(?:this|it)\s+is|it['’]s|these\s+are|(?:we|you|one)\s+(?:can\s+)?sees?"
    r"|(?:the|this)\s+(?:photo|photograph|picture|image)\s+(?:shows|depicts|features))\s+)?",
    re.IGNORECASE,
)
POINTING = frozenset({"he", "it", "one", "she", "that", "there", "these", "they", "this", "those", "we", "you"})
NOT_THE_THING = re.compile(
    r"^(?:(?:a|an|the|one|this|some|single|individual)\s+"
    r"|(?:pair|piece|set|photo|photograph|picture|image|shot|view|close-up)s?\s+of\s+)+",
    re.IGNORECASE,
)


def caption_variants(caption: str) -> tuple[tuple[str, ...], ...]:
    """The forms of one caption in groups that are drawn equally often; no form stands in two groups.

    (the caption,), (its first sentence, that one's first clause), (the thing it names,), (that without determiner,),
    (the first sentence with one other sentence, ...). Both names of the thing are one group where the caption is a
    single sentence, which would itself be read only one time in three. What repeats an earlier form is left out.
    """
    caption = " ".join(caption.split())
    first, *others = SENTENCE_END.split(caption)
    thing = _thing(first)
    groups = [
        [caption],
        [first, _first_clause(first)],
        *([[thing], [_bare(thing)]] if others else [[thing, _bare(thing)]]),
        [f"{first} {other}" for other in others],
    ]
    return _without_repeats(groups)


def first_sentence(caption: str) -> str:
    return SENTENCE_END.split(" ".join(caption.split()))[0]


def short_prompts(caption: str) -> list[str]:
    """What one may well ask for after training on `caption`: the thing it names, and its first clause."""
    first = first_sentence(caption)
    return [form for form in dict.fromkeys([_bare(_thing(first)), _first_clause(first)]) if form]


def _thing(sentence: str) -> str:
    """'A single pair of denim jeans'; empty where the sentence names none."""
    said = LEAD_IN.sub("", sentence)
    thing = THING_END.split(said, maxsplit=1)[0].strip()
    if HALF_A_THING.fullmatch(thing):
        thing = PLACE.split(said, maxsplit=1)[0].strip(" ,:;")
    return "" if thing.lower() in POINTING else thing


def _first_clause(sentence: str) -> str:
    """Up to the first comma after the thing, unless that stands in quotes or brackets."""
    thing = _thing(sentence)
    begin = sentence.index(thing) + len(thing)
    clause = sentence[:begin] + CLAUSE_END.split(sentence[begin:], maxsplit=1)[0].rstrip()
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

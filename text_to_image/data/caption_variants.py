"""Shorter forms of a caption, so that a model trained on long captions also follows prompts of a few words.

'A single pair of denim jeans laid flat on a white background, seen from the back. The legs are apart.' is also trained
as 'A single pair of denim jeans laid flat on a white background, seen from the back.', the same without 'seen from the
back', 'A single pair of denim jeans' and 'denim jeans'.
"""

import re

ABBREVIATIONS = ("Dr", "Mr", "Mrs", "Ms", "St", "No", "vs", "ca", "approx")
SENTENCE_END = re.compile(
    # What is rarest is looked for first: captions come by the hundred thousand.
    r"(?<=[.!?])" + "".join(rf"(?<!\b{short}\.)" for short in ABBREVIATIONS) + r"\s+(?=[\"'(]?[A-Z0-9])"
)
CLAUSE_END = re.compile(r"(?<!\d)[,:]|[,:](?!\d)|;")  # not within 1,000 or 10:30
# Where the subject ends and its place, posture or surroundings begin.
PLACE = re.compile(
    r"\.+$|\s(?:laid|lying|lies|placed|arranged|spread|hanging|standing|sitting|shown|seen|photographed|isolated|is|are|on"
    r"|in|at|against|over|under|near|with|from|that|which)\b"
)
SUBJECT_END = re.compile(rf"{CLAUSE_END.pattern}|\s[(\"]|{PLACE.pattern}")
# 'A blue' of 'A blue, short-sleeved shirt' and 'A large' of 'A large (XL) shirt': the subject's noun is yet to come.
WITHOUT_NOUN = re.compile(
    r"(?:an?|the|one|this|some)\s+(?:black|white|gr[ae]y|red|orange|yellow|green|turquoise|blue|navy|purple|pink|brown|beige"
    r"|golden|silver|dark|light|pale|bright|large|big|small|little|tiny|long|short|tall|wide|narrow|old|new|young|vintage"
    r"|modern|beautiful|simple|plain|soft|thick|thin|round|square|wooden|woollen|woolen|cotton|leather)",
    re.IGNORECASE,
)
# What captioners say before they name the subject.
LEAD_IN = re.compile(
    r"^(?:in\s+(?:the|this)\s+(?:photo|photograph|picture|image),?\s+)?"
    r"(?:(?:t?here(?:\s+(?:is|are)|['’]s)|(?:this|it)\s+is|it['’]s|these\s+are|(?:we|you|one)\s+(?:can\s+)?sees?"
    r"|(?:the|this)\s+(?:photo|photograph|picture|image)\s+(?:shows|depicts|features))\s+)?",
    re.IGNORECASE,
)
# What chat models say before the caption; it tells nothing of the picture.
CONSENT = r"(?:sure(?:\s+thing)?|certainly|absolutely|of\s+course|okay|ok)[,.!:]+\s*"
CAPTION_NOUN = r"(?:alt[ -]?text|caption|description|prompt|response|summary)s?"
CAPTION_WORDS = (  # 'a detailed caption for this image', but not 'a shirt with a description'
    r"(?:(?:a|an|the|my|your)\s+)?"
    r"(?:(?:brief|concise|detailed|factual|full|generated|image|long|one-sentence|photo|picture|possible|short|simple"
    rf"|suitable|training),?\s+)*{CAPTION_NOUN}(?:\s+(?:of|for)\s+(?:the|this|your)\s+(?:image|photo|photograph|picture))?"
)
# 'Based on the image, ', and what may stand between 'the caption' and its colon.
BASIS = r"(?:(?:based\s+on|from|given|looking\s+at)\s+[^\s,.:!?]+(?:\s+[^\s,.:!?]+){0,4},\s*)"
IS = r"(?:\s+(?:as|be|could|follows|is|may|might|reads|would))*"
ANNOUNCEMENT = re.compile(
    rf"[*#\"\s]*(?:{CONSENT})?{BASIS}?[*#\"\s]*(?:"
    rf"(?:here(?:\s+(?:is|are)|['’]s)|(?:this|below|the\s+following)\s+is)(?:\s+(?!of\b|with\b)[^\s.:!?]+){{0,6}}?\s+{CAPTION_NOUN}\b[^.:!?]*[:.]"
    r"|here(?:\s+is|['’]s)\s+(?:the|your)\s+(?:image|photo|photograph|picture)\s*:"
    r"|(?:the|this)\s+(?:image|photo|photograph|picture)\s+(?:shows|depicts|features)\s*:"
    r"|I(?:['’]d|\s+would|\s+could|\s+can)?\s+(?:caption|describe|summarize)\s+(?:it|the|this)(?:\s+[^\s,.:!?]+){0,4}\s*:"
    rf"|{CAPTION_WORDS}{IS}[*\s]*:)[*\"\s]*|[*#\s]*{CONSENT}",
    re.IGNORECASE,
)
PRONOUNS = frozenset({"he", "it", "one", "she", "that", "there", "these", "they", "this", "those", "we", "you"})
DETERMINER = re.compile(
    r"^(?:(?:a|an|the|one|this|some|single|individual)\s+"
    r"|(?:pair|piece|set|photo|photograph|picture|image|shot|view|close-up)s?\s+of\s+)+",
    re.IGNORECASE,
)


def caption_variants(caption: str) -> tuple[tuple[str, ...], ...]:
    """The forms of a caption, in groups that samples choose equally often; no form is in two groups.

    (the caption,), (its first sentence, that sentence's first clause), (the subject,), (the subject without its
    determiner,), (the first sentence with one other sentence, ...). Both forms of the subject share a group where the
    caption is a single sentence, which would otherwise be chosen only one time in three. Repeated forms are left out.
    """
    caption = " ".join(caption.split())
    first, *others = SENTENCE_END.split(without_announcement(caption))
    subject = _subject(first)
    bare_subject = _without_determiner(subject)
    groups = [
        [caption],
        [first, _first_clause(first, subject)],
        *([[subject], [bare_subject]] if others else [[subject, bare_subject]]),
        [f"{first} {other}" for other in others],
    ]
    return _without_repeats(groups)


def without_announcement(caption: str) -> str:
    """'Here is a detailed caption: A red car.' → 'A red car.'; a caption that is nothing else stays."""
    match = ANNOUNCEMENT.match(caption)
    return (caption[match.end() :] if match else "") or caption


def first_sentence(caption: str) -> str:
    return SENTENCE_END.split(without_announcement(" ".join(caption.split())))[0]


def suggest_prompts(caption: str) -> list[str]:
    """Short prompts that a model trained on `caption` can be expected to follow: its subject, and its first clause."""
    first = first_sentence(caption)
    subject = _subject(first)
    prompts = [_without_determiner(subject), _first_clause(first, subject)]
    return [prompt for prompt in dict.fromkeys(prompts) if prompt]


def _subject(sentence: str) -> str:
    """'A single pair of denim jeans'; empty where the sentence names no subject."""
    rest = LEAD_IN.sub("", sentence)
    subject = SUBJECT_END.split(rest, maxsplit=1)[0].strip()
    if WITHOUT_NOUN.fullmatch(subject):
        subject = PLACE.split(rest, maxsplit=1)[0].strip(" ,:;")
    return "" if subject.lower() in PRONOUNS else subject


def _first_clause(sentence: str, subject: str) -> str:
    """Up to the first comma after the subject; the whole sentence where that comma is in quotes or brackets."""
    end = sentence.index(subject) + len(subject)
    clause = sentence[:end] + CLAUSE_END.split(sentence[end:], maxsplit=1)[0].rstrip()
    return clause if clause.count('"') % 2 == 0 and clause.count("(") == clause.count(")") else sentence


def _without_determiner(subject: str) -> str:
    """'A single pair of denim jeans' → 'denim jeans'."""
    return DETERMINER.sub("", subject)


def _without_repeats(groups: list[list[str]]) -> tuple[tuple[str, ...], ...]:
    """Each form once, in the first group that has it; empty forms and empty groups are dropped."""
    seen: set[str] = {""}
    kept = []
    for group in groups:
        new = tuple(form for form in dict.fromkeys(group) if form not in seen)
        seen.update(new)
        if new:
            kept.append(new)
    return tuple(kept)

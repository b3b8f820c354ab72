"""What a caption says of its picture mirrored, and whether it may be mirrored at all.

'A shirt with a pocket on its left side' becomes 'A shirt with a pocket on its right side'; the picture of a shirt with
'the word "DENIM" on it' must not be mirrored: the model would learn mirror writing.
"""

import re

# 'left' and 'right' that are no sides stay as they are: a turn (a right angle), the whole of a thing (all right, right
# side up), 'just there' (is right above) and what was left (left open). Both words are kept in each of them ('a left
# angle' too), because a caption mirrored twice must be the caption again.
# Not after a word that makes a side of it: 'on the right behind the lamp', 'the left open flap'.
EITHER = r"(?:left|right)"
PLACES = ["the", "its", "his", "her", "their", "on", "at", "to", "from", "far", "top", "bottom", "upper", "lower"]
PLACES += ["front", "back", "rear", "outer", "inner"]
NO_PLACE_BEFORE = "".join(rf"(?<!\b{word}[\s-])" for word in PLACES)
# 'Its collar is left open at the neck', but 'with left bare foot'.
CLAUSE_ENDS = r"(?=[.,;:!?)]|\s*$|\s(?:and|at|by|for|from|in|on|so|to|with)\b)"
NOT_A_SIDE = [
    rf"{EITHER}[\s-]angle[sd]?\b",
    rf"{EITHER}[\s-]of[\s-]way\b",
    rf"(?:all|just)\s{EITHER}\b(?!-|\sof\b)",
    rf"{EITHER}\s(?:now|away)\b",
    rf"{NO_PLACE_BEFORE}{EITHER}[\s-](?:side|way)[\s-](?:up|out|round|around)\b",
    rf"(?:is|are|sits?|lies?|placed|sewn)\s{EITHER}\s"
    r"(?:above|below|beneath|under|underneath|beside|at|in|on|next\sto)\b",
    rf"{NO_PLACE_BEFORE}{EITHER}\s(?:alone|bare|blank|empty|exposed|loose|open|plain|raw|undone|un\w+ed){CLAUSE_ENDS}",
    # 'fabric left over' and 'left behind', but 'buttoned left over right'.
    rf"{NO_PLACE_BEFORE}{EITHER}\s(?:over|behind)\b(?!\s(?:the\s|its\s)?{EITHER}\b)",
]
# 'right-handed', 'upper-left' and "left's" are whole words here; 'bright', 'upright' and 'leftovers' are not.
SIDE = r"(?P<side>left|Left|LEFT|right|Right|RIGHT)(?=(?i:most|wards?|hand|handed)?\b)"
SIDES = re.compile(rf"\b(?:(?i:{'|'.join(NOT_A_SIDE)})|{SIDE})")
OTHER_SIDE = {"left": "right", "Left": "Right", "LEFT": "RIGHT"}
OTHER_SIDE |= {right: left for left, right in OTHER_SIDE.items()}

# Whole words, in capitals or not. A picture kept from mirroring for nothing costs little, mirror writing much: a
# word in doubt is in. Not in: 'label', 'tag', 'print' and 'brand' alone, which jeans have without a readable letter.
WRITING = [
    r"texts?|words?|wordings?|wordmarks?|writings?|written|handwriting|handwritten|typography|calligraphy|graffiti",
    r"letters?|lettered|lettering|initials|alphabet|monograms?|monogrammed|(?:chinese|japanese|korean)\scharacters?",
    r"numbers?|numbered|numerals?|digits?",
    r"logos?|logotypes?|trademarks?|watermarks?|branding|branded|brand\s(?:names?|labels?)",
    r"names?|signatures?|autographs?|inscriptions?|inscribed|slogans?|mottos?|messages?|quotes?|captions?|subtitles?",
    r"titles?|titled|headlines?|reads|says|spells|spelling|that\s(?:read|say)",
    r"(?:badges?|banners?|boards?|labels?|patch|patches|plates?|posters?|prints?|shirts?|tags?)\s(?:reading|saying)",
    # Things that are mostly writing, whether it is mentioned or not.
    r"signs?|signage|newspapers?|calendars?|keyboards?|clocks?|maps?|banknotes?|barcodes?|qr\scodes?",
    r"licen[cs]e\splates?|price\stags?|care\slabels?",
]
# 'A number of buttons', 'no signs of wear', 'in other words', 'a writing desk' say nothing of writing.
NOT_WRITING = r"(?:numbers?|signs?)\sof\b|(?:in\sother|in\sa)\swords?\b|writing\s(?:desk|table)s?\b"
# In straight, curly or angled quotes; not what stands between two inch marks.
QUOTED = r"""(?<!\w)"[^"]*\w[^"]*"|“[^”]*\w[^”]*”|«[^»]*\w[^»]*»|‘[^’]*\w[^’]*’|(?<!\w)'\w(?:[^'"]*\w)?'(?!\w)"""
WRITTEN = re.compile(rf"\b(?:{NOT_WRITING})|(?P<writing>\b(?:{'|'.join(WRITING)})\b|{QUOTED})", re.IGNORECASE)


def mirror_caption(text: str) -> str:
    """The caption of the mirrored picture: each left is a right, each right a left. Twice gives `text` again."""
    return SIDES.sub(lambda match: OTHER_SIDE.get(match["side"], match[0]), text)


def mentions_writing(text: str) -> str | None:
    """The word or quotation for which a picture of this caption must not be mirrored, or None if it may be."""
    return next((match["writing"] for match in WRITTEN.finditer(text) if match["writing"]), None)

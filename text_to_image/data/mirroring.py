"""The caption of a mirrored picture, and whether a caption allows its picture to be mirrored.

'A shirt with a pocket on its left side' becomes 'A shirt with a pocket on its right side'. A picture captioned 'the
word "DENIM" on it' must not be mirrored: the model would learn mirror writing. Nor may one whose caption names a side
in another language than English.
"""

import re

from data.foreign_words import foreign_side, foreign_writing

# 'left' and 'right' that do not mean a side stay as they are: 'a right angle', 'all right', 'right side up', 'is right
# above', 'left open'. Each pattern takes both words ('a left angle' too), because a caption mirrored twice must be the
# caption again.
EITHER = r"(?:left|right)"
# After these words it is a side after all: 'on the right behind the lamp', 'the left open flap'.
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

# Whole words, in any case. Not mirroring a picture costs little, learning mirror writing costs much: words in doubt
# are listed. 'label', 'tag', 'print' and 'brand' alone are not: jeans have those without a readable letter.
WRITING = [
    r"texts?|words?|wordings?|wordmarks?|writings?|written|handwriting|handwritten|typography|calligraphy|graffiti",
    r"letters?|lettered|lettering|initials|alphabet|monograms?|monogrammed|(?:chinese|japanese|korean)\scharacters?",
    r"numbers?|numbered|numerals?|digits?",
    r"logos?|logotypes?|trademarks?|watermarks?|branding|branded|brand\s(?:names?|labels?)",
    r"names?|signatures?|autographs?|inscriptions?|inscribed|slogans?|mottos?|messages?|quotes?|captions?|subtitles?",
    r"titles?|titled|headlines?|reads|says|spells|spelling|that\s(?:read|say)",
    r"(?:badges?|banners?|boards?|labels?|patch|patches|plates?|posters?|prints?|shirts?|tags?)\s(?:reading|saying)",
    # Things that have writing on them, whether the caption mentions it or not.
    r"signs?|signage|newspapers?|calendars?|keyboards?|clocks?|maps?|banknotes?|barcodes?|qr\scodes?",
    r"licen[cs]e\splates?|price\stags?|care\slabels?",
]
# Not about writing: 'a number of buttons', 'no signs of wear', 'in other words', 'a writing desk'.
NOT_WRITING = r"(?:numbers?|signs?)\sof\b|(?:in\sother|in\sa)\swords?\b|writing\s(?:desk|table)s?\b"
# In quotes of any language; not what stands between two inch marks (40" long and 2" wide).
QUOTED = r"""(?<!\w)"[^"]*\w[^"]*"|“[^”]*\w[^”]*”|«[^»]*\w[^»]*»|‘[^’]*\w[^’]*’|(?<!\w)'\w(?:[^'"]*\w)?'(?!\w)"""
QUOTED += r"|„[^“”]*\w[^“”]*[“”]|‚[^‘’]*\w[^‘’]*[‘’]|»[^«]*\w[^«]*«|「[^」]*」|『[^』]*』|《[^》]*》"
WRITTEN = re.compile(rf"\b(?:{NOT_WRITING})|(?P<writing>\b(?:{'|'.join(WRITING)})\b|{QUOTED})", re.IGNORECASE)


def mirror_caption(text: str) -> str:
    """The caption of the mirrored picture: 'left' and 'right' change places. Mirrored twice it is `text` again."""
    return SIDES.sub(lambda match: OTHER_SIDE.get(match["side"], match[0]), text)


def why_not_mirrored(text: str) -> str | None:
    """The first word or quotation for which the picture must not be mirrored; None without.

    It mentions writing, or names a side in another language than English, which `mirror_caption` would keep.
    """
    english = next((match["writing"] for match in WRITTEN.finditer(text) if match["writing"]), None)
    return english or foreign_writing(text) or foreign_side(text)

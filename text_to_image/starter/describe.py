"""Random captions for rendered garments, from two words to three chunks of 75 tokens; all of a caption is true."""

import numpy as np

NAMES = {
    "t-shirt": ("t-shirt", "t-shirt", "t-shirt", "short-sleeved t-shirt", "tee shirt"),
    "shirt": ("shirt", "shirt", "button-up shirt", "long-sleeved shirt"),
    "sweater": ("sweater", "sweater", "jumper", "pullover", "knitted sweater"),
    "hoodie": ("hoodie", "hoodie", "hooded sweatshirt"),
    "dress": ("dress", "dress", "sleeveless dress", "summer dress"),
    "skirt": ("skirt", "skirt", "flared skirt"),
    "trousers": ("trousers", "trousers", "long trousers", "pants"),
    "shorts": ("shorts", "shorts", "short trousers"),
    "jeans": ("denim jeans", "denim jeans", "jeans"),
}
PLURAL_KINDS = ("trousers", "shorts", "jeans")
PATTERN_WORDS = {
    "striped": (("striped",), ("stripes", "horizontal stripes", "broad stripes")),
    "checked": (("checked", "checked", "plaid"), ("checks", "a checked pattern")),
    "dotted": (("dotted", "polka dot", "spotted"), ("dots", "polka dots", "round dots")),
}
BACKGROUNDS = (
    "on a white background",
    "on a clean white background",
    "on a plain white background",
    "on a white table",
    "on a bright white surface",
    "against a white background",
)
PAPER_BACKGROUNDS = (
    "on a {} background",
    "on a plain {} background",
    "against a {} background",
    "on a {} table",
    "on a {} surface",
    "on {} paper",
)
CLOTH_BACKGROUNDS = ("on a {} blanket", "on a {} blanket", "on a {} cloth", "on a {} bedsheet", "on {} fabric")
WOOD_BACKGROUNDS = (
    "on a {}wooden table",
    "on a {}wooden table",
    "on a {}wooden floor",
    "on a {}wooden background",
    "on {}wooden planks",
    "on {}wood",
)
FOLDS = {
    "flat": ("laid flat", "laid flat", "lying flat", "spread out flat", "laid out flat"),
    "cuffs": ("laid flat with turned-up cuffs", "with the cuffs turned up", "with both hems rolled up into cuffs"),
    "knee": (
        "with one leg folded up at the knee",
        "laid flat with one leg folded",
        "with one trouser leg folded over",
    ),
    "half": ("folded in half", "neatly folded", "folded in half", "folded"),
}
VIEWS = {
    "front": ("seen from the front", "shown from the front", "front view", "with the front facing up"),
    "back": ("seen from the back", "shown from the back", "back view", "with the back facing up", "rear view"),
}
VIEWED = {"front": "viewed from the front", "back": "viewed from the back"}
DETAILS = {
    ("t-shirt", "front"): (
        "It has a round neckline and two short sleeves.",
        "The scooped neck shows the inside of the back.",
    ),
    ("t-shirt", "back"): (
        "The back is closed up to the neck, with a shoulder seam across.",
        "Its short sleeves are spread to both sides.",
    ),
    ("shirt", "front"): (
        "A row of buttons runs down the front placket.",
        "It has a pointed collar, long sleeves and a chest pocket.",
    ),
    ("shirt", "back"): (
        "A yoke seam crosses the back below the collar.",
        "The back has a box pleat and the collar is closed.",
    ),
    ("sweater", "front"): (
        "It has a round neck, long sleeves and a ribbed waistband.",
        "The knitted waistband is ribbed.",
    ),
    ("sweater", "back"): (
        "The neck is high at the back and the waistband is ribbed.",
        "Long sleeves hang down on both sides.",
    ),
    ("hoodie", "front"): (
        "It has a hood with drawstrings and a kangaroo pouch pocket.",
        "Two cords hang from the open hood above a large front pocket.",
    ),
    ("hoodie", "back"): (
        "The hood lies over the back of the shoulders, with a seam down its middle.",
        "The plain back has no pocket.",
    ),
    ("dress", "front"): (
        "It has two straps, a low neckline and a flared skirt below the waist seam.",
        "The bodice is narrow at the waist.",
    ),
    ("dress", "back"): (
        "A zip runs down from the neck to the waist.",
        "The back is cut high and closed with a zipper.",
    ),
    ("skirt", "front"): (
        "Buttons run down the front from the waistband to the hem.",
        "It flares from a narrow waistband to a wide hem.",
    ),
    ("skirt", "back"): (
        "A zip closes the back below the waistband, and the hem has a slit.",
        "There is a short slit in the middle of the hem.",
    ),
    ("trousers", "front"): (
        "The fly, the waist button and two curved front pockets can be seen.",
        "Two long straight legs, belt loops and slanted side pockets.",
    ),
    ("trousers", "back"): (
        "Two patch pockets sit below the yoke, on both sides of the back rise.",
        "The back pockets and the seat seam are clearly visible.",
    ),
    ("shorts", "front"): (
        "The fly, the waist button and two curved front pockets can be seen.",
        "The two legs are short and wide.",
    ),
    ("shorts", "back"): (
        "Two patch pockets sit below the yoke.",
        "The back pockets and the seat seam are clearly visible.",
    ),
    ("jeans", "front"): (
        "The fly, the waist button and two curved front pockets are sewn with copper thread.",
        "The blue denim is faded on the thighs and knees.",
    ),
    ("jeans", "back"): (
        "Two back pockets sit below the yoke, and the back rise is clearly visible.",
        "The denim is slightly faded on the seat and legs.",
    ),
}
ABOUT = (
    "The picture was taken from directly above.",
    "Soft daylight falls on the cloth from one side.",
    "A faint shadow surrounds the garment.",
    "Natural creases and wrinkles run through the fabric.",
    "The seams and the stitching along the hem are visible.",
    "Nobody is wearing it and nothing else lies on the table.",
    "The whole garment is in the frame, from the top edge to the bottom.",
    "It is a product photograph for an online shop or a clothing catalogue.",
    "The edges of the garment stand out clearly from the white background.",
    "The fabric has a fine even weave.",
    "The material looks soft, with small folds that catch the light.",
    "This is a single item of clothing, photographed in a studio.",
    "The garment is slightly turned and lies near the middle of the picture.",
    "The image is sharp, evenly exposed and free of clutter.",
    "The cloth is clean and shows no stains, holes or other damage.",
    "Small dark lines mark the places where two pieces of cloth are joined.",
    "The background is empty.",
    "A catalogue photo like this one shows the cut and the shape of the garment.",
)
JEANS_WORDS = ("denim", "jean")


def place(spec, rng: np.random.Generator) -> str:
    """Where the garment lies: 'on a white background', 'on a wooden floor', 'on a blue blanket'."""
    if spec.background == "white":
        return str(rng.choice(BACKGROUNDS))
    if spec.background.endswith("wood"):
        return str(rng.choice(WOOD_BACKGROUNDS)).format(spec.background.removesuffix("wood"))
    if spec.background.endswith(" cloth"):
        return str(rng.choice(CLOTH_BACKGROUNDS)).format(spec.background.removesuffix(" cloth"))
    return str(rng.choice(PAPER_BACKGROUNDS)).format(spec.background)


def general_sentences(spec, rng: np.random.Generator) -> list[str]:
    """ABOUT in a random order, without what is not true on this background."""
    sentences = [str(s) for s in rng.permutation(ABOUT)]
    return [s for s in sentences if spec.background == "white" or "background" not in s]


def subject(spec, rng: np.random.Generator, article: bool = True) -> str:
    """'a red t-shirt', 'a pair of blue and white striped trousers', 'navy skirt with white dots'."""
    name = str(rng.choice(NAMES[spec.kind]))
    colour = "gray" if spec.colour == "grey" and rng.random() < 0.2 else spec.colour
    tail = ""
    if spec.pattern == "plain":
        words = f"plain {colour}" if rng.random() < 0.15 else colour
    else:
        adjective, noun = (str(rng.choice(w)) for w in PATTERN_WORDS[spec.pattern])
        if rng.random() < 0.5:
            words = f"{colour} and {spec.second} {adjective}"
        else:
            words, tail = colour, f" with {spec.second} {noun}"
    if not article:
        return f"{words} {name}{tail}"
    if spec.kind in PLURAL_KINDS:
        some = str(rng.choice(["a pair of ", "a single pair of ", "one pair of ", ""], p=[0.5, 0.2, 0.15, 0.15]))
        return f"{some}{words} {name}{tail}"
    if rng.random() < 0.3:
        return f"{rng.choice(['a single', 'one'])} {words} {name}{tail}"
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words} {name}{tail}"


def marker_phrase(spec, rng: np.random.Generator) -> str:
    corner = spec.marker.replace("upper", str(rng.choice(["upper", "upper", "top"])))
    corner = corner.replace("lower", str(rng.choice(["lower", "lower", "bottom"])))
    size = str(
        rng.choice(
            [
                "a black square",
                "a small black square",
                "a black square reference marker",
                "a small black square reference marker",
            ]
        )
    )
    place = str(rng.choice(["in the {} corner", "near the {} corner", "at the {}", "in the {}"])).format(corner)
    return f"{size} {place}"


def first_sentence(spec, rng: np.random.Generator, full: bool) -> str:
    words = [subject(spec, rng)]
    if full or rng.random() < 0.85:
        words.append(str(rng.choice(FOLDS[spec.fold])))
        words.append(place(spec, rng))
    else:
        words += [str(rng.choice(FOLDS[spec.fold]))] if spec.fold != "flat" else []
        words += [place(spec, rng)] if spec.background != "white" else []
    text = " ".join(words)
    if spec.fold != "half" and rng.random() < (0.6 if full else 0.5):
        text += ", " + str(rng.choice(VIEWS[spec.view]))
    if spec.marker and rng.random() < (0.6 if full else 0.5):
        text += ", with " + marker_phrase(spec, rng)
    return text


def more_sentences(spec, rng: np.random.Generator) -> list[str]:
    """Further sentences, those about this garment before those that are true of all pictures (ABOUT)."""
    specific = []
    if spec.fold != "half":
        specific.append(str(rng.choice(DETAILS[spec.kind, spec.view])))
        specific.append(
            str(
                rng.choice(
                    [
                        f"The {spec.view} of the garment is shown.",
                        f"This is the {spec.view} view.",
                        f"It is {rng.choice(VIEWS[spec.view][:2])}.",
                    ]
                )
            )
        )
    if spec.marker:
        phrase = marker_phrase(spec, rng)
        specific.append(f"{rng.choice(['There is', 'The picture shows', 'One can see'])} {phrase}.")
    elif rng.random() < 0.4:
        specific.append(str(rng.choice(["There is no reference marker.", "No marker lies beside it."])))
    if spec.pattern == "plain":
        specific.append(f"The cloth is plain {spec.colour} without any pattern.")
    else:
        noun = str(rng.choice(PATTERN_WORDS[spec.pattern][1]))
        specific.append(f"The {spec.colour} cloth is printed with {noun} in {spec.second}.")
    if spec.fold != "flat":
        specific.append(f"The garment is {rng.choice(FOLDS[spec.fold])}.")
    general = general_sentences(spec, rng)
    specific = [str(s) for s in rng.permutation(specific)]
    if rng.random() < 0.4:  # sometimes a specific sentence comes late, far into the caption
        general[2:2] = specific[:1]
        return general[:1] + specific[1:] + general[1:]
    return specific + general


def caption_of(spec, rng: np.random.Generator, words: int | None = None) -> str:
    """A caption of about `words` words, at most about 150; None chooses a random length, mostly a short one."""
    if words is None:
        words = int(rng.choice([0, 12, 30, 50, 80, 130], p=[0.12, 0.33, 0.15, 0.15, 0.15, 0.1]))
    if words == 0:
        text = subject(spec, rng, article=bool(rng.random() < 0.5))
        return text + (" " + place(spec, rng) if rng.random() < 0.3 or spec.background != "white" else "")
    text = first_sentence(spec, rng, full=words > 12)
    text = text[0].upper() + text[1:] if rng.random() < 0.8 else text
    if words <= 12:
        return text + ("." if rng.random() < 0.3 else "")
    text += "."
    for sentence in more_sentences(spec, rng):
        if len(text.split()) + len(sentence.split()) > words:
            break
        text += " " + sentence
    return text

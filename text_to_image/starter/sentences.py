"""Captions whose attributes stand in sentences of their own, anywhere among others that say nothing of them."""

import numpy as np

from describe import (
    FOLDS,
    NAMES,
    PATTERN_WORDS,
    PLURAL_KINDS,
    VIEWED,
    VIEWS,
    general_sentences,
    marker_phrase,
    place,
    subject,
)

OPENINGS = (
    "A garment.",
    "A garment laid out for a photograph.",
    "A photograph of a garment.",
    "A photo of one piece of clothing.",
    "A piece of clothing, photographed from above.",
    "One item of clothing.",
)
FILLERS = (
    "Somebody took this picture on a cloudy morning.",
    "The photographer stood on a small ladder.",
    "It was bought last year and has been washed twice.",
    "The label inside names the size and how to wash it.",
    "Pictures like this are used in many shops.",
    "No person can be seen.",
    "The lamp hangs to the left of the camera.",
    "One more picture of it was taken a minute later.",
    "The cloth was ironed before.",
    "It is for sale.",
    "Everything is in focus.",
    "The camera points straight down.",
)  # true of any picture, as far as anybody can see
SCATTERED = 0.85  # share of the attributes that a scattered caption names, if it has room


def attribute_sentences(spec, rng: np.random.Generator) -> dict[str, str]:
    """A sentence for each attribute that names nothing else: {'colour': 'The garment is red.', …}."""
    name, plural = str(rng.choice(NAMES[spec.kind])), spec.kind in PLURAL_KINDS
    a_kind = f"a pair of {name}" if plural else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    choose = lambda *texts: str(rng.choice(texts))  # noqa: E731
    sentences = {
        "kind": choose(f"It is {a_kind}.", f"The garment is {a_kind}.", f"This is {a_kind}."),
        "colour": choose(
            *["The garment is {}."] * 2, "It is {}.", "The colour is {}.", "Its colour is {}.", "The cloth is {}.",
            "The {} is {}.".replace("{}", spec.kind, 1) if not plural else f"The {spec.kind} are {{}}.",
        ).format(spec.colour),
        "background": choose(f"It lies {place(spec, rng)}.", f"The garment lies {place(spec, rng)}."),
    }  # fmt: skip
    if spec.background == "white" and rng.random() < 0.5:
        sentences["background"] = "The background is white."
    if spec.pattern == "plain":
        sentences["pattern"] = choose("The cloth has no pattern.", "The cloth is plain.", "It has no pattern.")
    else:
        noun = str(rng.choice(PATTERN_WORDS[spec.pattern][1])).removeprefix("a ")
        sentences["pattern"] = choose(
            f"It has {spec.second} {noun}.", f"The cloth is printed with {spec.second} {noun}."
        )
    if spec.fold != "half":
        view = spec.view
        sentences["view"] = choose(
            f"The {view} is shown.", f"This is the {view} view.", f"It is {rng.choice(VIEWS[view])}."
        )
    if spec.marker:
        start = choose("There is", "The picture shows", "One can see")
        sentences["marker"] = f"{start} {marker_phrase(spec, rng)}."
    else:
        sentences["marker"] = choose("There is no reference marker.", "No marker lies beside it.")
    sentences["fold"] = f"The garment is {rng.choice(FOLDS[spec.fold])}."
    return sentences


def scattered_caption(spec, rng: np.random.Generator, words: int) -> str:
    """A caption of at most `words` words whose attributes stand in any of its sentences, each in one of its own.

    A third of them name one attribute alone, so that no other one tells what the picture shows.
    """
    sentences = attribute_sentences(spec, rng)
    if rng.random() < 0.33:
        chosen = {str(rng.choice(["colour", "kind", "colour", "kind", "pattern", "view", "marker", "background"]))}
    else:
        chosen = {name for name in sentences if rng.random() < SCATTERED}
    opening = str(rng.choice(OPENINGS))
    if rng.random() < 0.3:
        text = subject(spec, rng)
        opening, chosen = text[0].upper() + text[1:] + ".", chosen - {"kind", "colour", "pattern"}
    named = [str(name) for name in rng.permutation(sorted(chosen & set(sentences)))]
    if spec.background != "white":  # always named, so that white needs no word
        named = ["background", *(name for name in named if name != "background")]
    return among_others(spec, opening, [sentences[name] for name in named], rng, words)


def among_others(spec, opening: str, named: list[str], rng: np.random.Generator, words: int) -> str:
    """The opening, then in a random order the sentences of `named`, as many as fit, and general ones."""
    room = words - len(opening.split())
    chosen = []
    for sentence in [*named, *general_sentences(spec, rng)]:
        if len(sentence.split()) <= room:
            chosen.append(sentence)
            room -= len(sentence.split())
    return " ".join([opening, *(str(s) for s in rng.permutation(chosen))])


def several_sentences(spec, names: set[str], rng: np.random.Generator, words: int) -> str:
    """A caption of about `words` words that tells the attributes of `names`, each in a sentence of its own, anywhere.

    The first sentence may tell the layout instead of its attributes: 'A garment laid flat on a white background.'
    """
    sentences = attribute_sentences(spec, rng)
    if "kind" not in names and spec.kind in sentences["colour"]:
        sentences["colour"] = f"The garment is {spec.colour}."
    chosen = [sentences[name] for name in sorted(names & set(sentences))]
    room = words - sum(len(sentence.split()) for sentence in chosen)
    for sentence in rng.permutation([*general_sentences(spec, rng), *FILLERS]):
        if len(sentence.split()) > room:
            break
        chosen.append(str(sentence))
        room -= len(sentence.split())
    text = [str(sentence) for sentence in rng.permutation(chosen)]
    if names >= LAYOUT and rng.random() < 0.5:
        told = {sentences[name] for name in (*LAYOUT, "view") if name in sentences}
        text = [layout_sentence(spec, names, rng), *(t for t in text if t not in told)]
    return " ".join(text)


def one_sentence(spec, names: set[str], rng: np.random.Generator) -> str:
    """The same attributes in one short sentence, as most of the captions that the base was trained on."""
    name = str(rng.choice(NAMES[spec.kind])) if "kind" in names else "garment"
    plain = ["plain"] if spec.pattern == "plain" and "pattern" in names else []
    words = [*plain, *([spec.colour] if "colour" in names else []), name]
    if spec.pattern != "plain" and "pattern" in names:
        words.append(f"with {spec.second} {str(rng.choice(PATTERN_WORDS[spec.pattern][1])).removeprefix('a ')}")
    words += [str(rng.choice(FOLDS[spec.fold]))] if "fold" in names else []
    words += [place(spec, rng)] if "background" in names else []
    text = f"{'a pair of' if 'kind' in names and spec.kind in PLURAL_KINDS else 'a'} {' '.join(words)}"
    text += f", {rng.choice(VIEWS[spec.view])}" if "view" in names and spec.fold != "half" else ""
    if "marker" in names:
        text += f", with {marker_phrase(spec, rng)}" if spec.marker else ", without a marker"
    return text


LAYOUT = {"fold", "background"}


def layout_sentence(spec, names: set[str], rng: np.random.Generator) -> str:
    """'A garment laid flat on a white background, viewed from the front.': neither kind nor colour."""
    views = [*VIEWS[spec.view], VIEWED[spec.view]]
    view = f", {rng.choice(views)}" if "view" in names and spec.fold != "half" else ""
    garment = rng.choice(["A garment", "A single garment", "One item"])
    return f"{garment} {rng.choice(FOLDS[spec.fold])} {place(spec, rng)}{view}."

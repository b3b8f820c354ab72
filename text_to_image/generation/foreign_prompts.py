"""Prompt lines as kohya's scripts and AUTOMATIC1111 read them, and their syntax inside prompts. Standard library only.

- kohya (`line_to_prompt_dict` in library/train_util.py of github.com/kohya-ss/sd-scripts): options behind the prompt,
  `denim jeans --n blurry --w 512 --h 768 --d 1 --l 7.5 --s 28`.
- AUTOMATIC1111 (scripts/prompts_from_file.py): a command line, `--prompt "a castle" --negative_prompt trees`.
"""

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from models.samplers import SAMPLERS

# {option: (key of a request, or None where it cannot be honoured here; how the option's value begins)}
KOHYA_OPTIONS: dict[str, tuple[str | None, str]] = {
    "n": ("negative_prompt", r"\S"), "w": ("width", r"\d"), "h": ("height", r"\d"), "d": ("seed", r"-?\d"),
    "s": ("steps", r"\d"), "l": ("guidance_scale", r"[\d.]"), "ss": ("scheduler", r"\S"),
    **dict.fromkeys(("g", "nl", "t", "am"), (None, r"[\d.]")), **dict.fromkeys(("cn", "ctr"), (None, r"\S")),
}  # fmt: skip
_OPTIONS = "|".join(rf"{name}\s+{value}" for name, (_, value) in KOHYA_OPTIONS.items())
KOHYA_OPTION = re.compile(rf"(?:^|\s)--(?:{_OPTIONS})", re.IGNORECASE)
WEBUI_OPTIONS: dict[str, str | None] = {
    "prompt": "prompt", "negative_prompt": "negative_prompt", "seed": "seed", "steps": "steps", "width": "width",
    "height": "height", "cfg_scale": "guidance_scale", "sampler_name": "scheduler", "n_iter": "num_images",
    "batch_size": "num_images",
    **dict.fromkeys(
        ("sd_model", "outpath_samples", "outpath_grids", "prompt_for_display", "styles", "subseed_strength", "subseed",
         "seed_resize_from_h", "seed_resize_from_w", "sampler_index", "restore_faces", "tiling",
         "do_not_save_samples", "do_not_save_grid")
    ),
}  # fmt: skip
RANDOM_SEED = "-1"  # in both kinds of lines; --seed serves for it, as for a line without a seed
# Other programs' names of the samplers, as letters and digits alone; more of them follow from the titles.
SAMPLER_NAMES = {"keulera": "euler_a", "keuler": "euler", "klms": "lms", "dpmsolver++": "dpmpp_2m"}
# Syntax that those programs interpret and this repository reads as plain text.
SYNTAX = (
    r"\([^()]+:\s*[\d.]+\s*\)",  # (word:1.3)
    r"\(\([^()]+\)\)",
    r"<(?:lora|lyco|hypernet):[^<>]+>",
    r"\bBREAK\b",
    r"\[[^\[\]]+\]",  # [word], [one:other:0.5]
    r"\{[^{}]*\|[^{}]*\}",  # {red|blue}
    r"__[\w/*-]+__",  # __colour__, a wildcard
    r"(?<!\S)(?:--|[—–])[A-Za-z]\w*(?:\s+[\d:.]+)?",  # --ar 16:9, or an option whose value does not fit
)
PICTURE_RECORD = re.compile(r"\s*(?:Negative prompt:|Steps: \d+, )")


@dataclass
class ForeignLine:
    """A line's settings, by the keys of a request and as text, and its options that are not honoured."""

    settings: dict[str, str]
    not_used: list[str] = field(default_factory=list)


def is_comment(line: str) -> bool:
    """As kohya's scripts read it, where # is the first character."""
    return line.startswith("#")


def is_picture_record(line: str) -> bool:
    """Whether it is of the lines that AUTOMATIC1111 keeps with a picture, behind its prompt."""
    return PICTURE_RECORD.match(line) is not None


def parse_foreign_line(line: str) -> ForeignLine | None:
    """None for a plain prompt, which may contain ' --': only known options with a fitting value make it another.

    ValueError says what is wrong with the line.
    """
    first = re.match(r"--(\w+)\s", line)
    if first and first[1] in WEBUI_OPTIONS:
        return _parse_webui_line(line)
    return _parse_kohya_line(line) if KOHYA_OPTION.search(line) else None


def _parse_kohya_line(line: str) -> ForeignLine:
    prompt, *options = re.split(r"\s+--(?=[A-Za-z])", f" {line}")
    if not prompt.strip():
        raise ValueError(f"no prompt before --{options[0]}")
    found = ForeignLine({"prompt": prompt.strip()})
    for option in options:
        name, _, value = option.strip().partition(" ")
        key, _ = KOHYA_OPTIONS.get(name.lower(), (None, ""))
        _add(found, f"--{option.strip()}", key, value.strip())
    return found


def _add(found: ForeignLine, option: str, key: str | None, value: str) -> None:
    if key == "scheduler":
        value = _sampler_named(value) or ""
    if key and value and (key, value) != ("seed", RANDOM_SEED):
        found.settings[key] = value
    else:
        found.not_used.append(option)


def _sampler_named(name: str) -> str | None:
    """Ours that another program, or we, call so."""
    known = {_letters(preset.title): key for key, preset in SAMPLERS.items()} | SAMPLER_NAMES
    return name if name in SAMPLERS else known.get(_letters(name))


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9+]", "", name.lower())


def _parse_webui_line(line: str) -> ForeignLine:
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise ValueError(
            f"{str(error).lower()}: an apostrophe or quotation mark in a prompt needs a \\ before it"
        ) from None
    found, images = ForeignLine({}), 1
    for name, value in _webui_options(words):
        if WEBUI_OPTIONS[name] == "num_images" and value.isdecimal():
            images *= int(value)
            value = str(images)
        _add(found, f"--{name} {value}", WEBUI_OPTIONS[name], value)
    if "prompt" not in found.settings:
        raise ValueError("no --prompt in it")
    return found


def _webui_options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(option without its dashes, value). A prompt goes on to the next option, other values are one word."""
    place = 0
    while place < len(words):
        name = words[place].removeprefix("--")
        if not words[place].startswith("--") or name not in WEBUI_OPTIONS:
            raise ValueError(f"{words[place]}: not an option of AUTOMATIC1111's prompt lines")
        end = place + 2
        while name in ("prompt", "negative_prompt") and end < len(words) and not words[end].startswith("--"):
            end += 1
        if place + 1 == len(words):
            raise ValueError(f"--{name}: its value is missing")
        yield name, " ".join(words[place + 1 : end])
        place = end


def syntax_note(prompts: Iterable[str]) -> str | None:
    """A line with an example of each kind of other programs' syntax in the prompts; None where there is none."""
    prompts = list(prompts)
    found = [next(filter(None, (re.search(pattern, prompt) for prompt in prompts)), None) for pattern in SYNTAX]
    examples = ", ".join(match[0] if len(match[0]) <= 40 else f"{match[0][:40]}…" for match in found if match)
    return f"not interpreted, but read as plain text like the rest of a prompt: {examples}" if examples else None

"""What a run says of itself: the summary before the first step, in rows of (name, text), and what its page is told of
the plan."""

import argparse
import itertools
import math
import textwrap
from collections.abc import Sequence

from transformers import CLIPTokenizer

from data.augmentation import AFFINE_VARIANTS
from data.buckets import Size
from data.captioned_folders import folder_shares
from data.dataset import Picture
from data.tags import TAG_ORDERS
from metadata.image_files import mask_key
from metadata.reading import CaptionSources
from models.defaults import FROM_FLAG, FROM_SCRIPT, REAL_MODEL, TRAINING_DEFAULTS
from models.folders import count_parameters, left_out_extras
from models.text_encoding import count_tokens
from reporting.run_facts import DataPicture, RunFacts, split_pictures
from reporting.run_observer import RunObserver
from runs.commands import closing_lines, flags_as_given, resume_command
from runs.records import REPORT_FILE, without_secrets
from runtime.paths import display_path, read_only_note
from runtime.progress import print_table
from training.memory_rows import memory_rows
from training.plan import Plan, unmirrored_word
from training.setup import PreparedRun
from training.validation import Validator

Rows = list[tuple[str, str]]
SMALL = 0.6  # of the size that a model was made for; half of it spoils XL (huggingface/diffusers#8794)
PRECISION_WORDS = {
    "no": "fp32", "bf16": "a bf16 copy of fp32 weights", "fp16": "fp16 autocast, fp32 weights",
    "pure_bf16": "bf16 weights, stochastically rounded",
}  # fmt: skip


def run_summary(run: PreparedRun) -> Rows:
    """What will be done. To foretell a GPU's memory takes seconds, and to look through 100,000 pictures."""
    args, plan, tokenizer, arguments = run.args, run.plan, run.tokenizer, flags_as_given(run.args)
    parameters = count_parameters(plan.base) / 1e6
    processes, precision = run.accelerator.num_processes, PRECISION_WORDS[run.precision]
    return [
        ("model", f"{display_path(args.pretrained_model_name_or_path)} (UNet of {parameters:.1f} M parameters)"),
        *_real_model_rows(args),
        *_left_out_rows(plan),
        ("trained", run.record["trained"]),
        ("pictures", _pictures_line(plan)),
        *_folder_rows(plan),
        *_bucket_rows(plan),
        *_small_resolution_rows(args, plan),
        *_mask_rows(args, plan),
        *_augmentation_rows(args, plan),
        ("captions", _captions_line(args, plan, tokenizer)),
        *_tag_rows(args, plan),
        *_caption_source_rows(plan.caption_sources),
        *_cut_prompt_rows(args, plan, tokenizer),
        *_same_words_rows(plan),
        ("steps", _steps_line(args, plan, run.resume.first_step)),
        *(("", note) for note in run.resume.notes),
        ("batch", _batch_line(args, plan, processes)),
        ("learning rate", f"{plan.learning_rate:g}, {args.lr_scheduler}, {plan.warmup} steps of warm-up"),
        ("device", f"{run.accelerator.device} x {processes}, {precision}; seed {run.seed}"),
        *memory_rows(run),
        *_example_rows(run),
        ("flags", _origins_line(arguments, args.origins, FROM_FLAG)),
        ("from the model", f"{_origins_line(arguments, args.origins, TRAINING_DEFAULTS)} ({TRAINING_DEFAULTS})"),
        ("output", f"{display_path(run.folder)}, fp32; {run.space.line}"),
        *(("", note) for note in [read_only_note(run.folder)] if note),
    ]


def print_summary(run: PreparedRun) -> Rows:
    """Prints on the main process what will be done, and returns it."""
    rows = run_summary(run)
    print_table(rows, quiet=not run.is_main)
    return rows


def _example_rows(run: PreparedRun) -> Rows:
    """That pictures are generated which nobody asked for."""
    if run.args.validation_prompts or not run.validation_prompts:
        return []
    count = f"{len(run.validation_prompts)} example prompts" if run.validation_prompts[1:] else "an example prompt"
    when = "while it trains, for at most a tenth of the time, and after the last step"
    return [("generates", f"{count} {when} (--no_validation_pictures: none)")]


def _real_model_rows(args: argparse.Namespace) -> Rows:
    """How to name a model, where none was named."""
    if args.origins["pretrained_model_name_or_path"] == FROM_FLAG:
        return []
    return [("", f"a real one: --pretrained_model_name_or_path {REAL_MODEL}")]


def _left_out_rows(plan: Plan) -> Rows:
    names = left_out_extras(plan.base)
    return (
        [("", f"LEFT OUT of the result, as missing or without use: {', '.join(names)} of the model")] if names else []
    )


def _origins_line(arguments: dict, origins: dict[str, str], source: str) -> str:
    """The arguments that come from `source`: name=value, of a list only how many."""
    chosen = {name: arguments[name] for name, origin in without_secrets(origins).items() if origin == source}
    pairs = (f"{name}={f'({len(value)})' if isinstance(value, list) else value}" for name, value in chosen.items())
    return " ".join(pairs) or "none"


def _pictures_line(plan: Plan) -> str:
    folders = [display_path(folder) for folder in plan.folders]
    line = f"{len(plan.pictures)} in {folders[0] if len(folders) == 1 else f'{len(folders)} folders'}"
    if plan.held_out:
        line += f", and {len(plan.held_out)} held out to measure the loss on"
    return "; ".join([line, *_left_out_pictures(plan)])


def _left_out_pictures(plan: Plan) -> list[str]:
    lines = []
    if plan.without_caption:
        lines.append(f"WITHOUT A CAPTION, left out: {_names(plan.without_caption)}")
    if plan.unreadable:
        lines.append(f"NOT READABLE, left out: {_names(plan.unreadable)} (save them as JPEG or PNG)")
    return lines


def _folder_rows(plan: Plan) -> Rows:
    """A row for each of several folders: its pictures, and its share of the samples."""
    shares = folder_shares(plan.pictures)
    rows = []
    for folder in plan.folders:
        count, share = shares.get(folder, (0, 0.0))  # of a folder all may be held out
        rows.append(("", f"{display_path(folder)}: {_count(count)}, {share:.1%} of the samples"))
    return rows if len(rows) > 1 else []


def _bucket_rows(plan: Plan) -> Rows:
    """A row for each size: its pictures, what is cut off of them, and which are enlarged."""
    rows: Rows = []
    for bucket in plan.buckets:
        height, width = bucket.size
        inside = [p for p, size in zip(plan.pictures, plan.sizes, strict=True) if size == bucket.size]
        small = [plan.names[p.path] for p in inside if p.width < width or p.height < height]
        line = f"{width} x {height} px: {_count(bucket.pictures)}, at most {bucket.cropped:.1%} cropped"
        rows.append(("size" if not rows else "", line + (f"; SMALLER and enlarged: {_names(small)}" if small else "")))
    return rows


def _small_resolution_rows(args: argparse.Namespace, plan: Plan) -> Rows:
    native = plan.shape.native_size
    if not args.resolution or args.resolution > SMALL * native:
        return []
    words = f"SMALL: this model was made for {native} px and generates poorly at {args.resolution}"
    return [("", f"{words}; leave --resolution out")]


def _mask_rows(args: argparse.Namespace, plan: Plan) -> Rows:
    """How many pictures have a mask, and how much is white."""
    rows = _named_as_mask_rows(plan)
    if not (shares := plan.white_shares):
        return rows
    outside = f"counts {args.unmasked_weight:g}" if args.unmasked_weight else "does not count"
    mean = sum(shares) / len(shares)
    line = f"{len(shares)} of {_count(len(plan.pictures))} have one, on average {mean:.1%} white"
    return [*rows, ("masks", f"{line}, at least {min(shares):.1%}; what is black {outside}")]


def _named_as_mask_rows(plan: Plan) -> Rows:
    """Which pictures only look like masks by their names."""
    named = [plan.names[p.path] for p in [*plan.pictures, *plan.held_out] if mask_key(p.path)]
    line = f"PICTURES, since they have a row, and not the masks that they are named as: {_names(named)}"
    return [("", line)] if named else []


def _augmentation_rows(args: argparse.Namespace, plan: Plan) -> Rows:
    rows = []
    if args.random_flip:
        kept = [f"{plan.names[p.path]} ({word!r})" for p in plan.pictures if (word := unmirrored_word(p))]
        line = f"{len(plan.pictures) - len(kept)} of {len(plan.pictures)} pictures are mirrored half of the time"
        if kept:
            line += f"; never those whose captions mention writing, or a side not in English: {_names(kept)}"
        rows.append(("mirrored", line))
    if args.random_affine:
        most, angle = args.random_affine, math.degrees(args.random_affine / 4)
        line = (
            f"{AFFINE_VARIANTS} variants of each: as it is, or up to {most:.0%} smaller, rotated by up to {angle:.1f}°"
        )
        rows.append(("affine", line))
    return rows


def _captions_line(args: argparse.Namespace, plan: Plan, tokenizer: CLIPTokenizer) -> str:
    whole = {caption for picture in plan.pictures for caption in picture.whole_captions}
    forms = {caption for picture in plan.pictures for caption in picture.captions}
    tokens = [plan.caption_tokens[caption] for caption in whole]
    chunk = tokenizer.model_max_length - 2
    room = _tokens_read(args, tokenizer)
    forms_of = f", {len(forms)} with their {kinds}" if (kinds := _caption_kinds(args, plan)) else ""
    line = f"{len(whole)}{forms_of}; the longest of {max(tokens)} tokens"
    line += f", read up to {room}; {sum(count > chunk for count in tokens)} of more than {chunk}"
    return "; ".join([line, *_cut_captions(args, plan, tokenizer)])


def _caption_kinds(args: argparse.Namespace, plan: Plan) -> str:
    """What is encoded beside the captions as they stand in the rows."""
    kinds = []
    if any(len(picture.caption_groups) > len(picture.whole_groups) for picture in plan.pictures):
        kinds.append("shorter variants")
    if any(picture.as_written for picture in plan.pictures):
        kinds.append("orders of tags" if args.shuffle_tags else "forms with tags left out")
    return " and ".join(kinds)


def _cut_captions(args: argparse.Namespace, plan: Plan, tokenizer: CLIPTokenizer) -> list[str]:
    """A line that names the pictures with captions longer than what is read."""
    room = _tokens_read(args, tokenizer)

    def is_cut(captions: Sequence[str]) -> bool:
        return any(plan.caption_tokens[caption] > room for caption in captions)

    cut = [plan.names[p.path] for p in plan.pictures if is_cut(p.whole_captions)]
    cut += [f"{plan.names[p.path]} (held out)" for p in plan.held_out if is_cut(p.captions[:1])]
    return [f"CUT at {room} tokens: {', '.join(cut)}"] if cut else []


def _tag_rows(args: argparse.Namespace, plan: Plan) -> Rows:
    """How lists of tags are read."""
    if not (lists := sum(len(picture.as_written) for picture in plan.pictures)):
        return []
    captions = sum(len(picture.row_captions) for picture in plan.pictures)
    line = f"{lists} of {captions} captions are lists of tags; up to {TAG_ORDERS} forms of each are encoded"
    line += ", their tags shuffled" if args.shuffle_tags else ""
    line += f", {args.tag_dropout:.0%} of the tags left out" if args.tag_dropout else ""
    return [("", line + (f"; the first {args.keep_tags} stay as they are" if args.keep_tags else ""))]


def _caption_source_rows(sources: CaptionSources) -> Rows:
    """A row for each kind of file that is not the one metadata.jsonl in the folder."""
    rows = {
        "from": sources.elsewhere,
        "from the metadata files of sub-folders, too": sources.sub_folders,
        "NOT READ": sources.not_read,
        "TEXT FILES that differ from the row of their picture, which counts": sources.differing,
    }
    return [("", f"{words}: {_names(names)}") for words, names in rows.items() if names]


def _cut_prompt_rows(args: argparse.Namespace, plan: Plan, tokenizer: CLIPTokenizer) -> Rows:
    """The prompts of --prior_prompts and --validation_prompts that are longer than what is read."""
    room = _tokens_read(args, tokenizer)
    used = dict.fromkeys(plan.prior_prompts) if args.prior_prompts else ()
    given = {"prior": used, "validation": args.validation_prompts or ()}
    return [
        ("", f"CUT at {room} tokens: --{name}_prompts {textwrap.shorten(prompt, 60, placeholder=' ...')!r}")
        for name, prompts in given.items()
        for prompt in prompts
        if count_tokens(tokenizer, prompt) > room
    ]


def _same_words_rows(plan: Plan) -> Rows:
    """A prior prompt that is also a caption: the base's pictures and those of the data set then contend for it."""
    captions = {_normalized(caption) for picture in plan.pictures for caption in picture.captions}
    if not (both := [prompt for prompt in dict.fromkeys(plan.prior_prompts) if _normalized(prompt) in captions]):
        return []
    words = textwrap.shorten(both[0], 60, placeholder=" ...")
    return [
        ("", f"THE SAME WORDS for your pictures and for the base's own, which then stay as they are: {words!r};"),
        ("", 'give yours a name with --trigger "sks jeans", or say with --prior_prompts what the base generates'),
    ]


def _normalized(words: str) -> str:
    return " ".join(words.casefold().split()).rstrip(".")


def _tokens_read(args: argparse.Namespace, tokenizer: CLIPTokenizer) -> int:
    """How many tokens of a caption are read."""
    return args.max_token_chunks * (tokenizer.model_max_length - 2)


def _steps_line(args: argparse.Namespace, plan: Plan, first_step: int) -> str:
    once = plan.epoch_samples // args.repeats
    what = _count(once)
    if any(picture.repeats != 1 for picture in plan.pictures):
        what = f"{once} samples of {_count(len(plan.pictures))} with their repeats"
    passes = f"{args.epochs} epochs x {what} x {args.repeats} repeats"
    passes = f"{args.samples} samples of {_count(len(plan.pictures))}" if args.samples else passes
    why = "--max_train_steps" if args.max_train_steps else f"{passes} / batch of {plan.global_batch}"
    line = f"{plan.steps} ({why})"
    return line + (f", going on after step {first_step}" if first_step else "")


def _batch_line(args: argparse.Namespace, plan: Plan, processes: int) -> str:
    line = f"{args.train_batch_size} x {args.gradient_accumulation_steps} accumulated x {processes} processes"
    if plan.prior_batch:
        line += f", and {plan.prior_batch} of the {len(plan.prior_prompts)} pictures that the base generates first"
    return line


def _count(number: int) -> str:
    return f"{number} picture" if number == 1 else f"{number} pictures"


def _names(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def make_observer(run: PreparedRun, validator: Validator, summary: Rows) -> RunObserver:
    """Told of the steps, it keeps the page of the run up to date: after the start, each measure and checkpoint."""
    first_step, steps = run.resume.first_step, run.plan.steps
    checkpoints = range(0, steps, run.args.checkpointing_steps)
    due = {first_step, *validator.loss_steps, *validator.image_steps, *checkpoints} - {steps}  # the end is told apart
    wanted = run.is_main and run.args.report
    if run.is_main and not wanted:  # that of an earlier start would never say how this one ends
        (run.folder / REPORT_FILE).unlink(missing_ok=True)
    return RunObserver(lambda: run.folder, (lambda: run_facts(run, summary)) if wanted else None, due)


def run_facts(run: PreparedRun, summary: Rows) -> RunFacts:
    """What the page shows and no file in OUTPUT says; `summary` as it was printed."""
    args, plan, tokenizer = run.args, run.plan, run.tokenizer
    trained = list(zip(plan.pictures, plan.sizes, itertools.repeat(False)))
    held_out = list(zip(plan.held_out, plan.held_out_sizes, itertools.repeat(True)))
    shown, others = split_pictures(trained, held_out)
    chunk, room = tokenizer.model_max_length - 2, _tokens_read(args, tokenizer)
    return RunFacts(
        command=resume_command(args, run.accelerator.num_processes),
        uses=[row for row in closing_lines(run.folder, run.record) if row[0] not in ("the model", "its page")],
        warnings=_warnings(run),
        settings=_settings(args),
        summary=summary,
        pictures=[_data_picture(plan, picture, size, out, args.random_flip) for picture, size, out in shown],
        others=[_data_picture(plan, picture, size, out, False) for picture, size, out in others],
        counts=(len(trained), len(held_out)),
        buckets=_buckets(plan),
        caption_tokens=[plan.caption_tokens[picture.whole_captions[0]] for picture in plan.pictures],
        token_marks={chunk: f"one chunk: {chunk + 2}", room: f"read: {room}"},
        samples_per_step=plan.samples_per_step,
    )


def _data_picture(plan: Plan, picture: Picture, size: Size, held_out: bool, random_flip: bool) -> DataPicture:
    notes = ["masked"] if picture.mask else []
    if picture.repeats != 1:
        notes.append(f"repeats {picture.repeats:g}")
    if random_flip and not held_out:
        word = unmirrored_word(picture)
        notes.append(f"never mirrored: {word!r}" if word else "mirrored half of the time")
    captions = list(dict.fromkeys(picture.captions))
    return DataPicture(plan.names[picture.path], picture.path, size, captions, held_out, notes)


def _buckets(plan: Plan) -> list[tuple[str, int, str]]:
    return [
        (f"{width} × {height}", bucket.pictures, f"at most {bucket.cropped:.1%} cropped")
        for bucket in plan.buckets
        for height, width in [bucket.size]
    ]


def _warnings(run: PreparedRun) -> list[str]:
    """What of the summary one should know before one trusts the result."""
    args, plan = run.args, run.plan
    rows = [
        *_left_out_rows(plan), *_small_resolution_rows(args, plan), *_named_as_mask_rows(plan),
        *_caption_source_rows(plan.caption_sources), *_cut_prompt_rows(args, plan, run.tokenizer),
    ]  # fmt: skip
    lines = [text for _, text in rows] + run.resume.notes
    lines += [*_left_out_pictures(plan), *_cut_captions(args, plan, run.tokenizer)]
    if same := _same_words_rows(plan):
        lines.append(" ".join(text for _, text in same))
    sized = zip(plan.pictures, plan.sizes, strict=True)
    if small := [plan.names[p.path] for p, (height, width) in sized if p.width < width or p.height < height]:
        lines.append(f"SMALLER than they are trained at, enlarged: {_names(small)}")
    return lines


def _settings(args: argparse.Namespace) -> list[tuple[str, str, str]]:
    """(name, value, source) of those that come from a flag or from the model."""
    values = flags_as_given(args)
    return [
        (f"--{name}", " · ".join(values[name]) if isinstance(values[name], list) else str(values[name]), source)
        for name, source in without_secrets(args.origins).items()
        if source != FROM_SCRIPT and name in values
    ]

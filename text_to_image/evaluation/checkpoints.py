"""inference.py --checkpoint all: the same pictures with every checkpoint of a run, measured and side by side."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from evaluation.checkpoint_scores import GeneratedPictures, held_out_losses, measure_fidelity, score_checkpoint
from evaluation.checkpoints_report import Comparison, report, write_sheet
from evaluation.copies import compare, open_pictures, training_pictures
from evaluation.nearest_file import write_nearest
from evaluation.similarity import FeatureSimilarity, StructuralSimilarity
from generation.generate import generate_with, generating_processes, print_end
from generation.planned_images import PlannedImage
from generation.weights import GenerationWeights, find_all_weights
from runs.records import folders_of_run
from runtime.errors import UserError, escape_control_chars
from runtime.stopping import StopSignals


def compare_checkpoints(args: argparse.Namespace, stop: StopSignals | None = None) -> None:
    """Generates with each complete checkpoint of the run and with its result, measures the pictures, writes
    checkpoints.jsonl, checkpoints.html and the sheet, and ends with the checkpoint that the numbers speak for.

    Raises UserError where --model is no run or --embedder cannot be loaded, and as `generate`.
    """
    with generating_processes() as state:
        models = find_all_weights(args)
        embedder = FeatureSimilarity(args.embedder) if args.embedder and state.is_main_process else None
        if embedder and embedder.reads_text:
            embedder.text_features([""])  # a tokenizer that is missing is said now
        files = generate_with(args, models, stop or StopSignals(), state)
        if state.is_main_process:
            print_end(args.output_dir, files, write_sheet(args, models, files))
            report(args, measure(args, models, files, embedder))


def measure(
    args: argparse.Namespace,
    models: Sequence[GenerationWeights],
    files: Mapping[PlannedImage, str],
    embedder: FeatureSimilarity | None,
) -> Comparison:
    """Distances by structural similarity, as check_copies.py measures them; fidelity by the embedder."""
    own = [open_generated(args.output_dir, model.checkpoint or "", files) for model in models]
    everything = {path: picture for each in own for path, picture in each.pictures.items()}
    training, similarity = open_training_pictures(models[0].run), StructuralSimilarity()
    copies = compare(similarity, everything, training) if training and everything else None
    if copies:
        write_nearest(args.output_dir, copies.matches, training)
    matches = {match.generated: match for match in copies.matches} if copies else {}
    losses = held_out_losses(Path(args.model).expanduser(), [each.checkpoint for each in own])
    scores = [score_checkpoint(each, losses[each.checkpoint], similarity, matches) for each in own]
    if embedder:
        features = embedder.features(list(training.values())) if training else None
        scores = [replace(s, **measure_fidelity(o, embedder, features)) for s, o in zip(scores, own, strict=True)]
    return Comparison(models, scores, files, copies)


def open_generated(folder: Path, checkpoint: str, files: Mapping[PlannedImage, str]) -> GeneratedPictures:
    """Without the pictures that a safety checker has blackened."""
    own = {folder / name: i for i, name in files.items() if i.checkpoint == checkpoint and name == i.file_name}
    pictures = open_pictures(list(own), "--output_dir", folder)[0] if own else {}
    return GeneratedPictures(checkpoint, pictures, {path: image.prompt for path, image in own.items()})


def open_training_pictures(run: Mapping[str, Any]) -> dict[Path, Image.Image]:
    """Thumbnails of what the run was trained on; none, and a line that says why, where they are gone."""
    try:
        folders, metadata_file = folders_of_run(run)
        where = metadata_file, run["arguments"].get("image_column", "image")
        originals = [path for folder in folders for path in training_pictures(folder, *where)]
        pictures, unreadable = open_pictures(originals, "--dataset", *folders)
    except UserError as error:
        print(escape_control_chars(f"not measured: nearest and copies; no training pictures of the run: {error}"))
        return {}
    for line in unreadable:
        print(escape_control_chars(f"left out: {line}"))
    return pictures

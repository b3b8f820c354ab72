"""Uploads a finished run to the model hub."""

import argparse
from pathlib import Path

from runs.model_card import CARD_FILE, is_generated_card, make_model_card
from runs.records import KEPT_UNETS, REPORT_FILE
from runtime.errors import WorkError
from runtime.hub import asking_hub, hub_error_reason

NOT_UPLOADED = [
    "checkpoint-*/**", ".partial-*/**", f"{KEPT_UNETS}/**", "cache/**", ".cache/**", ".lock*", ".reserve", ".*.part",
    REPORT_FILE,  # it shows the pictures that the run was trained on
]  # fmt: skip


def prepare_upload(args: argparse.Namespace, folder: Path) -> None:
    """Creates the repository for --push_to_hub, so that a wrong token shows before the training and not after it."""
    from huggingface_hub import HfApi

    if args.push_to_hub:
        with asking_hub("--push_to_hub"):
            HfApi(token=args.hub_token).create_repo(_repository_name(args, folder), exist_ok=True)


def upload(args: argparse.Namespace, folder: Path) -> None:
    """Uploads the pipeline with run.json, metrics.jsonl and a model card, without checkpoints and caches.

    A model card that somebody has edited on the hub stays. Raises WorkError if the hub refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=args.hub_token)
    try:
        repository = api.create_repo(_repository_name(args, folder), exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repository, folder_path=folder, ignore_patterns=[*NOT_UPLOADED, f"{args.logging_dir}/**"]
        )
        if not api.file_exists(repository, CARD_FILE) or is_generated_card(
            Path(api.hf_hub_download(repository, CARD_FILE))
        ):
            card = make_model_card(folder, repository)
            api.upload_file(path_or_fileobj=card.encode(), path_in_repo=CARD_FILE, repo_id=repository)
    except Exception as error:
        raise WorkError(
            f"--push_to_hub: {hub_error_reason(error)}; the result is in {folder}, and the same command tries again"
        ) from None


def _repository_name(args: argparse.Namespace, folder: Path) -> str:
    return args.hub_model_id or folder.resolve().name

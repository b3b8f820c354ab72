"""A finished run goes to the model hub."""

import argparse
from pathlib import Path

from runs.model_card import CARD, is_ours, model_card
from runtime.errors import UserError, WorkError, first_line

NOT_UPLOADED = ["checkpoint-*/**", ".partial-*/**", "cache/**", ".cache/**", ".lock*", ".*.part"]


def _repository(args: argparse.Namespace, folder: Path) -> str:
    return args.hub_model_id or folder.resolve().name


def prepare_upload(args: argparse.Namespace, folder: Path) -> None:
    """Makes the repository that --push_to_hub uploads to: a wrong token shows now, not after the training."""
    from huggingface_hub import HfApi

    if args.push_to_hub:
        try:
            HfApi(token=args.hub_token).create_repo(_repository(args, folder), exist_ok=True)
        except Exception as error:  # the hub's errors have no common class
            raise UserError(f"--push_to_hub: {first_line(error)}; log in with `hf auth login`") from None


def upload(args: argparse.Namespace, folder: Path) -> None:
    """The pipeline with run.json, metrics.jsonl and a model card; no checkpoint, no cache.

    Raises WorkError where the hub refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=args.hub_token)
    try:
        repository = api.create_repo(_repository(args, folder), exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repository, folder_path=folder, ignore_patterns=[*NOT_UPLOADED, f"{args.logging_dir}/**"]
        )
        if not api.file_exists(repository, CARD) or is_ours(Path(api.hf_hub_download(repository, CARD))):
            card = model_card(folder, repository)
            api.upload_file(path_or_fileobj=card.encode(), path_in_repo=CARD, repo_id=repository)
    except Exception as error:
        raise WorkError(
            f"--push_to_hub: {first_line(error)}; the result is in {folder}, and the same command tries again"
        ) from None

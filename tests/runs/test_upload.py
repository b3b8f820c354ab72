"""Uploads: a hub that refuses is one line, and a model card that somebody wrote stays."""

from argparse import Namespace
from types import SimpleNamespace

import huggingface_hub
import pytest

from runs.model_card import GENERATED_MARK
from runs.upload import prepare_upload, upload
from runtime import hub
from runtime.errors import UserError, WorkError
from runtime.hub import HubSilent
from train_text_to_image import parse_args


def test_a_hub_that_refuses_is_one_line_before_the_training_and_after_it(tmp_path, monkeypatch):
    class Api:
        def __init__(self, token):
            pass

        def create_repo(self, *_, **__):
            raise RuntimeError("401 Unauthorized\nsee the documentation")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    args = Namespace(push_to_hub=True, hub_token="hf_secret", hub_model_id=None, logging_dir="logs")
    with pytest.raises(UserError, match="^--push_to_hub: 401 Unauthorized"):
        prepare_upload(args, tmp_path)
    with pytest.raises(WorkError, match="401 Unauthorized; the result is in"):
        upload(args, tmp_path)


def test_a_hub_that_falls_silent_while_the_result_is_uploaded_is_given_up(tmp_path, monkeypatch):
    class Api:
        def __init__(self, token):
            pass

        def create_repo(self, *_, **__):
            huggingface_hub.get_session().get("http://127.0.0.1:1/api/whoami")

    class Silent:
        def __init__(self, *_):
            self.silence = None

        def send(self, request, **_):
            self.silence = HubSilent("no answer")
            raise self.silence

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "Patience", Silent)
    args = Namespace(push_to_hub=True, hub_token=None, hub_model_id=None, logging_dir="logs")
    with pytest.raises(WorkError, match="--push_to_hub: the hub does not answer.*the result is in"):
        upload(args, tmp_path)


@pytest.mark.parametrize("card, replaced", [(None, True), ("ours", True), ("# somebody's own", False)])
def test_a_model_card_is_written_anew_unless_somebody_has_written_it(card, replaced, monkeypatch, tmp_path):
    there, uploaded = tmp_path / "there.md", []
    there.write_text(GENERATED_MARK if card == "ours" else card or "")
    api = SimpleNamespace(
        create_repo=lambda name, exist_ok: SimpleNamespace(repo_id=f"me/{name}"),
        upload_folder=lambda **what: None,
        file_exists=lambda repository, name: card is not None,
        hf_hub_download=lambda repository, name: str(there),
        upload_file=lambda **what: uploaded.append(what["path_in_repo"]),
    )
    monkeypatch.setattr("huggingface_hub.HfApi", lambda token: api)
    monkeypatch.setattr("runs.upload.make_model_card", lambda folder, repository: "the card")
    upload(parse_args(["--dataset", "x", "--push_to_hub"]), tmp_path)
    assert uploaded == ["README.md"] * replaced

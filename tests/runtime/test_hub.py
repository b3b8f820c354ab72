"""A hub that refuses, is broken or never answers is one line with what to do, for whatever is asked of it."""

import http.server
import threading
from argparse import Namespace
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants, hf_api

from bases.finding import find_model
from bases.tokenizer_files import locate_tokenizer_files
from captioning.captioner_loading import download_captioner, load_captioner
from captioning.lengths import load_caption_tokenizer
from evaluation.similarity import FeatureSimilarity
from generation.loras import find_lora
from metadata.hub_datasets import find_dataset
from runtime import hub
from runtime.errors import UserError, WorkError
from runtime.hub import HubSilent, Patience, asking_hub, give_up_after, hub_error_reason, waiting_for_hub

SILENT = 0


class Answer(http.server.BaseHTTPRequestHandler):
    """Every request gets the server's status; with SILENT none until the test is over."""

    def do_GET(self):
        self.server.asked += 1
        if self.server.status == SILENT:
            self.server.over.wait()
            return
        self.send_response(self.server.status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server in the hub's place, on this machine; the libraries' pauses between retries take no time."""
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    served.daemon_threads, served.status, served.headers, served.asked = True, 200, {}, 0
    served.over = threading.Event()
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{served.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", served.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hf_api.api, "endpoint", served.url)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    yield served
    served.over.set()
    served.shutdown()
    served.server_close()


def ask_dataset(name: str) -> None:
    usual = {"dataset_config_name": None, "metadata_file": None, "cache_dir": None, "hub_token": None}
    find_dataset(Namespace(dataset=name, image_column="image", caption_column="text", **usual))


ASKED = {
    "model": lambda: find_model("some/model", "--model"),
    "data set": lambda: ask_dataset("some/data"),
    "captioner": lambda: load_captioner("some/captioner"),
    "captioner at set-up": lambda: download_captioner("some/captioner"),
    "tokenizer": lambda: load_caption_tokenizer("some/model"),
    "tokenizer of one file": lambda: locate_tokenizer_files(None, "--model a.safetensors", None),
    "LoRA": lambda: find_lora("some/lora"),
}


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize(("status", "error", "advice"), [(403, UserError, "licence"), (503, WorkError, "wait")])
def test_a_refusal_is_told_by_its_number_whatever_is_asked_for(server, asked, status, error, advice):
    server.status = status
    with pytest.raises(error, match=rf"\b{status}: .*{advice}") as raised:
        ASKED[asked]()
    assert server.asked and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("status", "code", "advice"),
    [
        (401, "", "token.*hf auth login"),
        (401, "RepoNotFound", "no repository of this name"),
        (403, "GatedRepo", "licence"),
        (404, "", "name"),
        (404, "RevisionNotFound", "revision"),
        (404, "EntryNotFound", "no a.json in it"),
        (429, "", "wait.*again"),
        (500, "", "wait.*again"),
        (504, "", "wait.*again"),
        (418, "", "418"),
    ],
)
def test_every_refusal_says_what_to_do(server, status, code, advice):
    server.status, server.headers = status, {"X-Error-Code": code}
    with pytest.raises((UserError, WorkError), match=rf"^x: {status}: .*{advice}"), asking_hub("x"):
        huggingface_hub.hf_hub_download("some/model", "a.json", endpoint=server.url)


@pytest.mark.parametrize("asked", ASKED)
def test_a_hub_that_never_answers_is_reported_and_given_up(server, monkeypatch, capfd, asked):
    monkeypatch.setattr(hub, "NOTICE_AFTER", 0.1)
    monkeypatch.setattr(hub, "GIVE_UP_AFTER", 0.4)
    server.status = SILENT
    with pytest.raises(WorkError, match="does not answer"):
        ASKED[asked]()
    assert capfd.readouterr().err.count("has not answered") == 1
    assert not isinstance(huggingface_hub.get_session().send.__self__, Patience)


def test_a_timeout_that_the_user_has_set_is_kept(monkeypatch):
    assert give_up_after() == 60
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "300")
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 300)
    assert give_up_after() == 300


def test_an_answer_begins_the_time_anew(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(hub.time, "monotonic", lambda: now[0])
    patience = Patience(lambda request: now.__setitem__(0, now[0] + 50), give_up=60, notice=10)
    request = SimpleNamespace(method="GET", extensions={"timeout": {"read": 90}}, url="x")
    for _ in range(3):
        patience.send(request)
    assert request.extensions["timeout"] == {"connect": 60, "read": 60, "write": 60, "pool": 60}


def test_an_upload_takes_the_time_that_it_takes(server):
    sent = []
    request = SimpleNamespace(method="POST", url=SimpleNamespace(path="/api/models/me/it/commit/main"), extensions={})
    Patience(sent.append, give_up=0, notice=10).send(request)
    assert sent == [request] and request.extensions == {}


def test_a_sub_folder_is_no_model_of_its_own():
    with pytest.raises(UserError, match="owner/name; a sub-folder"):
        find_model("owner/name/unet", "--model")
    with pytest.raises(UserError, match="owner/name"):
        load_captioner("owner/name/captioner")


def test_offline_the_cache_is_all_there_is():
    with pytest.raises(UserError, match="x: it is not in the download cache, and HF_HUB_OFFLINE"), asking_hub("x"):
        huggingface_hub.hf_hub_download("some/model", "a.json")


def test_a_full_disk_is_not_the_hubs_fault():
    with pytest.raises(OSError, match="No space left"), asking_hub("x"):
        raise OSError(28, "No space left on device")


def test_an_unreachable_hub_is_named_and_any_other_error_is_its_first_line(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    error = OSError("Couldn't connect\nlong advice")
    assert hub_error_reason(error) == "Couldn't connect"
    error.__context__ = ConnectionRefusedError(111, "refused")
    assert "the hub cannot be reached" in hub_error_reason(error)


@pytest.mark.parametrize("asked", ASKED)
def test_for_a_hub_that_cannot_be_reached_only_waiting_helps_as_for_a_silent_one(server, asked):
    server.shutdown()
    server.server_close()
    with pytest.raises(WorkError, match="cannot be reached"):
        ASKED[asked]()


@pytest.mark.parametrize("asked", ASKED)
def test_offline_by_ones_own_wish_only_another_name_helps(server, monkeypatch, asked):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE|some.captioner"):
        ASKED[asked]()


PATHS = {
    "model": lambda name: find_model(name, "--model"),
    "captioner": load_captioner,
    "captioner at set-up": download_captioner,
    "tokenizer": load_caption_tokenizer,
    "LoRA": find_lora,
    "embedder": FeatureSimilarity,
}


@pytest.mark.parametrize("asked", PATHS)
@pytest.mark.parametrize("name", ["/no/such folder", "./none", "../none", "~/none"])
def test_nobody_asks_the_hub_for_a_path(server, asked, name):
    with pytest.raises(UserError, match=f"{name}: no such folder or file$"):
        PATHS[asked](name)
    assert not server.asked


def test_after_silence_the_libraries_take_what_is_in_the_cache(server, monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "GIVE_UP_AFTER", 0.2)
    folder = tmp_path / "cache" / "models--some--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    file = folder / "snapshots" / ("0" * 40) / "a.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    server.status = SILENT
    with waiting_for_hub():
        found = huggingface_hub.hf_hub_download("some/model", "a.json", cache_dir=tmp_path / "cache")
    assert found == str(file)


def test_silence_is_an_offline_hub_to_the_libraries():
    assert issubclass(HubSilent, huggingface_hub.errors.OfflineModeIsEnabled)

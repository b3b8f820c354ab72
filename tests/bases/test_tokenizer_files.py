"""The tokenizer of a one-file model comes from a folder or from the hub, and a line says so where neither has it."""

import json
import shutil

import pytest

import bases.tokenizer_files
from models.loading import load_tokenizer
from runtime.errors import UserError


def test_a_tokenizer_is_a_folder_or_lies_in_one(convert, file_of, folders):
    below, itself = convert(file_of(1), folders[1]), convert(file_of(1), folders[1] / "tokenizer")
    assert below == itself and load_tokenizer(below)("denim jeans") == load_tokenizer(folders[1])("denim jeans")


def test_without_one_and_without_a_hub_a_line_says_how_to_bring_it(convert, file_of, outputs, monkeypatch):
    def unreachable(*args, **settings):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(bases.tokenizer_files, "hf_hub_download", unreachable)
    with pytest.raises(UserError, match=r"clip-vit-large.*bash job\.sh setup.*--tokenizer FOLDER") as error:
        convert(file_of(1), tokenizer=None)
    assert "\n" not in str(error.value) and not outputs.exists()


@pytest.mark.parametrize(("version", "padding"), [(1, "<|endoftext|>"), (2, "!")])
def test_from_the_hub_comes_clips_vocabulary_with_each_versions_padding(
    convert, file_of, folders, monkeypatch, version, padding
):
    monkeypatch.setattr(
        bases.tokenizer_files, "hf_hub_download", lambda repository, name, cache_dir: folders[1] / "tokenizer" / name
    )
    tokenizer = load_tokenizer(convert(file_of(version), tokenizer=None))
    assert tokenizer.pad_token == padding and tokenizer.model_max_length == 77
    assert tokenizer("denim jeans").input_ids == load_tokenizer(folders[version])("denim jeans").input_ids


def test_a_wrong_tokenizer_is_refused(convert, file_of, folders, tmp_path, outputs):
    with pytest.raises(UserError, match=f"--tokenizer {tmp_path}"):
        convert(file_of(1), tmp_path)
    other = shutil.copytree(folders[1] / "tokenizer", tmp_path / "other")
    for path in other.iterdir():
        if path.name not in ("vocab.json", "merges.txt", "tokenizer_config.json"):
            path.unlink()
    vocabulary = json.loads((other / "vocab.json").read_text())
    (other / "vocab.json").write_text(json.dumps({**vocabulary, "jeansjeans</w>": len(vocabulary)}))
    with pytest.raises(UserError, match=rf"has {len(vocabulary) + 1} tokens.*{len(vocabulary)}"):
        convert(file_of(1), other)
    assert not list(outputs.glob("converted/*"))
    with pytest.raises(UserError, match=f"--tokenizer {other}: .*one file"):
        convert(folders[1], other)

"""Pictures in tar shards and parquet files are read, named, masked and counted as those of a folder are."""

import json
from argparse import Namespace
from io import BytesIO

import pytest
from accelerate import Accelerator
from PIL import Image

from captioned_folder import READING, write_captioned_folder
from clone import ROOT
from data.captioned_folders import read_dataset
from data.dataset import hash_dataset
from data.images import open_image
from metadata.picture_names import distinct_names
from packed_data import samples_of, table_of, write_shard
from reporting.thumbnails import thumbnail
from runtime.errors import InputChanged, UserError


def read(*datasets, **flags):
    return read_dataset(Namespace(**{**vars(READING), **flags}), Accelerator(cpu=True), datasets)


def png(*size, **settings) -> bytes:
    content = BytesIO()
    Image.new(settings.get("mode", "RGB"), size, settings.get("color", "white")).save(content, "PNG")
    return content.getvalue()


def test_the_same_pictures_and_captions_have_the_same_hash_in_a_folder_a_shard_and_a_table(tmp_path):
    folder = write_captioned_folder(tmp_path / "data")
    members = samples_of(folder)
    write_shard(tmp_path / "shards" / "0.tar", members[:2])
    write_shard(tmp_path / "shards" / "1.tar", members[2:])
    datasets = folder, tmp_path / "shards", tmp_path / "shards" / "{0,1}.tar", table_of(tmp_path / "a.parquet", folder)
    assert len({hash_dataset(read(dataset).pictures) for dataset in datasets}) == 1


def test_a_picture_of_a_shard_is_shown_and_named_with_its_shard(tmp_path):
    folder = write_captioned_folder(tmp_path / "data")
    write_shard(tmp_path / "0.tar", samples_of(folder))
    write_shard(tmp_path / "1.tar", samples_of(folder)[:2])
    [first, *_, last] = read(tmp_path / "*.tar").pictures
    assert distinct_names([first.path, last.path, folder / "1.jpg"])[last.path] == "1.tar/0000.jpg"
    assert open_image(first.path).tobytes() == open_image(folder / "11 (1).JPG").tobytes()
    assert thumbnail(first.path, 16) == thumbnail(folder / "11 (1).JPG", 16)


def test_what_is_left_out_of_shards_is_named_with_its_shard(tmp_path):
    samples = samples_of(write_captioned_folder(tmp_path / "data"))
    shard = write_shard(tmp_path / "shards" / "0.tar", [*samples, ("x/2.jpg", samples[0][1]), ("3.heic", b"-")])
    (tmp_path / "shards" / "test.tar").touch()
    for dataset in (shard, shard.parent, shard.parent / "0*.tar"):
        found = read(dataset)
        assert (found.without_caption, found.unreadable) == (["0.tar/x/2.jpg"], ["0.tar/3.heic"])
    assert read(shard.parent).caption_sources.not_read == ["test.tar"]
    both = read(shard, write_captioned_folder(tmp_path / "other"))
    assert both.without_caption == [str(shard / "x/2.jpg")] and len(both.pictures) == 6
    with pytest.raises(UserError, match=r"0\.tar/0000\.jpg is in --dataset"):
        read(shard, shard.parent)


def test_a_bad_picture_in_a_shard_is_refused_by_shard_and_member(tmp_path):
    samples = [("a.jpg", png(32, 32)[:60]), ("a.txt", b"a"), ("b.jpg", b""), ("b.txt", b"b"), ("c.jpg", b"?" * 99)]
    shard = write_shard(tmp_path / "0.tar", [*samples, ("c.txt", b"c")])
    with pytest.raises(UserError) as error:
        read(shard)
    lines = str(error.value).splitlines()
    assert [line.split(": ")[0].strip() for line in lines[1:]] == ["0.tar/a.jpg", "0.tar/b.jpg", "0.tar/c.jpg"]
    assert "damaged" in lines[1] and "empty" in lines[2] and "not a picture" in lines[3]


def test_masks_are_beside_their_pictures_in_a_shard_or_their_transparency(tmp_path):
    samples = [("x/a.png", png(32, 32)), ("x/a.txt", b"a"), ("b.png", png(32, 32, mode="RGBA", color=(0, 0, 0, 9)))]
    samples += [("b.txt", b"b"), ("x/a.mask.png", png(32, 32, mode="L"))]
    [masked, clear] = read(write_shard(tmp_path / "0.tar", samples), mask_from_alpha=True).pictures
    assert masked.mask.path.name == "a.mask.png" and masked.mask.load(16, 16).mean() == 1
    assert clear.mask.from_alpha and clear.mask.load(16, 16).mean() < 0.1
    with pytest.raises(UserError, match=r"0\.tar/c\.mask\.png: a mask"):
        read(write_shard(tmp_path / "0.tar", [*samples, ("c.mask.png", png(32, 32))]))


def test_a_picture_of_a_shard_that_is_changed_or_gone_is_noticed_when_it_is_read(tmp_path):
    samples = samples_of(write_captioned_folder(tmp_path / "data"))
    shard = write_shard(tmp_path / "0.tar", samples)
    [first, second, _] = read(shard).pictures
    assert first.sha256 and first.open().getvalue() == samples[0][1]
    write_shard(shard, [("0000.jpg", samples[2][1]), *samples[1:]])
    assert second.open().getvalue() == samples[2][1]
    with pytest.raises(InputChanged, match=r"0\.tar/0000\.jpg: another picture"):
        first.open()
    write_shard(shard, samples[2:])
    with pytest.raises(InputChanged, match=r"0\.tar/0000\.jpg: no such file"):
        first.open()
    shard.write_bytes(b"no tar")
    with pytest.raises(InputChanged, match=r"0\.tar/0000\.jpg: cannot be read"):
        first.open()


def test_repeats_of_a_json_count(tmp_path):
    rows = json.dumps({"caption": "b", "repeats": 3}).encode()
    shard = write_shard(tmp_path / "0.tar", [("b.png", png(32, 32)), ("b.json", rows)])
    assert read(shard).pictures[0].repeats == 3


def test_the_example_of_the_readme_packs_a_captioned_folder(tmp_path, monkeypatch):
    folder = write_captioned_folder(tmp_path / "dataset")
    section = (ROOT / "dataset" / "README.md").read_text().split("## Tar shards and parquet files")[1]
    monkeypatch.chdir(tmp_path)
    exec(section.split("```python\n")[1].split("```")[0], {})
    assert hash_dataset(read(tmp_path / "000.tar").pictures) == hash_dataset(read(folder).pictures)

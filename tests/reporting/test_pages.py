"""Pages: what they show is escaped, they ask for nothing, and they are whole or not there."""

import base64
import re
from io import BytesIO

import pytest
from PIL import Image

from reporting.pages import TEMPLATES, render, write_page
from reporting.thumbnails import thumbnail


@pytest.fixture
def template(monkeypatch, tmp_path):
    """A template of one value in the frame of every page."""
    folder = tmp_path / "templates"
    folder.mkdir()
    for name in ("page.html", "page.css", "parts.html"):
        (folder / name).write_bytes((TEMPLATES / name).read_bytes())
    (folder / "one.html").write_text(
        '{% extends "page.html" %}{% from "parts.html" import command, chip %}'
        "{% block title %}{{ value }}{% endblock %}{% block content %}{{ command(value, value) }}{{ chip(value) }}"
        '<img alt="{{ value }}">{% endblock %}'
    )
    monkeypatch.setattr("reporting.pages.TEMPLATES", folder)
    return "one.html"


def test_what_a_page_shows_is_escaped_in_text_attributes_and_shared_parts(template):
    page = render(template, value="\"><script>alert(1)</script><img src=x onerror='alert(2)'>")
    assert "<script>alert" not in page and "<img src=x" not in page and page.count("&lt;script&gt;") == 5


def test_a_page_names_no_address_that_a_browser_would_ask(template):
    page = render(template, value="x")
    assert re.findall(r"(?:https?:)?//[\w.]+|url\(|@import|src=", page.replace("// The page", "")) == []


def test_a_page_is_written_whole_or_not_at_all(template, tmp_path):
    page = tmp_path / "report.html"
    write_page(page, template, value="first \udce9")  # part of a file's name that is not UTF-8
    before = page.read_bytes()
    with pytest.raises(Exception, match="value"):
        write_page(page, template, other="not the value")
    assert page.read_bytes() == before and [path.name for path in tmp_path.glob("*.part")] == []


def test_a_thumbnail_is_small_upright_and_cropped_as_asked(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # lies on its side
    Image.new("RGB", (400, 100), "red").save(tmp_path / "a.jpg", exif=exif)
    sizes = []
    for shape in (None, (64, 64), (10, 20)):
        head, _, content = thumbnail(tmp_path / "a.jpg", 80, shape).partition(",")
        sizes.append(Image.open(BytesIO(base64.b64decode(content))).size)
        assert head == "data:image/jpeg;base64"
    assert sizes == [(20, 80), (80, 80), (80, 40)]

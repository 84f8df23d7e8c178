"""The page needs no other file and no network, and interprets nothing that was meant as text."""

import base64
from html.parser import HTMLParser

import pytest

from hf_alibi.reporting.html_page import html_page

PNG = b"\x89PNG\r\n\x1a\nnot much"
TEXT = """# Title

| a | b |
| --- | ---: |
| x \\| y | **1** |

- one `code`

![A picture, of two](p.png)

<script src="https://example.org/x.js"></script> & <b>
"""


class Page(HTMLParser):
    """Tags with their attributes, and text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def named(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def page(tmp_path):
    (tmp_path / "p.png").write_bytes(PNG)
    return Page(html_page(TEXT, title="a < b", folder=tmp_path))


def test_pictures_are_inside(page):
    (image,) = page.named("img")
    kind, data = image["src"].split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == PNG
    assert image["alt"] == "A picture, of two"


def test_nothing_is_loaded_from_elsewhere(page):
    for tag, attrs in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        assert all(value.startswith("data:") for name, value in attrs.items() if name in ("src", "href", "srcset"))
    assert "url(" not in page.text
    assert "@import" not in page.text


def test_html_in_the_text_is_text(page):
    assert '<script src="https://example.org/x.js"></script> & <b>' in page.text
    assert "a < b" in page.text


def test_tables_and_lists_are_rendered(page):
    assert len(page.named("table")) == 1
    assert len(page.named("td")) == 2
    assert "x | y" in page.text
    assert len(page.named("li")) == 1
    assert page.open == []


def test_it_fits_a_phone(page):
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.named("meta")
    assert "overflow-x: auto" in page.text


def test_a_missing_picture_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        html_page("![x](gone.png)", title="t", folder=tmp_path)

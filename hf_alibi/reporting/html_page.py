"""Markdown with pictures as one HTML page that needs no other file and no network."""

import base64
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt

__all__ = ["html_page"]

_STYLE = """\
body { max-width: 62rem; margin: 0 auto; padding: 1rem; font: 16px/1.55 system-ui, sans-serif; color: #1b1b1b; }
h1, h2 { line-height: 1.2; margin: 1.6em 0 .5em; }
h2 { border-bottom: 1px solid #ddd; padding-bottom: .2em; }
img { max-width: 100%; height: auto; background: #fff; }
table { display: block; max-width: 100%; overflow-x: auto; border-collapse: collapse; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .3em .7em; border-bottom: 1px solid #e2e2e2; white-space: nowrap; }
th { border-bottom-color: #888; }
td:first-child, th:first-child { position: sticky; left: 0; background: #fff; white-space: normal; min-width: 7rem; }
code { background: #f2f2f2; padding: .1em .3em; border-radius: .2em; }
li { margin: .35em 0; }
"""

_PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}</body>
</html>
"""


def html_page(text: str, *, title: str, folder: Path) -> str:
    """Render Markdown with tables; the PNG pictures that it links, by their names in `folder`, are put inside.

    HTML in the text is shown as it is written, not interpreted. Raises OSError for a picture that is not there.
    """
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = markdown.parse(text)
    for token in (child for block in tokens for child in block.children or () if child.type == "image"):
        picture = base64.b64encode((folder / str(token.attrs["src"])).read_bytes()).decode("ascii")
        token.attrs["src"] = f"data:image/png;base64,{picture}"
    body = markdown.renderer.render(tokens, markdown.options, {})
    return _PAGE.format(title=escape(title), style=_STYLE, body=body)

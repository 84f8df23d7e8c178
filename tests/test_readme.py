"""The README and the pages in docs/ say what the package does, and their links lead somewhere."""

import re
from pathlib import Path

import pytest

import hf_alibi

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_table_of_families_is_the_packages():
    text = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert hf_alibi.supported_families().markdown() in text


def test_the_readme_counts_the_families_rightly():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = hf_alibi.supported_families()
    assert f"{len(table)} model types are converted" in text
    assert f"{len(table.refused)} are refused" in text


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    for link in links:
        assert (page.parent / link.split("#")[0]).exists(), link


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / ".ci" / "run", *ROOT.glob(".github/workflows/*")], ids=lambda p: p.name
)
def test_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for named in re.findall(r"(?:configs|scripts|hf_alibi|tests|docs)/[\w/.-]+\.(?:yaml|py|sh|md)", text):
        assert (ROOT / named).exists(), named

"""The README says what the package does."""

from pathlib import Path

import hf_alibi

README = Path(__file__).parents[1] / "README.md"


def test_its_table_of_families_is_the_packages():
    """Made anew by the command in the comment above the table."""
    text = README.read_text(encoding="utf-8")
    table = text.split('markdown())" -->\n')[1].split("\n<!-- end of families")[0]
    assert table == hf_alibi.supported_families().markdown()

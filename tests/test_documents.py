"""What documents point to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
PLACES = ("trtbuild", "tests", "config", "docs", "examples", "rules", "profiles", "workflow_scripts")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links(document):
    links = re.findall(r"\]\(([^)#:\s]+)\)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_of_the_repository(document):
    """Paths from its root, and of a file's part of the package (`engine/fusion.py`); capitals stand for any name."""
    paths = re.findall(r"`(\w+/[\w./-]+)`", document.read_text())
    parts = {path.name for path in (ROOT / "trtbuild").iterdir() if path.is_dir()}
    wrong = []
    for path in paths:
        first = path.split("/")[0]
        below = ROOT if first in PLACES else ROOT / "trtbuild" if first in parts and path.endswith(".py") else None
        if below and not re.search(r"\b[A-Z]{4,}\b", path) and not (below / path).exists():
            wrong.append(path)
    assert wrong == []

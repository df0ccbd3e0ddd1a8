"""What documents point to is there."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from trtbuild import __version__

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


def test_citation():
    """Keys that the Citation File Format 1.2.0 requires; version and license as the package has them."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["version"], citation["license"]) == (__version__, project["license"])


def test_the_readme_is_short():
    """Its first screen has the two commands that `.ci/run` and a release check run, and what comes of them."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    first = "\n".join(lines[:20])
    assert all(command in first for command in ("    make demo ", "    make test ", "rougeLsum"))


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    linked = {(ROOT / "docs" / link).resolve() for link in re.findall(r"\]\(([^)#:\s]+)", index)}
    pages = {path for path in (ROOT / "docs").rglob("*.md") if "models" not in path.parts} - {
        ROOT / "docs" / "README.md"
    }
    assert pages - linked == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_to_headings(document):
    """As GitHub makes anchors: lower case, without punctuation, hyphens for spaces."""
    missing = []
    for link, anchor in re.findall(r"\]\(([^)#:\s]*)#([^)\s]+)\)", document.read_text()):
        target = (document.parent / link) if link else document
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
        anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        if anchor not in anchors:
            missing.append(f"{link}#{anchor}")
    assert missing == []

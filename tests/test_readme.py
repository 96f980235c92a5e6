"""The README and the pages keep their word: line counts, commands, links, flags, and numbers."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from train import Config, parse, spelled

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "notebooks" / "pages").glob("*.md"))
RESULTS = ROOT / "notebooks" / "results"
LINES = re.sub(r" *\\\n *", " ", README).splitlines()
COMMANDS = [line.strip() for line in LINES if re.match(r"    (python|pip|pytest)\b", line)]
FLAGS = {spelled(field.name) for field in fields(Config)} | {"--preset", "--only", "--solved"}


def test_it_is_short():
    text = [line for line in README.splitlines() if not line.startswith("|")]
    assert len(" ".join(text).split()) <= 2000 and len(README.encode()) <= 20_000


def test_line_counts():
    counts = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M))
    real = {f.name: str(len(f.read_text().splitlines())) for f in ROOT.glob("*.py")}
    assert counts == real


def test_top_level_is_as_the_readme_says():
    ignored = {"out", "build", "dist", "__pycache__", "cosd.egg-info"}
    names = {f.name for f in ROOT.iterdir() if not f.name.startswith(".")} - ignored
    files = {
        "README.md",
        "pyproject.toml",
        "LICENSE",
        "cosd.py",
        "model.py",
        "contexts.py",
        "train.py",
    }
    assert names == files | {"tests", "notebooks"}


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python train.py")])
def test_every_train_command_parses(command):
    cfg = parse(shlex.split(command)[2:])
    for name in ("prompts", "heldout", "context_file"):
        assert getattr(cfg, name) is None or (ROOT / getattr(cfg, name)).is_file()


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(code, {})
    assert "'loss':" in capsys.readouterr().out


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "notebooks" / "pages" / "details.md"])
def test_every_flag_named_in_the_text_exists(page):
    flags = set(re.findall(r"`(--[a-z-]+)", page.read_text()))
    assert flags and flags <= FLAGS, flags - FLAGS


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("name, text", [("story", README), ("anchors", README)])
def test_numbers_of_the_readme_are_those_of_the_committed_runs(name, text):
    """Header and rows of the runs' results.md stand in the README to the letter."""
    table = (RESULTS / name / "results.md").read_text().split("\n\n")[0].splitlines()
    assert len(table) > 2 and all(f"\n{row}\n" in text for row in table)


def test_evidence_is_that_of_the_committed_pages():
    """Each row of each table of the page stands in a page that the evidence wrote."""
    page = (ROOT / "notebooks" / "pages" / "evidence.md").read_text()
    section = page.split("# What holds")[0]
    written = "".join(path.read_text() for path in (RESULTS / "evidence").glob("*.md"))
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) > 50 and all(f"\n{row}\n" in written for row in rows)

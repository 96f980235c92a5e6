"""The README keeps its word: line counts, commands, links, and numbers equal to the committed runs."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from train import Config, parse

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [line.strip() for line in re.sub(r" *\\\n *", " ", README).splitlines() if re.match(r"    (python|pip|pytest)\b", line)]


def test_line_counts():
    counts = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M))
    assert counts == {f.name: str(len(f.read_text().splitlines())) for f in ROOT.glob("*.py")}


def test_top_level_is_as_the_readme_says():
    ignored = {"out", "build", "dist", "__pycache__", "cosd.egg-info"}
    names = {f.name for f in ROOT.iterdir() if not f.name.startswith(".")} - ignored
    assert names == {"README.md", "pyproject.toml", "LICENSE", "cosd.py", "model.py", "contexts.py", "train.py", "tests", "notebooks"}


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python train.py")])
def test_every_train_command_parses(command):
    cfg = parse(shlex.split(command)[2:])
    for name in ("prompts", "heldout", "context_file", "unrelated"):
        assert getattr(cfg, name) is None or (ROOT / getattr(cfg, name)).is_file()


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(code, {})
    assert "'kl':" in capsys.readouterr().out


def test_every_flag_named_in_the_text_exists():
    flags = set(re.findall(r"`(--[a-z-]+)", README))
    assert len(flags) > 8 and all(flag[2:].replace("-", "_") in {f.name for f in fields(Config)} for flag in flags), flags


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()


@pytest.mark.parametrize("name", [f.parent.name for f in sorted(ROOT.glob("notebooks/results/*/results.md"))])
def test_numbers_are_those_of_the_committed_runs(name):
    """Header and rows of each run's results.md stand in the README to the letter."""
    table = (ROOT / "notebooks" / "results" / name / "results.md").read_text().split("\n\n")[0].splitlines()
    assert len(table) > 2 and all(f"\n{row}\n" in README for row in table)


def test_evidence_is_that_of_the_committed_pages():
    """Each row of each table in the section stands in a page that evidence.py wrote."""
    section = README.split("\n## The evidence\n")[1].split("\n## ")[0].split("### What holds")[0]
    pages = "".join(page.read_text() for page in (ROOT / "notebooks" / "results" / "evidence").glob("*.md"))
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) > 50 and all(f"\n{row}\n" in pages for row in rows)

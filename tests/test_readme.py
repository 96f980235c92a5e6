"""What the README and the pages say is true: line counts, commands, links, flags, and numbers."""

import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from train import Config, parse, spelled

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "notebooks"))

import report

README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "notebooks" / "pages").glob("*.md"))
# The pages whose commands are verified: .ci/run runs all of them.
CHECKED = ["README.md", "notebooks/pages/running.md", "notebooks/pages/results.md"]
CHECKED_TEXT = "\n".join((ROOT / page).read_text() for page in CHECKED)
RESULTS = ROOT / "notebooks" / "results"
LINES = re.sub(r" *\\\n *", " ", CHECKED_TEXT).splitlines()
COMMANDS = [line.strip() for line in LINES if re.match(r"    (python|pip|pytest)\b", line)]
FLAGS = {spelled(field.name) for field in fields(Config)} | {"--preset"}


def test_it_is_short():
    assert len(README.split()) <= 2000 and len(README.encode()) <= 14_000


def test_line_counts_to_a_tenth():
    told = dict(re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M))
    real = {f.name: len(f.read_text().splitlines()) for f in ROOT.glob("*.py")}
    assert told.keys() == real.keys()
    assert all(abs(int(told[name]) - real[name]) <= 0.1 * real[name] for name in real), real


def test_what_is_checked_here_is_run_on_a_fresh_machine():
    (pages,) = re.findall(r"^PAGES=\((.*)\)$", (ROOT / ".ci" / "run").read_text(), re.M)
    assert pages.split() == CHECKED
    assert COMMANDS[1] == "python train.py" and len(COMMANDS) >= 20  # [0] installs


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


def test_the_python_of_the_pages_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", CHECKED_TEXT, re.S)
    exec(code, {})
    assert "'loss':" in capsys.readouterr().out


@pytest.mark.parametrize("page", [*CHECKED, "notebooks/pages/details.md"])
def test_every_flag_named_in_the_text_exists(page):
    flags = set(re.findall(r"`(--[a-z-]+)", (ROOT / page).read_text()))
    assert flags and flags <= FLAGS, flags - FLAGS


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_ten_rows_of_the_readme_are_made_from_the_committed_results():
    table = report.readme_table()
    assert len(table.splitlines()) == 2 + 10 and f"\n{table}\n\n" in README


@pytest.mark.parametrize("name", ["story", "anchors"])
def test_numbers_of_the_results_page_are_those_of_the_committed_runs(name):
    """Header and rows are those of results.md, which is made from results.json."""
    page = (ROOT / "notebooks" / "pages" / "results.md").read_text()
    table = (RESULTS / name / "results.md").read_text().split("\n\n")[0]
    assert len(table.splitlines()) > 2 and f"\n{table}\n\n" in page
    assert table == report.table(report.committed(name))


@pytest.mark.parametrize("name", ["forgetting", "protection", "teachers"])
def test_tables_of_the_evidence_are_those_that_it_wrote(name):
    """A page names the table that follows: the experiment, and which of its tables."""
    page = (ROOT / "notebooks" / "pages" / f"{name}.md").read_text()
    named = re.findall(r"<!-- (\w+) (\d) -->\n\n(.*?)\n\n", page, re.S)
    assert page.count("\n| --- |") == len(named) > 2
    for experiment, which, table in named:
        written = (RESULTS / "evidence" / f"{experiment}.md").read_text().strip().split("\n\n")
        assert table == [block for block in written if block.startswith("|")][int(which)]

"""The committed notebooks match their sources and ran to their end, and the sources run as plain scripts."""

import ast
import builtins
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
sys.path.insert(0, str(NOTEBOOKS))
import build  # noqa: E402

SOURCES = sorted(NOTEBOOKS.glob("0*.py"))
# Those that need the pretrained base take minutes, some more where it is not in out/ yet.
RUNS = []
for source in SOURCES:
    slow = "01" in source.name or re.search("get_base|SmolLM2", source.read_text())
    RUNS.append(pytest.param(source, marks=[pytest.mark.slow] if slow else []))


def name_of(source):
    return source.stem


def committed(source):
    return json.loads(source.with_suffix(".ipynb").read_text())["cells"]


def said(cell):
    """What a cell's outputs say in words; pictures only by name, their pixels depend on matplotlib's version."""
    words = []
    for output in cell["outputs"]:
        if "text" in output:
            words.append("".join(output["text"]))
        else:
            data = output["data"]
            words.append(sorted(data) if "image/png" in data else data)
    return words


def test_percent_format():
    text = '# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\n# a comment\nx = 1\n\n\n# %% tags=["timing"]\ny = 2\n'
    assert [(c["type"], c["tags"], c["source"]) for c in build.cells(text)] == [
        ("markdown", [], "# Title\n\nText."),
        ("code", [], "# a comment\nx = 1"),
        ("code", ["timing"], "y = 2"),
    ]
    for bad in ("x = 1\n", "# %% [Markdown]\n# text\n", "# %%\nx = 1\n# %%timing\n"):
        with pytest.raises(ValueError, match="not a cell header"):
            build.cells(bad)


def parts(notebook_cells):
    return [
        (c["cell_type"], c["metadata"].get("tags", []), "".join(c["source"]))
        for c in notebook_cells
    ]


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_notebook_is_its_source_executed(source):
    pytest.importorskip("nbformat")
    made = committed(source)
    address = re.search('REPOSITORY = "(.*)"', parts(made)[1][2])[1]
    assert parts(made) == parts(build.unexecuted(source, address).cells)
    assert not address or build.PUBLIC.fullmatch(address)
    code = [c for c in made if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    outputs = [o for c in code for o in c["outputs"]]
    assert all(o["output_type"] != "error" and o.get("name") != "stderr" for o in outputs)
    assert source.with_suffix(".ipynb").stat().st_size <= 500_000
    texts = json.dumps([[c["source"] for c in made], [said(c) for c in code]])
    assert "<IPython" not in "".join("".join(o["text"]) for o in outputs if "text" in o)
    assert not re.search(r"(?<![\w./])(/(home|root|tmp|work|usr|Users|content)/|[A-Z]:\\\\)", texts)
    assert not {"execution", "papermill"} & {
        key for c in made for key in c["metadata"]
    }  # no timestamps


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_code_cells_are_small(source):
    for cell in build.cells(source.read_text()):
        lines = cell["source"].splitlines()
        assert cell["type"] == "markdown" or (len(lines) <= 40 and max(map(len, lines)) <= 120), (
            cell["source"]
        )


def test_all_begin_alike_and_leave_a_thumbnail():
    setups = {
        next(c["source"] for c in build.cells(s.read_text()) if c["type"] == "code")
        for s in SOURCES
    }
    assert len(setups) == 1 and "REPOSITORY" in setups.pop()
    for source in SOURCES:
        assert (
            NOTEBOOKS / "results" / "thumbnails" / f"{source.stem[:2]}.png"
        ).stat().st_size <= 30_000


@pytest.mark.parametrize("address", ["", "https://github.com/someone/cosd"])
def test_the_first_cell_finds_the_project_or_fetches_it(tmp_path, monkeypatch, address):
    """In a clone it moves to the top folder; alone, as on Colab, it clones and installs; run again it does nothing. Without
    an address it asks for one, once."""
    cells = build.cells(SOURCES[0].read_text())
    setup = next(c["source"] for c in cells if c["type"] == "code")
    setup = setup.replace('REPOSITORY = ""', f'REPOSITORY = "{address}"')
    top, alone = NOTEBOOKS.parent, tmp_path / "a" / "b" / "alone"
    alone.mkdir(parents=True)
    ran, asked = [], []

    def stand_in(command, check):
        ran.append((command, os.getcwd()))
        if command[0] == "git":
            Path(command[-1]).mkdir()
            Path(command[-1], "cosd.py").touch()

    monkeypatch.setattr(subprocess, "run", stand_in)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(
        builtins, "input", lambda text: asked.append(text) or "https://given.example/x"
    )
    for within in (NOTEBOOKS, NOTEBOOKS / "data"):
        monkeypatch.chdir(within)
        for _ in range(2):
            exec(setup, {})
            assert Path.cwd() == top and not ran
    monkeypatch.chdir(alone)
    for _ in range(2):
        exec(setup, {})
        assert Path.cwd() == alone / "cosd" and [c[0] for c, _ in ran] == ["git", sys.executable]
    assert ran[0][0][-2] == (address or "https://given.example/x")
    assert ran[1][0][1:3] == ["-m", "pip"] and ran[1][1] == str(alone / "cosd")
    monkeypatch.chdir(alone)  # a new kernel beside an earlier clone
    exec(setup, {})
    assert Path.cwd() == alone / "cosd" and [c[0] for c, _ in ran[2:]] == [sys.executable]
    assert len(asked) == (not address)


@pytest.mark.parametrize(
    "remote, address",
    [
        ("https://github.com/someone/cosd.git", "https://github.com/someone/cosd"),
        ("git@gitlab.com:group/sub/cosd.git", "https://gitlab.com/group/sub/cosd"),
        ("ssh://git@codeberg.org/someone/cosd", "https://codeberg.org/someone/cosd"),
        ("https://user:token@github.com/someone/cosd", ""),
        ("https://git.inside.example/cosd", ""),
        ("/srv/git/cosd", ""),
        ("", ""),
    ],
)
def test_only_a_public_address_gets_into_a_notebook(monkeypatch, remote, address):
    done = subprocess.CompletedProcess([], 0, f"{remote}\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **how: done)
    assert build.public_address() == address


# ============================================================================= for a class
@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_questions_come_first_and_answers_are_folded(source):
    cells = build.cells(source.read_text())
    asked = [i for i, c in enumerate(cells) if c["source"].count("**Question.**")]
    for i in asked:  # what is asked is computed next, and answered after that
        after = [c["type"] for c in cells[i + 1 : i + 6] if "answer" not in c["tags"]]
        folded = [c for c in cells[i + 1 : i + 7] if c["source"].startswith("<details>")]
        assert after[0] == "code" and folded, cells[i]["source"]
    for cell in cells:
        if "answer" in cell["tags"] and cell["type"] == "markdown":
            assert cell["source"].startswith("<details><summary>")
            assert cell["source"].endswith("</details>")
        else:
            assert "<details>" not in cell["source"]
    assert asked and cells[-1]["source"].startswith("<details><summary>Answers")


@pytest.mark.parametrize("source", SOURCES, ids=name_of)
def test_nothing_depends_on_an_answer(source):
    """A name that an answer's check sets is not read elsewhere before it is set there again."""
    cells = [c for c in build.cells(source.read_text()) if c["type"] == "code"]
    for i, cell in enumerate(cells):
        if "answer" in cell["tags"]:
            mine = names(cell, ast.Store)
            earlier = set().union(*(names(c, ast.Store) for c in cells[:i]))
            later = [c for c in cells[i + 1 :] if "answer" not in c["tags"]]
            assert not (mine - earlier) & set().union(*(first_reads(c) for c in later))


def names(cell, kind):
    nodes = ast.walk(ast.parse(cell["source"]))
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, kind)}


def first_reads(cell):
    return names(cell, ast.Load) - names(cell, ast.Store)


def test_a_class_copy_has_no_outputs_and_no_answers_and_runs(tmp_path):
    pytest.importorskip("nbformat")
    pytest.importorskip("matplotlib").use("Agg")
    build.main(["--class", str(tmp_path / "class")])
    copies = sorted((tmp_path / "class").glob("*.ipynb"))
    assert [copy.stem for copy in copies] == [source.stem for source in SOURCES]
    for copy in copies:
        cells = json.loads(copy.read_text())["cells"]
        assert not any(c.get("outputs") or c.get("execution_count") for c in cells)
        assert "details>" not in copy.read_text() and '"answer"' not in copy.read_text()
    cells = json.loads(copies[0].read_text())["cells"]
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    (tmp_path / "handed_out.py").write_text(code)
    how = {"cwd": NOTEBOOKS / "data", "env": os.environ | {"MPLBACKEND": "Agg"}}
    subprocess.run(
        [sys.executable, tmp_path / "handed_out.py"], check=True, capture_output=True, **how
    )


@pytest.mark.parametrize("source", RUNS, ids=name_of)
def test_source_runs_as_a_script(source, request):
    """The notebooks assert what they claim. 05 trains, exports and talks to SmolLM2: some four minutes."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("IPython")
    if "SmolLM2" in source.read_text():
        request.getfixturevalue("smollm2")
    done = subprocess.run(
        [sys.executable, source.name],
        cwd=NOTEBOOKS,
        env=os.environ | {"MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_rebuild_says_the_same():
    """The cheapest notebook, executed anew; cells tagged "timing" may differ."""
    pytest.importorskip("nbclient")
    text, thumbnail = build.execute(SOURCES[0])
    pairs = list(zip(json.loads(text)["cells"], committed(SOURCES[0]), strict=True))
    assert thumbnail and all(a["id"] == b["id"] for a, b in pairs)
    for new, old in pairs:
        if new["cell_type"] == "code" and "timing" not in new["metadata"].get("tags", []):
            assert said(new) == said(old)


def test_the_teacher_of_01_may_stand_on_an_edge(capsys, monkeypatch):
    """Its second exercise: where the teacher rules a word out, reverse KL is infinite."""
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.syspath_prepend(NOTEBOOKS)
    names = {}
    for cell in build.cells(SOURCES[0].read_text()):
        if re.match("import math|words =|corners =|log_star =", cell["source"]):
            exec(cell["source"].replace("star = P.tolist()", "star = (0.7, 0.3, 0)"), names)
    said = capsys.readouterr().out
    assert names["star"] == (0.7, 0.3, 0)
    assert re.findall("infinite for (\\d+)", said) == ["0", str(len(names["fine"])), "0"]


@pytest.mark.slow
def test_01_runs_to_its_end_with_another_teacher(tmp_path):
    """Also one that rules a word out: P itself, in the first cells, is what readers change."""
    pytest.importorskip("matplotlib")
    source = SOURCES[0].read_text()
    changed = source.replace("P = torch.tensor([0.7, 0.2, 0.1]", "P = torch.tensor([0.7, 0.3, 0.0]")
    cells = [c for c in build.cells(changed) if c["type"] == "code" and "answer" not in c["tags"]]
    (tmp_path / "changed.py").write_text("\n".join(c["source"] for c in cells))
    how = {"cwd": NOTEBOOKS, "env": os.environ | {"MPLBACKEND": "Agg"}}
    subprocess.run(
        [sys.executable, tmp_path / "changed.py"], check=True, capture_output=True, **how
    )
    assert changed != source

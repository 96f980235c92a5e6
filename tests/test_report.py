"""The report of a folder: its table by hand, its figure, and what it does with incomplete or damaged folders."""

import json
import math
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "notebooks"))

import report


def result(kind="instructions", method="cosd", seed=0, score=0.5, setting=None, **more):
    config = {"context": kind, "method": method, "seed": seed, "lr": 1e-4, "steps": 10}
    made = {
        "setting": setting or f"{kind}-{method}",
        "config": config | more.pop("config", {}),
        "seconds": 8.0,
        "before": {"task": {"score": 0.25}, "kl": 1.0, "teacher": {"score": 0.75}},
        "after": {"task": {"score": score}, "kl": 0.125},
    }
    for part in ("before", "after"):
        made[part] |= more.pop(part, {})
    return made | more


def suites(verbs, styles=None, rules=None):
    given = {"verbs": verbs, "styles": styles, "rules": rules}
    return {name: {"exact": value} for name, value in given.items() if value is not None}


def save(out, results, unfinished=False):
    for i, one in enumerate(results):
        folder = out / f"run{i}-seed{i}{'.unfinished' * unfinished}"
        folder.mkdir(parents=True)
        torch.save({"result": one, "model": {}}, folder / "state.pt")
    return out


def cells(text):
    """The table as a list of {title: cell}."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(rows[0], row)) for row in rows[2:]]


def test_mean_and_deviation_over_seeds_by_hand():
    runs = [result(seed=0, score=0.4), result(seed=1, score=0.6), result(method="sft", score=0.3)]
    cosd, sft = cells(report.table(runs))
    assert cosd["after"] == "0.50 ± 0.14"  # √(2 · .1² / 1)
    assert cosd["before"] == "0.25 ± 0.00"
    assert sft["after"] == "0.30"
    assert list(cosd)[:3] == ["context", "method", "teacher"]


def test_columns_that_nobody_fills_are_left_out():
    (row,) = cells(report.table([result()]))
    filled = ["teacher", "before", "after", "KL before", "KL after", "seconds"]
    assert list(row) == ["context", "method", *filled]
    assert "*drift*" not in report.legend(report.table([result()]))
    rows = cells(report.table([result(), result(method="sft", after={"drift": 0.01234})]))
    assert [row["drift"] for row in rows] == ["", "0.0123"]


def test_what_differs_gets_a_column():
    runs = [result(method="sft", config={"lr": lr}, setting=f"{lr}") for lr in (1e-4, 2e-4)]
    rows = cells(report.table([result(config={"lr": 5e-4}), *runs]))
    assert [row["lr"] for row in rows] == ["0.0005", "0.0001", "0.0002"]
    assert "steps" not in rows[0] and "seed" not in rows[0]
    assert "lr" not in cells(report.table([result(config={"lr": 5e-4}), runs[0]]))[0]  # no pair


def test_old_skills_as_changes():
    changed = report.with_changes(
        result(before=suites(1.0, 0.5, 0.8), after=suites(0.9, 0.25, 0.75))
    )
    assert changed["prior"] == pytest.approx(-0.1)
    assert changed["steerability"] == pytest.approx(-0.15)  # (−.25 − .05) / 2
    alone = report.with_changes(result(before=suites(1.0), after=suites(0.5)))
    assert alone["prior"] == -0.5 and "steerability" not in alone
    assert report.with_changes(result()) == result()


def test_a_number_that_some_seeds_lack_is_averaged_over_the_others():
    assert report.spread([math.nan, 0.25, 0.75], 2) == "0.50 ± 0.35"
    assert report.spread([0.25, math.nan], 2) == "0.25"
    assert report.spread([math.nan, math.nan], 2) == ""


def test_kinds_in_their_order_and_an_unknown_one_at_the_end(tmp_path):
    kinds = ["feedback", "privileged", "demonstrations"]
    read = report.read_results(save(tmp_path, [result(kind) for kind in kinds]))
    assert [report.kind_of(one) for one in read] == ["demonstrations", "privileged", "feedback"]


def test_runs_that_are_not_complete_are_skipped(tmp_path):
    save(tmp_path, [None, result()])
    save(tmp_path, [result(score=0.9)], unfinished=True)
    (read,) = report.read_results(tmp_path)
    assert read["after"]["task"]["score"] == 0.5


def test_what_is_written(tmp_path, capsys):
    save(tmp_path, [result(), result(method="sft", seed=1)])
    assert report.main([str(tmp_path)]) == 0
    assert "| instructions | sft |" in capsys.readouterr().out
    assert "*KL after*: the same" in (tmp_path / "results.md").read_text()
    assert len(json.loads((tmp_path / "results.json").read_text())) == 2
    assert not list(tmp_path.glob("*.tmp"))
    pytest.importorskip("matplotlib")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("damage", [b"", b"no archive", None])
def test_a_damaged_state_is_named(tmp_path, capsys, damage):
    path = save(tmp_path, [result(), result(seed=1)]) / "run1-seed1" / "state.pt"
    path.write_bytes(path.read_bytes()[:-200] if damage is None else damage)
    assert report.main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert str(path) in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("made", [[], [None]])
def test_a_folder_without_runs(tmp_path, capsys, made):
    save(tmp_path, made)
    assert report.main([str(tmp_path)]) == 2
    assert "holds no complete run" in capsys.readouterr().err
    assert report.main([]) == 2


def panels(monkeypatch, results, path):
    """The titles of the panels drawn."""
    figure = pytest.importorskip("matplotlib.figure")
    titles, save = [], figure.Figure.savefig

    def keep(self, *args, **kwargs):
        titles.extend(axis.get_title() for axis in self.axes)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(figure.Figure, "savefig", keep)
    report.draw(results, path)
    return titles


def test_at_most_four_panels_and_forgetting_is_among_them(tmp_path, monkeypatch):
    before = {"task": {"score": 0.2, "exact": 0.1}} | suites(1.0, 0.5)
    after = {"task": {"score": 0.8, "exact": 0.7}, "drift": 0.1} | suites(0.5, 0.5)
    whole = report.with_changes(result(before=before, after=after))
    titles = panels(monkeypatch, [whole, result("feedback")], tmp_path / "figure.png")
    assert len(titles) == 4
    assert titles[2] == "Forgotten: skills known without context"


def test_the_figure_of_a_run_without_scores(tmp_path, monkeypatch):
    bare = result(before={"task": {}, "teacher": {}}, after={"task": {}})
    titles = panels(monkeypatch, [bare], tmp_path / "figure.png")
    assert titles == ["Left to learn: KL to the teacher"]


def test_nothing_to_draw_is_one_line(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    nothing = result(before={"task": {}}, after={"task": {}, "kl": math.nan})
    report.draw([nothing], tmp_path / "figure.png")
    report.draw([], tmp_path / "figure.png")
    assert capsys.readouterr().out.splitlines() == ["No figure: no run has a number to draw."] * 2
    assert not list(tmp_path.iterdir())


def test_a_figure_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")

    def half(self, path, **how):
        path.write_bytes(b"half")
        raise OSError("no space left")

    (tmp_path / "figure.png").write_bytes(b"old")
    monkeypatch.setattr(figure.Figure, "savefig", half)
    with pytest.raises(OSError):
        report.draw([result()], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes() == b"old"


def test_without_matplotlib_there_is_one_line_and_no_figure(tmp_path):
    save(tmp_path, [result()])
    hide = "import sys; sys.modules['matplotlib'] = None; sys.path.insert(0, 'notebooks'); "
    code = hide + f"import report; sys.exit(report.main([{str(tmp_path)!r}]))"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert said.stdout.count("No figure: matplotlib is not installed") == 1
    assert (tmp_path / "results.md").exists() and not (tmp_path / "figure.png").exists()

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
    assert changed["lost"] == pytest.approx(0.4 / 3)  # (.1 + .25 + .05) / 3
    assert alone["prior"] == -alone["lost"] == -0.5 and "steerability" not in alone
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


def drawn(monkeypatch, results, path):
    """The figure's axes, its legend, and what was saved."""
    figure = pytest.importorskip("matplotlib.figure")
    figures, save = [], figure.Figure.savefig

    def keep(self, *args, **kwargs):
        figures.append(self)
        return save(self, *args, **kwargs)

    monkeypatch.setattr(figure.Figure, "savefig", keep)
    report.draw(results, path)
    (one,) = figures
    legend = [text.get_text() for box in one.legends for text in box.get_texts()]
    return {axis.get_title().split(":")[0]: axis for axis in one.axes}, legend


def heights(axis):
    return [bar.get_height() for bar in axis.patches]


def numbers(axis):
    """What is printed over the bars."""
    return [text.get_text() for text in axis.texts]


def whole(method="cosd", verbs=0.5, **how):
    before = {"task": {"score": 0.2, "exact": 0.1}} | suites(1.0, 0.5)
    after = {"task": {"score": 0.8, "exact": 0.7}, "drift": 0.1} | suites(verbs, 0.5)
    return report.with_changes(result(method=method, before=before, after=after, **how))


def test_two_panels_learned_and_forgotten(tmp_path, monkeypatch):
    runs = [whole(), whole("sft", 0.0), result("feedback")]
    axes, legend = drawn(monkeypatch, runs, tmp_path / "figure.png")
    assert list(axes) == ["Learned", "Forgotten"]
    assert legend == ["before training", "SFT", "COSD", "teacher, sees the context"]
    assert heights(axes["Forgotten"]) == [0.5, 0.25]  # SFT, COSD; nobody measured feedback's
    assert numbers(axes["Forgotten"]) == [".50", ".25"]
    assert all(axis.get_ylabel() for axis in axes.values())


def test_zeros_are_seen_and_no_axis_is_empty(tmp_path, monkeypatch):
    runs = [whole(verbs=1.0, seed=seed) for seed in (0, 1)]
    axes, legend = drawn(monkeypatch, runs, tmp_path / "figure.png")
    assert numbers(axes["Forgotten"]) == ["0"]
    assert axes["Forgotten"].get_ylim() == pytest.approx((0, 0.115), abs=1e-6)
    assert "a seed" in legend
    points = axes["Forgotten"].collections[-1].get_offsets()
    assert points[:, 1].tolist() == [0.0, 0.0]


def test_a_base_that_gets_nothing_right_shows_its_kl_alone(tmp_path, monkeypatch):
    nothing = {"task": {"score": 0.0}, "teacher": {"score": 0.0}} | suites(0.0, 0.0)
    smoke = report.with_changes(result(before=nothing, after=nothing))
    axes, _ = drawn(monkeypatch, [smoke], tmp_path / "figure.png")
    assert list(axes) == ["Left to learn"]


def test_the_figure_compares_at_equal_rates_and_the_table_has_all(tmp_path, monkeypatch):
    rates = [("cosd", 2e-4), ("sft", 1e-4), ("sft", 2e-4)]
    runs = [whole(method, config={"lr": lr}, setting=f"{method}{lr}") for method, lr in rates]
    _, legend = drawn(monkeypatch, runs, tmp_path / "figure.png")
    assert legend[1:3] == ["SFT, lr 0.0002", "COSD, lr 0.0002"]
    assert len(cells(report.table(runs))) == 3
    apart = [runs[0], runs[1], whole("sft", config={"lr": 5e-5}, setting="gentle")]
    assert report.like_for_like(apart) == apart  # none at COSD's rate: all of them


def test_a_method_has_one_colour(tmp_path, monkeypatch):
    anchored = {"anchors": 0.5}
    assert report.style_of({"method": "sft"}) == ("#D55E00", "///")
    assert report.style_of({"method": "cosd", "anchors": 0.0}) == ("#0072B2", "")
    assert report.style_of({"method": "cosd"} | anchored) == ("#009E73", "...")
    runs = [whole(), whole(config=anchored, setting="anchored")]
    _, legend = drawn(monkeypatch, runs, tmp_path / "figure.png")
    assert legend[1:3] == ["COSD", "COSD + anchors 0.5"]


def test_the_figure_of_a_run_without_old_skills(tmp_path, monkeypatch):
    axes, _ = drawn(monkeypatch, [result()], tmp_path / "figure.png")
    assert list(axes) == ["Learned", "Left to learn"]


def test_the_figure_of_a_run_without_scores(tmp_path, monkeypatch):
    bare = result(before={"task": {}, "teacher": {}}, after={"task": {}})
    axes, legend = drawn(monkeypatch, [bare], tmp_path / "figure.png")
    assert list(axes) == ["Left to learn"] and legend == ["before training", "COSD"]
    assert heights(axes["Left to learn"]) == [1.0, 0.125]


def test_numbers_over_the_bars_are_short():
    said = [report.short(value) for value in (0, 1, 0.25, 0.996, -0.001, -0.03, 2.617)]
    assert said == ["0", "1", ".25", "1", "0", "-.03", "2.62"]


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

"""The experiments: their arithmetic against independent answers, and the whole suite in small, twice (the second time nothing is left to do)."""

import argparse
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "notebooks"))

import evidence
import evidence_page as page
from conftest import tiny_gpt

import contexts
from contexts import VERBS, task_draw
from cosd import forward_kl, reverse_kl


def test_lost_is_a_mean_over_suites():
    assert evidence.lost(
        {"verbs": 1.0, "other": 0.8}, {"verbs": 0.5, "other": 0.9}
    ) == pytest.approx((0.5 - 0.1) / 2)


def test_worse_contexts_are_as_wrong_as_they_say():
    rng = random.Random(0)
    example = task_draw("demonstrations", rng)
    for marks in ("++", "+", "+-", "--"):
        shown = re.findall(
            r"(\w+) zorp: verily (\w+) methinks",
            evidence.worse_context(example, f"demonstrations {marks}", rng).context,
        )
        assert [y == VERBS["reverse"](x) for x, y in shown] == [mark == "+" for mark in marks]
    keys = [
        (e, evidence.worse_context(e, f"key {amount}", rng))
        for amount in (0.0, 0.5, 1.0)
        for e in [task_draw("privileged", rng) for _ in range(200)]
    ]
    right = [worse.context == e.context for e, worse in keys]
    assert all(right[:200]) and not any(right[400:]) and 20 < sum(right[200:400]) < 80
    assert all(worse.prompt == e.prompt and worse.answer == e.answer for e, worse in keys)
    assert (
        evidence.worse_context(task_draw("specification", rng), "specification weapon", rng).context
        == "never weapon"
    )


def test_two_demonstrations_that_disagree():
    for i in range(50):
        example = evidence.undecided(random.Random(i))
        shown = re.findall(r"(\w+) zorp: (\w+)", example.context)
        assert sorted(
            next(v for v in ("reverse", "rotate") if VERBS[v](x) == y) for x, y in shown
        ) == ["reverse", "rotate"]
        word = example.prompt.split()[0]
        assert (example.answer, example.expert) == (VERBS["reverse"](word), VERBS["rotate"](word))


def test_rehearsal_asks_for_earlier_verbs_without_context():
    earlier = [
        lambda rng, heldout, verb=verb: (
            task_draw("demonstrations", rng)
            if verb == "zorp"
            else contexts.demonstrations(rng, verb=verb)
        )
        for verb in ("zorp", "blick")
    ]
    other = task_draw("specification", random.Random(0))
    drawn = [evidence.rehearse(random.Random(i), earlier, lambda rng: other) for i in range(400)]
    asked = [e for e in drawn if e is not other]
    assert 150 < len(asked) < 250 and all(e.context is None for e in asked)
    assert {e.prompt.split()[1] for e in asked} == {"zorp", "blick"}
    assert (
        evidence.rehearse(random.Random(0), [], lambda rng: other) is other
    )  # nothing to rehearse at the first stage


def test_the_straight_line_goes_from_base_to_tuned():
    base, tuned = tiny_gpt(0), tiny_gpt(1)
    for alpha, expected in [(0.0, base), (1.0, tuned)]:
        for a, b in zip(evidence.blend(base, tuned, alpha).parameters(), expected.parameters()):
            torch.testing.assert_close(a, b)
    middle = evidence.blend(base, tuned, 0.25).embed.weight
    torch.testing.assert_close(middle, 0.75 * base.embed.weight + 0.25 * tuned.embed.weight)


def test_what_each_imitation_minimises():
    """Q = (.5, .3, .2) and the token of .2: −log .2 = 1.6094, times .2 = .3219, whose weight carries no gradient: Q(y) (Q − one-hot)."""
    logits = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64).log().requires_grad_()
    teacher, token = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log(), torch.tensor([2])
    loss = evidence.weighted_cross_entropy(logits, None, token)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(loss, torch.tensor([0.32188758], dtype=torch.float64))
    torch.testing.assert_close(
        gradient, 0.2 * torch.tensor([[0.5, 0.3, -0.8]], dtype=torch.float64)
    )
    both = evidence.near_the_base(evidence.weighted_cross_entropy, 0.5)(logits, teacher, token)
    torch.testing.assert_close(both, loss + 0.5 * forward_kl(logits, teacher))


def test_importing_it_leaves_the_threads_alone():
    code = "import os, sys; before = os.environ.get('OMP_NUM_THREADS'); import evidence; sys.exit(os.environ.get('OMP_NUM_THREADS') != before)"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT / "notebooks", env=environment
        ).returncode
        == 0
    )


SMALL = dict(context="demonstrations", seed=0, do="forgetting", name="x")


def small_options(folder) -> argparse.Namespace:
    for name in ("runs", "work"):
        (folder / name).mkdir(exist_ok=True)
    return argparse.Namespace(smoke=True, bases=folder, out=folder, seeds=None)


def a_run(scores, lost, before=0.2, teacher=1.0) -> dict:
    curve = []
    for i, (score, gone) in enumerate(zip(scores, lost)):
        step = 25 * (i + 1)
        curve.append({"step": step, "score": score, "lost": gone, "seconds": step / 10})
    return {"before": before, "teacher": teacher, "curve": curve} | curve[-1]


# ----------------------------------------------------------------------------------- numbers over seeds
def test_interval_by_hand():
    mean, half = page.interval([1.0, 2.0, 3.0])  # t(2) = 4.30, s = 1, √3
    assert mean == 2 and half == pytest.approx(4.30 / math.sqrt(3))
    assert page.show([0.5, 0.5, 0.5]) == "0.50 ± 0.00"
    assert page.show([0.5]) == "0.50" and page.show([]) == "–"


def test_a_difference_is_bold_where_its_interval_leaves_out_zero():
    assert page.signed([0.1, 0.2, 0.3], 1) == "+0.2 ± 0.2"  # 4.30 · .1 / √3 = .248
    assert page.signed([0.19, 0.2, 0.21], 2) == "**+0.20 ± 0.02**"
    assert page.signed([-0.5], 1) == "-0.5" and page.signed([]) == "–"


def test_pairs_are_pairs_of_a_seed():
    """Seeds that differ much and by the same: the difference is sure, where two means would not be."""
    these = {0: {"x": 1.0}, 1: {"x": 5.0}, 3: {"x": 9.0}, 4: {"x": math.nan}}
    those = {3: {"x": 8.5}, 1: {"x": 4.5}, 2: {"x": 0.0}, 4: {"x": 1.0}}
    assert page.paired(these, those, lambda n: n["x"]) == [0.5, 0.5]


def test_reading_at_a_score():
    """Score .2, then .6, then 1.0; lost 0, .1, .5: .8 is reached halfway between steps 25 and 50."""
    run = a_run([0.6, 1.0], [0.1, 0.5])
    assert page.at_score(run, 0.8, "lost") == pytest.approx(0.3)
    assert page.at_score(run, 0.8, "step") == pytest.approx(37.5)
    assert page.at_score(run, 0.4, "lost") == pytest.approx(
        0.05
    )  # from the base, which lost nothing
    assert math.isnan(page.at_score(a_run([0.6, 0.7], [0, 0]), 0.8, "lost"))


def test_equal_score_is_the_highest_that_both_reach():
    fast, slow = {0: a_run([1.0, 1.0], [0.4, 0.6])}, {0: a_run([0.4, 0.6], [0.0, 0.2])}
    # at .6: fast has lost .4 · (.6 − .2) / .8 = .2, slow .2
    assert page.equal_score(fast, slow) == [pytest.approx(0.0)]
    assert page.equal_score(slow, fast) == [pytest.approx(0.0)]


def test_counted_says_how_many_seeds_got_there():
    runs = {0: a_run([1.0], [0.2]), 1: a_run([0.5], [0.1])}
    assert page.counted(runs, "lost", 3) == "0.175 (1 of 2)"  # .2 · .7 / .8
    assert page.counted({1: runs[1]}, "lost", 3) == "never"


def test_equal_seconds_are_read_by_straight_lines():
    assert page.at_seconds(a_run([0.6, 1.0], [0.1, 0.5]), 3.75) == (
        pytest.approx(0.8),
        pytest.approx(0.3),
    )


def test_a_barrier_is_what_rises_above_the_straight_line():
    line = [{"alpha": a, "new": v} for a, v in ((0.0, 1.0), (0.5, 2.5), (1.0, 3.0))]
    assert page.barrier(line, "new") == pytest.approx(0.5)
    assert page.barrier([line[0], {"alpha": 0.5, "new": 1.0}, line[2]], "new") == 0


def test_r_squared():
    x = torch.linspace(0, 2, 30).numpy()
    assert page.r_squared(x, 3 * x + 1, 1) == pytest.approx(1)
    assert page.r_squared(x, x**2, 2) == pytest.approx(1) and page.r_squared(x, x**2, 1) < 0.97
    assert math.isnan(page.r_squared(x, 0 * x, 1))


def test_forward_kl_matches_moments_and_reverse_kl_takes_a_mode():
    """A Gaussian closest in forward KL has the teacher's mean and variance; in reverse KL it sits on one of two far modes."""
    x = torch.linspace(-8, 8, 321, dtype=torch.float64)
    p = 1.2 * torch.exp(-(((x + 2) / 0.5) ** 2) / 2) + 0.8 * torch.exp(-(((x - 2) / 0.5) ** 2) / 2)
    p = p / p.sum()
    mean = (p * x).sum()
    deviation = (p * (x - mean) ** 2).sum().sqrt().item()
    mu, sigma, _ = page.fit_gaussian(forward_kl, x, p.log(), 0.5)
    assert mu == pytest.approx(mean.item(), abs=0.01) and sigma == pytest.approx(
        deviation, abs=0.01
    )
    mu, sigma, value = page.fit_gaussian(reverse_kl, x, p.log(), -2.0)
    assert mu == pytest.approx(-2, abs=0.05) and sigma == pytest.approx(0.5, abs=0.05)
    assert value == pytest.approx(-math.log(0.6), abs=0.02)


def test_a_factored_student_under_forward_kl_has_the_marginals():
    p = torch.full((4, 4), 0.01, dtype=torch.float64)
    p[0, 0], p[1, 1], p[2, 3] = 0.4, 0.3, 0.17
    q = page.fit_factors(forward_kl, p.log().flatten(), 0)
    torch.testing.assert_close(q, p.sum(1)[:, None] * p.sum(0), atol=1e-3, rtol=0)


# --------------------------------------------------------------------------------------- what jobs do
def test_a_mistake_is_wrong_and_what_follows_from_it_too():
    for i in range(200):
        rng = random.Random(i)
        e = task_draw("privileged", rng)
        beginning, end = evidence.mistaken(e, rng)
        word, first = beginning.split()[0], e.answer.split()[0]
        assert beginning.endswith(" ") and word != first
        if word == "xxx":  # every order of the letters ends right: aaa
            continue
        assert sorted(word) == sorted(first)
        for verb in e.prompt.split()[2:]:
            word = VERBS[verb](word)
        assert word == end != e.answer.split()[-1]
        a = task_draw("demonstrations", rng)
        letter, _ = evidence.mistaken(a, rng)
        assert len(letter) == 1 and letter != a.answer[0]


def test_exposure_scores_the_students_states_and_the_teachers(tmp_path, monkeypatch):
    """At step 0 of a student that is the base: KL on its own samples by hand, from full logits; the
    mistake's own tokens do not count."""
    options, seen = small_options(tmp_path), []
    job = SMALL | dict(context="privileged", do="exposure", settings=dict(method="cosd", lr=1e-3))
    loss = evidence.cosd_loss

    def spy(student, rows, chunk=0):
        seen.append((rows, loss(student, rows, chunk)[0].item(), torch.is_grad_enabled()))
        return loss(student, rows, chunk)

    monkeypatch.setattr(evidence, "cosd_loss", spy)
    numbers = evidence.exposure(job, options)
    own, given, mistake = seen[:3]
    first = numbers["curve"][0]
    assert [first["own"], first["teacher's"], first["mistake"]] == [own[1], given[1], mistake[1]]
    base, task = evidence.world(evidence.config(job, options), options)
    for rows, value, grad in seen[:3]:
        assert not grad and rows.scorer_prompts != rows.prompts
        total, count = 0.0, 0
        for i, (x, theirs) in enumerate(zip(rows.prompts, rows.scorer_prompts)):
            y = rows.ids[i][rows.mask[i]].tolist()
            with torch.no_grad():
                q = base(torch.tensor([x + y]))[0, len(x) - 1 : -1].log_softmax(-1)
                p = base(torch.tensor([theirs + y]))[0, len(theirs) - 1 : -1].log_softmax(-1)
            kl, kept = (p.exp() * (p - q)).sum(-1), rows.weights[i][rows.mask[i]] > 0
            total, count = total + kl[kept].sum().item(), count + kept.sum().item()
        assert value == pytest.approx(total / count, rel=1e-4)
    skipped = (mistake[0].mask & (mistake[0].weights == 0)).sum(1)
    assert set(skipped.tolist()) == {4}  # three letters and a space
    assert [point["step"] for point in numbers["curve"]] == [0, 1, 2, 3, 4]


def test_movement_of_one_matrix_by_hand():
    """Only one matrix moves, along one direction: stable rank 1 there; all others do not move at all."""
    base, tuned = tiny_gpt(0), tiny_gpt(0)
    matrices = [p for n, p in tuned.named_parameters() if p.ndim == 2 and "blocks" in n]
    total = sum(p.square().sum().item() for p in matrices)
    with torch.no_grad():
        for p in matrices:
            p += torch.outer(torch.ones(p.shape[0]), torch.ones(p.shape[1])) * 0.01
    change = sum(0.01**2 * p.numel() for p in matrices)
    found = evidence.movement(base, tuned)
    assert found["moved"] == pytest.approx(math.sqrt(change / total), rel=1e-4)
    assert found["rank"] == pytest.approx(1, abs=1e-3)


def test_recovery_listens_to_the_original(tmp_path, monkeypatch):
    """The teacher of the second part is the base, not the model that forgot; its prompts never ask for the new verb without context."""
    options = small_options(tmp_path)
    (job,), seen, loss = evidence.jobs_of("recovery", 0), [], evidence.cosd_loss
    base = evidence.world(evidence.config(job, options), options)[0]

    def spy(student, rows, chunk=0):
        pairs = zip(rows.scorer.model.parameters(), base.parameters())
        is_base = all(torch.equal(mine, original) for mine, original in pairs)
        seen.append((is_base, rows.scorer.model is student, rows))
        return loss(student, rows, chunk)

    monkeypatch.setattr(evidence, "cosd_loss", spy)
    numbers = evidence.recovery(job, options)
    assert len(seen) == 4 and all(is_base and not is_student for is_base, is_student, _ in seen)
    assert all(rows.prompts == rows.scorer_prompts and len(rows.prompts) == 8 for *_, rows in seen)
    assert all(rows.weights.sum() == pytest.approx(1) for *_, rows in seen)
    assert [row["step"] for row in numbers["curve"]] == [0, 1, 2, 3, 4]


def test_replay_is_cross_entropy_on_the_corpus_own_answers(tmp_path):
    options = small_options(tmp_path)
    for replay, corpus in (("real", contexts.draw_pretraining), ("proxy", evidence.draw_proxy)):
        settings = {"method": "sft", "anchors": 0.5, "replay": replay}
        cfg = evidence.config(SMALL | {"settings": settings}, options)
        base, task = evidence.world(cfg, options)
        run = evidence.start(cfg, task, base)
        anchors = evidence.parts(run, 3, settings)["anchors"]
        rng = contexts.seeded(0, "demonstrations", "anchors", 3)
        drawn = [contexts.draw_anchor(rng, "demonstrations", corpus) for _ in range(4)]
        said = [contexts.decode(row[m].tolist()) for row, m in zip(anchors.ids, anchors.mask)]
        assert said == [f"{e.answer}<|end|>" for e in drawn] and anchors.scorer is None
        assert anchors.weights.sum().item() == pytest.approx(0.5)
    assert all(e.answer == e.expert for e in drawn)  # people: with their manners


def test_the_base_holds_sft_back(tmp_path):
    """λ KL(base‖student) on SFT's own tokens: nothing at the first step, and a large λ lets nothing move."""
    options, moved = small_options(tmp_path), []
    for base_kl in (1e-9, 100.0):
        settings = {"method": "sft", "base_kl": base_kl, "lr": 3e-3}
        job = SMALL | {"context": "instructions", "settings": settings, "name": f"x{base_kl}"}
        moved.append(evidence.learn(job, options)[0]["drift_new"])
    assert moved[1] < moved[0]


# ----------------------------------------------------------------------------------------- records
def test_a_record_counts_only_for_its_job_its_scale_and_its_code(tmp_path, monkeypatch):
    options, job = small_options(tmp_path), SMALL | {"settings": {"method": "sft", "lr": 1e-3}}
    evidence.do(job, options)
    saved = evidence.done(job, options)
    assert saved["numbers"]["curve"] and saved["code"] == evidence.code("forgetting")
    assert not evidence.done(job | {"settings": {"method": "sft", "lr": 2e-3}}, options)
    monkeypatch.setattr(options, "smoke", False)  # in small never passes for the real thing
    assert not evidence.done(job, options)
    monkeypatch.setattr(options, "smoke", True)
    monkeypatch.setattr(evidence, "code", lambda function: "other")
    assert not evidence.done(job, options)


@pytest.mark.parametrize(
    "old, new, same",
    [
        ('"""One run -> (its numbers', '"""Of one run: (its numbers', True),  # a docstring
        ("run.step = step + 1", "run.step = step + 1  # done", True),  # a comment
        ("cfg.steps // 5", "cfg.steps // 6", True),  # another experiment's function
        ("min(1.0, warm)", "min(2.0, warm)", False),  # what it calls
        ("POINTS = 4", "POINTS = 5", False),  # a constant that what it calls reads
        ("statistics.fmean(before[name]", "sum(before[name]", False),
    ],
)
def test_the_digest_is_of_the_code_that_a_job_reaches(tmp_path, monkeypatch, old, new, same):
    text = Path(evidence.__file__).read_text()
    evidence.code.cache_clear()
    before = evidence.code("forgetting")
    (tmp_path / "evidence.py").write_text(text.replace(old, new))
    monkeypatch.setattr(evidence, "__file__", str(tmp_path / "evidence.py"))
    assert text != text.replace(old, new)
    evidence.code.cache_clear()
    assert (evidence.code("forgetting") == before) is same
    monkeypatch.undo()
    evidence.code.cache_clear()


@pytest.mark.parametrize(
    "file, old, new, same",
    [
        ("cosd.py", "a = log_a.exp()", "a = log_b.exp()", False),
        ("train.py", "saved in {run.folder}", "kept in {run.folder}", True),  # an error's words
        ("train.py", "optimizer steps [250", "steps of the optimizer [250", True),  # of --help
        ("train.py", "warmup: int = 10", "warmup: int = 11", False),
    ],
)
def test_the_digest_is_of_the_four_files_too(tmp_path, monkeypatch, file, old, new, same):
    evidence.code.cache_clear()
    before = evidence.code("forgetting")
    for path in ROOT.glob("*.py"):
        (tmp_path / path.name).write_text(path.read_text())
    text = (ROOT / file).read_text()
    (tmp_path / file).write_text(text.replace(old, new))
    assert text != text.replace(old, new)
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    evidence.code.cache_clear()
    assert (evidence.code("forgetting") == before) is same
    monkeypatch.undo()
    evidence.code.cache_clear()


def test_jobs_of_one_name_are_one_job():
    """Experiments share runs: what has the same name must be the same job, to the letter."""
    jobs = {}
    for experiment in evidence.EXPERIMENTS:
        for seed in (0, 1):
            for job in evidence.jobs_of(experiment, seed):
                assert jobs.setdefault(evidence.slug(job), job) == job
    assert len(jobs) > 250 and set(page.PAGES) == set(evidence.EXPERIMENTS)


RESULTS = ROOT / "notebooks" / "results" / "evidence"


def test_committed_records_are_of_this_code():
    """Nothing stale passes: whoever changes what an experiment computes makes it again."""
    records = [json.loads(line) for line in (RESULTS / "runs.jsonl").read_text().splitlines()]
    stale = {r["job"]["do"] for r in records if r["code"] != evidence.code(r["job"]["do"])}
    assert not stale
    there = {evidence.slug(r["job"]) for r in records}
    options = argparse.Namespace(smoke=False, seeds=None)
    for experiment in evidence.EXPERIMENTS:
        assert {evidence.slug(job) for job in evidence.all_jobs(experiment, options)} <= there


@pytest.mark.parametrize("name", [name for name in page.PAGES if name != "modes"])
def test_committed_pages_are_made_of_the_committed_records(name):
    """`modes` fits toys for half a minute: the slow tests make it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [json.loads(line) for line in (RESULTS / "runs.jsonl").read_text().splitlines()]
    text, figure = page.page(records, name, plt)
    plt.close(figure)
    assert (RESULTS / f"{name}.md").read_text() == text


# ----------------------------------------------------------------------------------- the command
COMMAND = [sys.executable, ROOT / "notebooks/evidence.py"]


@pytest.mark.slow
def test_whole_suite_in_small(tmp_path):
    """Every function, twice: the second call finds everything done; one damaged run is made again, the same."""
    command = [*COMMAND, "--smoke", "--jobs", "2", "--out", tmp_path]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-2000:]
    for name in page.PAGES:
        text = (tmp_path / f"{name}.md").read_text()
        assert text.startswith("# ") and text.count("\n|") > 1
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    runs = {p: p.stat().st_mtime for p in (tmp_path / "runs").glob("*.json")}
    assert len(runs) == len((tmp_path / "runs.jsonl").read_text().splitlines()) > 15

    victim = next(path for path in runs if path.name.startswith("recovery"))
    numbers = json.loads(victim.read_text())["numbers"]
    victim.write_text(victim.read_text().replace('"code": "', '"code": "x'))
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr[-2000:]
    assert json.loads(victim.read_text())["numbers"] == numbers  # the same seed, the same numbers
    assert all(p == victim or p.stat().st_mtime == then for p, then in runs.items())


@pytest.mark.slow
def test_kill_takes_the_workers_along_and_keeps_what_is_done(tmp_path):
    command = [*COMMAND, "--smoke", "--jobs", "1", "--out", tmp_path]
    how = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    running = subprocess.Popen(command, **how)
    runs, deadline = tmp_path / "runs", time.time() + 120
    while len(list(runs.glob("*.json"))) < 2 and running.poll() is None and time.time() < deadline:
        time.sleep(0.1)
    running.terminate()
    said = running.communicate(timeout=30)[1]
    assert "the same command goes on" in said and running.returncode == 130
    kept = set(runs.glob("*.json"))
    time.sleep(2)  # a worker left behind would go on
    assert 1 < len(kept) < 15 and set(runs.glob("*.json")) == kept
    assert all(json.loads(path.read_text())["numbers"] for path in kept)


@pytest.mark.slow
def test_a_run_that_fails_is_named_in_one_line(tmp_path):
    (tmp_path / "bases").write_text("no folder")
    command = [*COMMAND, "modes", "--smoke", "--out", tmp_path, "--bases", tmp_path / "bases"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 1 and "its log is" in ran.stderr
    assert re.search(r"\nevidence.py: base-[\w-]+: \w+Error:", ran.stderr)


@pytest.mark.parametrize(
    "argument, said",
    [
        ("forgeting", "unknown: forgeting; choose from onoff"),
        ("--jobs=0", "--seeds and --jobs must be at least 1"),
    ],
)
def test_bad_arguments(argument, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        evidence.main([argument])
    assert stopped.value.code == 2 and said in capsys.readouterr().err

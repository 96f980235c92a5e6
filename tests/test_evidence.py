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
from conftest import tiny_checkpoint, tiny_gpt

import contexts
from contexts import VERBS, task_draw
from cosd import forward_kl, reverse_kl


def test_interval_by_hand():
    mean, half = evidence.interval([1.0, 2.0, 3.0])  # t(2) = 4.30, s = 1, √3
    assert mean == 2 and half == pytest.approx(4.30 / math.sqrt(3))
    assert evidence.interval([5.0]) == (5.0, 0.0)
    assert evidence.show([0.5, 0.5, 0.5]) == "0.50 ± 0.00" and evidence.show([0.5]) == "0.50"


def test_lost_is_a_mean_over_suites():
    assert evidence.lost(
        {"verbs": 1.0, "other": 0.8}, {"verbs": 0.5, "other": 0.9}
    ) == pytest.approx((0.5 - 0.1) / 2)


def test_r_squared():
    x = torch.linspace(0, 2, 30).numpy()
    assert evidence.r_squared(x, 3 * x + 1, 1) == pytest.approx(1) and evidence.r_squared(
        x, x**2, 2
    ) == pytest.approx(1)
    assert evidence.r_squared(x, x**2, 1) < 0.97 and math.isnan(evidence.r_squared(x, 0 * x, 1))


def test_forward_kl_matches_moments_and_reverse_kl_takes_a_mode():
    """A Gaussian closest in forward KL has the teacher's mean and variance; in reverse KL it sits on one of two far modes."""
    x = torch.linspace(-8, 8, 321, dtype=torch.float64)
    p = (
        0.6 * torch.exp(-(((x + 2) / 0.5) ** 2) / 2) / 0.5
        + 0.4 * torch.exp(-(((x - 2) / 0.5) ** 2) / 2) / 0.5
    )
    p = p / p.sum()
    mean = (p * x).sum()
    mu, sigma, _ = evidence.fit_gaussian(forward_kl, x, p.log(), 0.5)
    assert mu == pytest.approx(mean.item(), abs=0.01) and sigma == pytest.approx(
        (p * (x - mean) ** 2).sum().sqrt().item(), abs=0.01
    )
    mu, sigma, value = evidence.fit_gaussian(reverse_kl, x, p.log(), -2.0)
    assert (
        mu == pytest.approx(-2, abs=0.05)
        and sigma == pytest.approx(0.5, abs=0.05)
        and value == pytest.approx(-math.log(0.6), abs=0.02)
    )


def test_a_factored_student_under_forward_kl_has_the_marginals():
    p = torch.full((4, 4), 0.01, dtype=torch.float64)
    p[0, 0], p[1, 1], p[2, 3] = 0.4, 0.3, 0.17
    q = evidence.fit_factors(forward_kl, p.log().flatten(), 0)
    torch.testing.assert_close(q, p.sum(1)[:, None] * p.sum(0), atol=1e-3, rtol=0)


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


def test_the_point_that_stands_for_a_method():
    """Points are ((score, ±), (lost, ±)): enough score first, then the least lost; without enough score the best score."""
    low, good, gentle = ((0.3, 0.0), (0.0, 0.0)), ((1.0, 0.1), (0.2, 0.0)), ((0.9, 0.0), (0.1, 0.3))
    assert evidence.gentlest([low, good, gentle], 0.9) == (gentle, True)
    assert evidence.gentlest([low, good], 0.9) == (good, True) and evidence.gentlest(
        [good, low], 1.1
    ) == (good, False)


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


def test_recovery_listens_to_the_original(tmp_path, monkeypatch):
    """The teacher of the second part is the base, not the model that forgot; its prompts never ask for the new verb without context."""
    options = argparse.Namespace(smoke=True, bases=tmp_path, out=tmp_path)
    (job,), seen, loss = evidence.jobs_of("recovery", 0, smoke=True), [], evidence.cosd_loss
    base = evidence.world(evidence.config(job, options), options)[0]

    def spy(student, rows, chunk=0):
        pairs = zip(rows.scorer.model.parameters(), base.parameters())
        is_base = all(torch.equal(mine, original) for mine, original in pairs)
        seen.append((is_base, rows.scorer.model is student, rows))
        return loss(student, rows, chunk)

    monkeypatch.setattr(evidence, "cosd_loss", spy)
    numbers = evidence.recovery(job, options)
    assert len(seen) == 2 and all(is_base and not is_student for is_base, is_student, _ in seen)
    assert all(rows.prompts == rows.scorer_prompts and len(rows.prompts) == 8 for *_, rows in seen)
    assert all(rows.weights.sum() == pytest.approx(1) for *_, rows in seen)
    assert [row["step"] for row in numbers["curve"]] == [0, 1, 2]


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


def test_replay_is_cross_entropy_on_the_corpus_own_answers(tmp_path):
    options = argparse.Namespace(smoke=True, bases=tmp_path, out=tmp_path)
    job = {"experiment": "x", "name": "x", "context": "demonstrations", "seed": 0, "scale": {}}
    for replay, corpus in (("real", contexts.draw_pretraining), ("proxy", evidence.draw_proxy)):
        settings = {"method": "sft", "anchors": 0.5, "replay": replay}
        cfg = evidence.config(job | {"settings": settings}, options)
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
    options = argparse.Namespace(smoke=True, bases=tmp_path, out=tmp_path)
    job = {"experiment": "x", "name": "x", "context": "instructions", "seed": 0, "scale": {}}
    moved = []
    for base_kl in (1e-9, 100.0):
        settings = {"method": "sft", "base_kl": base_kl, "lr": 3e-3}
        numbers, _ = evidence.learn(
            job | {"settings": settings, "name": f"x{base_kl}"}, options, steps=8
        )
        moved.append(numbers["drift_new"])
    assert moved[1] < moved[0]


def test_a_run_at_another_scale_does_not_count_as_done(tmp_path):
    """--smoke into the same folder must never pass for the real thing, nor fp32 for bf16."""
    (tmp_path / "runs").mkdir()
    options = argparse.Namespace(out=tmp_path)
    for one, other in [
        (evidence.jobs_of("modes", 0, smoke=True)[0], evidence.jobs_of("modes", 0)[0]),
        (evidence.jobs_of("real", 0)[0], evidence.jobs_of("real", 0, bf16=True)[0]),
    ]:
        assert evidence.slug(one) == evidence.slug(other)
        evidence.record(one, options).write_text(
            json.dumps({"job": one, "code": evidence.code(), "numbers": {}})
        )
        assert evidence.done(one, options) and not evidence.done(other, options)
        record = evidence.record(one, options)
        record.write_text(json.dumps({"job": one, "code": "other", "numbers": {}}))
        assert not evidence.done(one, options)  # made by other code


def test_importing_it_leaves_the_threads_alone():
    code = "import os, sys; before = os.environ.get('OMP_NUM_THREADS'); import evidence; sys.exit(os.environ.get('OMP_NUM_THREADS') != before)"
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT / "notebooks", env=environment
        ).returncode
        == 0
    )


def test_every_method_of_the_comparison_is_one_of_the_loop_and_named_once():
    jobs = [
        job
        for name in evidence.FUNCTIONS
        for seed in (0, 1)
        for job in evidence.jobs_of(name, seed)
    ]
    assert len({evidence.slug(job) for job in jobs}) == len(jobs)
    assert {m for m, _ in [(job["settings"].get("method"), 0) for job in jobs]} == {
        "sft",
        "offline",
        "gkd",
        "cosd",
        None,
    }
    assert set(evidence.METHODS) == set(evidence.MARKERS)


@pytest.mark.slow
def test_whole_suite_in_small(tmp_path):
    """Two seeds, all experiments but the real model; the second call finds everything done; one damaged run is made again, the same."""
    command = [
        sys.executable,
        ROOT / "notebooks/evidence.py",
        "--smoke",
        "--seeds",
        "2",
        "--jobs",
        "2",
        "--out",
        tmp_path,
        "--model",
        tmp_path / "none",
    ]
    first = subprocess.run(command, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr[-2000:]
    assert "real is left out" in first.stdout
    for name, (source, *_) in evidence.EXPERIMENTS.items():
        if name != "real":
            page = (tmp_path / f"{name}.md").read_text()
            assert (
                page.startswith("# ")
                and page.count("\n|") > 3
                and "2 seeds" in page
                and (tmp_path / f"{name}.png").stat().st_size > 5000
            )
            assert json.loads((tmp_path / f"{source}.json").read_text())
    index = json.loads((tmp_path / "index.json").read_text())
    assert len(index) == len(list((tmp_path / "runs").glob("*.json"))) and all(
        row["commit"] and "settings" in row for row in index
    )
    table = (tmp_path / "forgetting.md").read_text()
    assert all(f"| A | {method} |" in table for method in evidence.METHODS)

    victim = (
        tmp_path / "runs" / "recovery-demonstrations-SFT-then-the-original-as-teacher-seed1.json"
    )
    numbers, others = (
        json.loads(victim.read_text())["numbers"],
        {p: p.stat().st_mtime for p in (tmp_path / "runs").glob("*.json") if p != victim},
    )
    victim.unlink()
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr[-2000:]
    assert json.loads(victim.read_text())["numbers"] == numbers  # the same seed, the same numbers
    assert {p: p.stat().st_mtime for p in others} == others


def test_the_real_models_experiment_in_small(tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "model", max_len=2048)
    command = [
        sys.executable,
        ROOT / "notebooks/evidence.py",
        "real",
        "--smoke",
        "--seeds",
        "1",
        "--jobs",
        "2",
        "--out",
        tmp_path,
        "--model",
        checkpoint,
    ]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    page = (tmp_path / "real.md").read_text()
    assert all(
        f"| {task}, {method} |" in page
        for task in ("pirate", "plurals")
        for method in ("COSD", "SFT")
    )


def test_alien_demonstrations_are_right_and_alien():
    sys.path.insert(0, str(evidence.DATA))
    import pirate

    rows = lambda name: [
        json.loads(line) for line in (evidence.DATA / name).read_text().splitlines()
    ]
    assert [r["prompt"] for r in rows("pirate-alien.jsonl")] == [
        r["prompt"] for r in rows("questions.jsonl")
    ]
    assert all(pirate.score(r["demonstration"], r) for r in rows("pirate-alien.jsonl"))
    for alien, plain in zip(rows("plurals-alien.jsonl"), rows("plurals.jsonl"), strict=True):
        assert (
            alien["prompt"] == plain["prompt"]
            and alien["answer"] == plain["answer"]
            and plain["answer"] in alien["demonstration"] != plain["answer"]
        )


@pytest.mark.slow
def test_kill_takes_the_workers_along_and_keeps_what_is_done(tmp_path):
    command = [
        sys.executable,
        ROOT / "notebooks/evidence.py",
        "modes",
        "--smoke",
        "--seeds",
        "3",
        "--jobs",
        "1",
        "--out",
        tmp_path,
        "--model",
        tmp_path / "none",
    ]
    running = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    runs, deadline = tmp_path / "runs", time.time() + 120
    while not list(runs.glob("modes*")) and running.poll() is None and time.time() < deadline:
        time.sleep(0.1)
    running.terminate()
    assert (
        "the same command goes on" in running.communicate(timeout=30)[1]
        and running.returncode == 130
    )
    kept = set(runs.glob("*.json"))
    time.sleep(2)  # a worker left behind would go on
    assert (
        3 < len(kept) < 15
        and set(runs.glob("*.json")) == kept
        and all(json.loads(path.read_text())["numbers"] for path in kept)
    )


def test_unknown_experiment():
    ran = subprocess.run(
        [sys.executable, ROOT / "notebooks/evidence.py", "forgeting"],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2 and "unknown: forgeting; choose from forgetting, razor" in ran.stderr
    ran = subprocess.run(
        [sys.executable, ROOT / "notebooks/evidence.py", "--jobs", "0"],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2 and "--seeds and --jobs must be at least 1" in ran.stderr


def test_a_run_that_fails_is_named_in_one_line(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    command = [
        sys.executable,
        ROOT / "notebooks/evidence.py",
        "real",
        "--smoke",
        "--seeds",
        "1",
        "--jobs",
        "1",
        "--out",
        tmp_path,
        "--model",
        tmp_path / "model",
    ]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert (
        ran.returncode == 1
        and "evidence.py: real-pirate-pirate-COSD-seed0: BadInput:" in ran.stderr
        and "its log is" in ran.stderr
    )

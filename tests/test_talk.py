"""notebooks/talk.py: the tuned model beside the base, streamed, and each token by its divergence."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ROOT

import train
from contexts import open_chat
from train import Config

sys.path.insert(0, str(ROOT / "notebooks"))
import talk

SYSTEM = "Be a pirate."


@pytest.fixture(scope="module")
def run(checkpoint, tmp_path_factory):
    """A run of two steps; the folder of its export."""
    place = tmp_path_factory.mktemp("talk")
    (place / "c.txt").write_text(SYSTEM)
    rows = [json.dumps({"prompt": f"What is {i}?"}) + "\n" for i in range(16)]
    (place / "train.jsonl").write_text("".join(rows))
    cfg = Config(
        model=checkpoint,
        context="instructions",
        context_file=str(place / "c.txt"),
        prompts=str(place / "train.jsonl"),
        max_new_tokens=4,
        steps=2,
        batch=2,
        lr=0.02,
        eval_size=2,
        device="cpu",
        out=str(place / "out"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "subprocess", SimpleNamespace(run=lambda *args, **kwargs: None))
        (result,) = train.train(cfg.resolved("cosd"))
    return f"{result['folder']}/export"


def talked(capsys, *argv):
    assert talk.main([*argv, "--device", "cpu"]) == 0
    return capsys.readouterr().out


@torch.no_grad()
def generated(folder, ids, most):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    said = theirs.generate(
        torch.tensor([ids]),
        max_new_tokens=most,
        do_sample=False,
        attention_mask=torch.ones(1, len(ids)),
    )
    return said[0, len(ids) :].tolist()


def test_three_speakers_say_what_transformers_generates(run, checkpoint, capsys):
    out = talked(capsys, run, "--ask", "Hi", "--max-new-tokens", "6")
    chat = open_chat(checkpoint, 264)
    assert out.startswith("> Hi\n")
    for name, folder, context in (
        ("tuned", run, None),
        ("base", checkpoint, None),
        ("base with context", checkpoint, SYSTEM),
    ):
        ids = chat.render(context, "Hi")
        y = generated(folder, ids, 6)
        text = chat.decode([t for t in y if t not in chat.ends])
        assert f"{name} ({len(ids)} tokens read): {text}" in out


@torch.no_grad()
def test_the_numbers_shown_are_kl_to_the_base_in_context(run, checkpoint, capsys):
    out = talked(capsys, run, "--ask", "Hi", "--max-new-tokens", "5", "--show")
    chat = open_chat(checkpoint, 264)
    student, teacher = (
        transformers.AutoModelForCausalLM.from_pretrained(f).eval() for f in (run, checkpoint)
    )
    prompt, in_context = chat.render(None, "Hi"), chat.render(SYSTEM, "Hi")
    y = generated(run, prompt, 5)
    logs = []
    for model, start in ((student, prompt), (teacher, in_context)):
        logits = model(torch.tensor([start + y])).logits
        logs.append(logits[0, len(start) - 1 : -1].log_softmax(-1))
    kl = (logs[1].exp() * (logs[1] - logs[0])).sum(-1).tolist()
    shown = "".join(f"{chat.decode([t])}[{value:.2f}]" for t, value in zip(y, kl))
    assert shown in out and f"mean {sum(kl) / len(kl):.3f} nats per token" in out
    assert out.count("nats per token") == 2  # the tuned model and the base without context


def test_in_a_terminal_the_numbers_are_colours(run, monkeypatch):
    chat = SimpleNamespace(decode=lambda ids: "abc"[ids[0]])
    text = talk.colored(chat, [0, 1, 2], [0.0, 0.3, 9.0], plain=False)
    assert text == f"a{talk.COLORS[0.5]}b{talk.PLAIN}{talk.WORST}c{talk.PLAIN}"


def test_questions_are_read_line_by_line(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\n\nWho?\n"))
    out = talked(capsys, run, "--max-new-tokens", "2", "--temperature", "1")
    assert out.count("tuned (") == 2 and "> Who?" in out


def test_any_checkpoint_beside_any_base(run, checkpoint, capsys):
    out = talked(capsys, checkpoint, "--base", run, "--ask", "Hi", "--max-new-tokens", "2")
    assert "No single context applies" in out and "base with context" not in out


@pytest.mark.parametrize(
    "argv, said",
    [
        (["/nowhere"], "/nowhere"),
        (["{checkpoint}"], "is not the export of a run: give its --base"),
        (["{run}", "--context-file", "/nowhere.txt"], "/nowhere.txt"),
        (["{run}", "--chat-template-kwargs", "{{"], "Expecting property name"),
    ],
)
def test_what_is_missing_is_one_line(run, checkpoint, capsys, argv, said):
    argv = [part.format(run=run, checkpoint=checkpoint) for part in argv]
    assert talk.main([*argv, "--ask", "Hi", "--device", "cpu"]) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("talk.py: error: ") and said in err

"""A real model, SmolLM2-135M-Instruct: the same as in transformers, and one step of training (-m slow).
Notebook 05 compiles a context into it."""

import sys

import pytest
import torch
import transformers
from conftest import ROOT

import train
from contexts import open_chat
from model import GPT
from train import Config

sys.path.insert(0, str(ROOT / "notebooks"))
from perplexity import perplexity, read_paragraphs

pytestmark = pytest.mark.slow
DATA = ROOT / "notebooks" / "data"
QUESTIONS = [
    "What is the capital of France?",
    "Name three fruits.",
    "Write one sentence about the sea, and one about the hills behind it.",
]


@pytest.fixture(scope="module")
def pair(smollm2):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2).eval()
    return GPT.from_pretrained(smollm2), theirs, open_chat(smollm2, 49152)


@torch.no_grad()
def test_logits_equal_transformers(pair, smollm2):
    mine, theirs, chat = pair
    (row, *_) = read_paragraphs(str(DATA / "plain.txt"), smollm2, 256)
    ids = torch.tensor([row])
    expected = theirs(ids).logits
    assert ((mine(ids) - expected).norm() / expected.norm()).item() < 1e-5


def test_greedy_answers_equal_token_for_token(pair):
    mine, theirs, chat = pair
    prompts = [chat.render(None, question) for question in QUESTIONS]
    ids, mask = mine.generate(prompts, 40, temperature=0, eos=chat.ends)
    for prompt, row, m in zip(prompts, ids, mask):
        ones = torch.ones(1, len(prompt))
        said = theirs.generate(
            torch.tensor([prompt]), attention_mask=ones, max_new_tokens=40, do_sample=False
        )
        assert said[0, len(prompt) :].tolist() == row[m].tolist()


def test_perplexity_on_plain_english(pair, smollm2):
    """A sanity check of the conversion: query and key rows left in the GGUF file's order give several times as much."""
    mine, theirs, chat = pair
    paragraphs = read_paragraphs(str(DATA / "plain.txt"), smollm2, 8192)
    total, count = 0.0, 0
    for row in paragraphs:
        ids = torch.tensor([row])
        with torch.no_grad():
            total += theirs(ids, labels=ids).loss.item() * (len(row) - 1)
        count += len(row) - 1
    value = perplexity(mine, paragraphs)
    assert value == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-4)
    assert 6 < value < 8


def test_chat_format_and_ends(pair):
    chat = pair[2]
    asked = chat.decode(chat.render(None, "Hi"))
    assert asked.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert chat.ends == {2} and chat.decode([2]) == "<|im_end|>"


def test_one_step_and_its_export(smollm2, tmp_path, monkeypatch):
    """The README's run in small: the export is the trained student, and no longer the base."""
    monkeypatch.setattr(train.subprocess, "run", lambda *args, **kwargs: None)  # the report
    cfg = Config(
        model=smollm2,
        context="instructions",
        context_file=str(DATA / "pirate.json"),
        prompts=str(DATA / "questions.jsonl"),
        heldout=str(DATA / "questions-heldout.jsonl"),
        score=f"{DATA / 'pirate.py'}:score",
        steps=1,
        batch=2,
        max_new_tokens=4,
        eval_size=2,
        lora=4,
        device="cpu",
        out=str(tmp_path),
    )
    (result,) = train.train(cfg)
    folder = f"{result['folder']}/export"
    tuned, base = (transformers.AutoModelForCausalLM.from_pretrained(f) for f in (folder, smollm2))
    ids = torch.tensor([open_chat(folder, 49152).render(None, "Hi")])
    with torch.no_grad():
        before = base(ids).logits
        difference = (tuned(ids).logits - before).norm() / before.norm()
    assert 1e-5 < difference < 0.2

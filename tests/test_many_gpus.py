"""notebooks/many_gpus.py: TRL's trainer gets the chats that train.py would show; a smoke run where TRL is installed."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from conftest import ROOT

from contexts import student_prompt, teacher_prompt

sys.path.insert(0, str(ROOT / "notebooks"))
import many_gpus

from train import parse

TRL = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="TRL is not installed (pip install trl)"
)


@pytest.fixture
def flags(checkpoint, tmp_path):
    rows = [{"prompt": f"What is {i}?"} for i in range(15)]
    rows.append({"prompt": [{"role": "system", "content": "S"}, {"role": "user", "content": "x"}]})
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "c.txt").write_text("Be a pirate.")
    given = (
        f"--model {checkpoint} --context instructions --context-file {tmp_path}/c.txt --method cosd"
    )
    given += f" --prompts {tmp_path}/p.jsonl --steps 2 --batch 4 --max-new-tokens 4 --device cpu"
    return f"{given} --out {tmp_path}/out".split()


def test_the_chats_are_those_that_train_shows(flags, checkpoint):
    from contexts import file_task, open_chat

    cfg = parse(flags).resolved("cosd")
    chat = open_chat(checkpoint, 264)
    task = file_task(cfg, chat, 512)
    examples = [e for step in range(2) for e in task.draw_batch(0, step, 4)]
    examples += [task.draw(random.Random(0), row) for row in [e.row for e in task.heldout]]
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    for example in examples:
        row = many_gpus.chats(example)
        for turns, ids in (
            (row["prompt"], student_prompt(chat, example)),
            (row["privileged_context"], teacher_prompt(chat, example)),
        ):
            theirs = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_dict=False
            )
            assert theirs == ids
    assert many_gpus.read(cfg) == [many_gpus.chats(e) for e in examples[:8]]


@pytest.mark.parametrize(
    "more, said",
    [
        ("--method sft", "--method cosd or offline"),
        ("--divergence policy_gradient", "--method cosd or offline, and --divergence forward_kl"),
        ("--lora 4 --micro-batch 2", "--micro-batch --lora: not available on several GPUs"),
    ],
)
def test_what_it_cannot_do_is_refused(flags, capsys, monkeypatch, more, said):
    cfg = parse([*flags, *more.split()])
    with pytest.raises(many_gpus.BadInput, match=said):
        many_gpus.check(cfg.resolved(cfg.method), 1)
    with pytest.raises(many_gpus.BadInput, match="must be a multiple of 3 processes"):
        many_gpus.check(parse(flags).resolved("cosd"), 3)


@TRL
def test_two_processes_make_a_checkpoint(flags, checkpoint, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    script = [str(ROOT / "notebooks" / "many_gpus.py"), *flags, "--lr", "0.01"]
    here = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    child = subprocess.run(
        [*launch, *script], env=here, cwd=tmp_path, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr[-3000:]
    tuned = transformers.AutoModelForCausalLM.from_pretrained(Path(tmp_path) / "out" / "many-gpus")
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
    moved = [not tensor.equal(base[name]) for name, tensor in tuned.state_dict().items()]
    assert sum(moved) > len(moved) / 2

"""Beyond one GPU: the same run as a script for TRL and accelerate.

    pip install trl
    accelerate launch --num_processes 4 notebooks/many_gpus.py --model FOLDER --context instructions \\
        --context-file C.txt --prompts PROMPTS.jsonl --out OUT

The flags are those of train.py, and the files are read by the same code, so that student and teacher read the same
chats and step s has the same prompts. The rest is TRL's: its trainer samples with its own random numbers, has no
anchors, no pre-flight and no evaluation, and averages over all tokens of a device's batch. Its parameter for the
divergence, `distillation_alpha`, means forward KL at 0, JSD at one half and reverse KL at 1.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import contexts
from contexts import BadInput, Example, as_turns, reading, split_system
from model import read_config
from train import Config, comparison, parse, spelled

ALPHA = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}
TEACHERS = {"frozen": "base", "ema": "ema", "live": "live"}
NOT_THERE = "anchors anchor_file top_k micro_batch chunk lora compile eval_every score heldout skip seeds".split()


def chats(example: Example) -> dict:
    """The student's and the teacher's chat, as turns; the prompt's own system turn is joined to the context's."""
    prompt = as_turns("user", example.prompt)
    asked = prompt if example.asked is None else example.asked
    system, turns = split_system((example.context or []) + asked)
    if system:
        turns = as_turns("system", "\n\n".join(system)) + turns
    return {"prompt": prompt, "privileged_context": turns}


def read(cfg: Config) -> list[dict]:
    """The chats of all steps, in order."""
    with reading(f"--model {cfg.model}"):
        shape = read_config(cfg.model)
        how = json.loads(cfg.chat_template_kwargs)
        chat = contexts.open_chat(cfg.model, shape.vocab_size, **how)
    task = contexts.file_task(cfg, chat, shape.max_len)
    batches = [task.draw_batch(cfg.seed, step, cfg.batch) for step in range(cfg.steps)]
    return [chats(example) for batch in batches for example in batch]


def check(cfg: Config, devices: int) -> None:
    """Refuse what this script cannot do, instead of ignoring it."""
    if cfg.method not in ("cosd", "offline") or cfg.divergence not in ALPHA:
        raise BadInput(f"choose --method cosd or offline, and --divergence {', '.join(ALPHA)}")
    default = Config()
    ignored = [name for name in NOT_THERE if getattr(cfg, name) != getattr(default, name)]
    ignored = [spelled(name) for name in ignored if not (name == "chunk" and cfg.chunk == 32)]
    if ignored:
        raise BadInput(f"{' '.join(ignored)}: not available on several GPUs")
    if cfg.batch % devices:
        raise BadInput(f"--batch {cfg.batch} must be a multiple of {devices} processes")


def run(cfg: Config) -> Path:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer
    from trl.experimental.sdft.sdft_trainer import DemonstrationTeacherContextBuilder

    class WholeChat(DemonstrationTeacherContextBuilder):
        """The teacher reads the data set's chat unchanged, instead of a text in the user's turn."""

        def _compose_teacher_prompt(self, prompt, privileged_context):
            return privileged_context

    devices = int(os.environ.get("WORLD_SIZE", 1))
    check(cfg, devices)
    rows, out = read(cfg), Path(cfg.out) / "many-gpus"
    tokenizer = AutoTokenizer.from_pretrained(cfg.model, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # any token will do: padding is masked
    cuda = torch.cuda.is_available() and cfg.device != "cpu"
    args = SDFTConfig(
        output_dir=str(out),
        per_device_train_batch_size=cfg.batch // devices,
        num_generations=1,
        max_steps=cfg.steps,
        shuffle_dataset=False,
        max_prompt_length=None,  # no prompt is ever cut
        max_completion_length=cfg.max_new_tokens,
        temperature=cfg.temperature,
        distillation_mode="full_logits",
        distillation_alpha=ALPHA[cfg.divergence],
        teacher_model_kind=TEACHERS[cfg.teacher],
        teacher_update_rate=cfg.ema_rate,
        generate_from_teacher=cfg.method == "offline",
        chat_template_kwargs=json.loads(cfg.chat_template_kwargs),
        learning_rate=cfg.lr,
        lr_scheduler_type="linear",
        warmup_steps=10,
        weight_decay=0.0,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        gradient_checkpointing=cfg.checkpointing,
        bf16=cuda and torch.cuda.is_bf16_supported(),
        use_cpu=not cuda,
        seed=cfg.seed,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
    )
    trainer = SDFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(cfg.model, dtype=torch.float32),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.teacher_context_builder = WholeChat(trainer)
    trainer.train()
    trainer.save_model(str(out))
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(out)
        print(f"written to {out}")
    return out


def main(argv: list[str] | None = None) -> int:
    try:
        cfg = parse(argv)
        if not cfg.model:
            raise BadInput("--model FOLDER is missing")
        (cfg,) = comparison(cfg)
        run(cfg)
        return 0
    except ModuleNotFoundError as error:
        print(f"many_gpus.py: error: {error}: pip install trl", file=sys.stderr)
    except (BadInput, OSError) as error:
        print(f"many_gpus.py: error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

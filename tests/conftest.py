import os
import sys
from pathlib import Path

import pytest
import torch

from model import GPT, GPTConfig

ROOT = Path(__file__).parent.parent
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))


def tiny_gpt(seed=0, **changes):
    """A random GPT whose logits are far from uniform, so that mistakes become visible."""
    torch.manual_seed(seed)
    model = GPT(
        GPTConfig(
            **{
                "vocab_size": 23,
                "n_layer": 2,
                "d_model": 16,
                "n_head": 4,
                "n_kv_head": 2,
                "head_dim": 6,
                "d_ff": 20,
                "max_len": 64,
            }
            | changes
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double()


@pytest.fixture
def gpt():
    return tiny_gpt()


def tiny_checkpoint(folder, template=CHATML, eos=None, max_len=512, vocab_size=264):
    """A random Llama with a tokenizer of bytes and a chat template, in transformers' format: no download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    torch.manual_seed(0)
    GPT(
        GPTConfig(
            vocab_size,
            n_layer=2,
            d_model=32,
            n_head=4,
            n_kv_head=2,
            head_dim=8,
            d_ff=48,
            max_len=max_len,
        )
    ).save_pretrained(folder)
    bytes_ = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=bytes_, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>"
    )  # ids 256, 257
    fast.chat_template = template
    fast.save_pretrained(folder)
    GenerationConfig(eos_token_id=eos or [257]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return str(tiny_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="session")
def smollm2():
    """The real model, converted once into out/ and kept there."""
    sys.path.insert(0, str(ROOT / "notebooks"))
    from smollm2 import convert

    try:
        return str(convert(ROOT / "out" / "SmolLM2-135M-Instruct"))
    except ModuleNotFoundError as error:
        pytest.skip(str(error))

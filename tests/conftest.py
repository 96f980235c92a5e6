import pytest
import torch

from model import GPT, GPTConfig

torch.set_num_threads(2)


def tiny_gpt(seed=0, **changes):
    """A random GPT whose logits are far from uniform, so that a mistake shows."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{"vocab_size": 23, "n_layer": 2, "d_model": 16, "n_head": 4, "n_kv_head": 2, "head_dim": 6, "d_ff": 20, "max_len": 64} | changes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double()


@pytest.fixture
def gpt():
    return tiny_gpt()

"""The GPT: cache, padding, causality, prefix, sampling, limits. Parity with transformers is in test_weights.py."""

import warnings

import pytest
import torch
from conftest import tiny_gpt

from model import (
    GPTConfig,
    KVCache,
    add_adapters,
    load_weights,
    low_precision_,
    merged_copy,
    pad_right,
    resolve_device,
    rotary_frequencies,
    sample,
    trained,
)

VARIANTS = {
    "modern": {},
    "one key head, odd head width, q/k norm": dict(n_kv_head=1, head_dim=10, qk_norm=True),
    "gpt2": dict(
        norm="layer",
        positions="learned",
        mlp="gelu_tanh",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        n_kv_head=4,
        head_dim=4,
    ),
    "untied, biased, linear rope": dict(
        tied=False, qkv_bias=True, rope_scaling={"rope_type": "linear", "factor": 2.0}
    ),
}


@pytest.fixture(params=VARIANTS)
def model(request):
    return tiny_gpt(**VARIANTS[request.param])


def random_ids(*shape, seed=0):
    return torch.randint(0, 23, shape, generator=torch.Generator().manual_seed(seed))


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# ----------------------------------------------------------------------------------------- forward and cache
def test_parameter_count_formula(model):
    assert model.config.n_params() == sum(p.numel() for p in model.parameters())


def test_causality(model):
    ids = random_ids(2, 9)
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 23
    before, after = model(ids), model(changed)
    close(before[:, :5], after[:, :5])
    assert (before[:, 5:] - after[:, 5:]).abs().amax(
        dim=(0, 2)
    ).min() > 1e-6  # and everything from 5 on does change


def test_order_matters(model):
    ids = random_ids(1, 9)
    assert (model(ids)[0, -1] - model(ids[:, [1, 0, *range(2, 9)]])[0, -1]).abs().max() > 1e-6


def test_project_only_what_is_needed(model):
    ids = random_ids(2, 9)
    close(model.head(model.hidden(ids)[:, 3]), model(ids)[:, 3])


@pytest.mark.parametrize("pieces", [(9,), (1,) * 9, (4, 1, 3, 1)])
@torch.no_grad()
def test_cached_equals_uncached(model, pieces):
    ids = random_ids(3, 9)
    cache = KVCache(model.config, 11)
    close(torch.cat([model(part, cache) for part in ids.split(pieces, dim=1)], dim=1), model(ids))


@pytest.mark.parametrize("length", [1, 7])
@torch.no_grad()
def test_shared_prefix_equals_concatenated_prefix(model, length):
    prefix, ids = random_ids(length, seed=1), random_ids(3, 9)
    whole = model(torch.cat([prefix.expand(3, -1), ids], dim=1))[:, length:]
    cache = KVCache(model.config, 4, prefix=model.read(prefix.tolist()))
    close(torch.cat([model(part, cache) for part in ids.split([5, 1, 3], dim=1)], dim=1), whole)


@torch.no_grad()
def test_shared_prefix_is_stored_once():
    model = tiny_gpt()
    prefix = model.read(random_ids(40).tolist())
    cache = KVCache(model.config, prefix=prefix)
    model(random_ids(16, 3), cache)
    assert cache.prefix.keys[0].shape == (1, 2, 40, 6) and cache.keys[0].shape == (16, 2, 3, 6)


@torch.no_grad()
def test_right_padding_changes_nothing(model):
    rows = [random_ids(n, seed=n).tolist() for n in (3, 9, 6)]
    padded = pad_right(rows)
    assert padded.shape == (3, 9)
    for fill in (0, 17):  # what the fill is does not matter
        for i, row in enumerate(rows):
            padded[i, len(row) :] = fill
        for row, out in zip(rows, model(padded)):
            close(out[: len(row)], model(torch.tensor([row]))[0])


# ------------------------------------------------------------------------------------------------- generate
def naive_greedy(model, prompt, n, eos=()):
    ids = list(prompt)
    while len(ids) - len(prompt) < n:
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] in eos:
            break
    return ids[len(prompt) :]


@torch.no_grad()
def test_greedy_rows_do_not_depend_on_the_batch(model):
    prompts = [random_ids(n, seed=10 + n).tolist() for n in (2, 11, 5, 1)]
    ids, mask = model.generate(prompts, 8, temperature=0)
    assert mask.all()
    for prompt, row in zip(prompts, ids.tolist()):
        assert row == naive_greedy(model, prompt, 8)
        assert row == model.generate([prompt], 8, temperature=0)[0][0].tolist()
    with_prefix = [random_ids(6, seed=3).tolist() + p for p in prompts]
    ids, _ = model.generate(prompts, 8, temperature=0, prefix=model.read(with_prefix[0][:6]))
    assert ids.tolist() == [naive_greedy(model, p, 8) for p in with_prefix]


@pytest.mark.parametrize("length", [20, 300])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_a_common_beginning_changes_no_token(variant, length):
    model = tiny_gpt(**VARIANTS[variant], max_len=400)
    common = random_ids(length, seed=5).tolist()
    prompts = [common + random_ids(n, seed=30 + n).tolist() for n in (2, 11, 5)]
    ids, _ = model.generate(prompts, 8, temperature=0)
    assert ids.tolist() == [naive_greedy(model, p, 8) for p in prompts]
    given = model.read(common)
    ids, _ = model.generate([p[length:] for p in prompts], 8, temperature=0, prefix=given)
    assert ids.tolist() == [naive_greedy(model, p, 8) for p in prompts]
    assert given.keys[0].shape[:1] + given.keys[0].shape[2:3] == (
        1,
        length,
    ) and given.length.tolist() == [length]


@torch.no_grad()
def test_logits_during_decoding_equal_scoring(model):
    """Teacher-forcing the generated row through one plain forward gives the same choices: no position is off by one."""
    prompts = [random_ids(n, seed=20 + n).tolist() for n in (7, 2)]
    ids, _ = model.generate(prompts, 6, temperature=0)
    for prompt, row in zip(prompts, ids.tolist()):
        assert (
            model(torch.tensor([prompt + row]))[0, len(prompt) - 1 : -1].argmax(-1).tolist() == row
        )


@torch.no_grad()
def test_eos_is_in_the_mask_and_ends_row_and_batch():
    model = tiny_gpt(seed=4)
    prompts = [random_ids(n, seed=30 + n).tolist() for n in (4, 9, 6)]
    free = [naive_greedy(model, p, 12) for p in prompts]
    eos = {free[0][2], free[1][5]}
    expected = [naive_greedy(model, p, 12, eos) for p in prompts]
    ids, mask = model.generate(prompts, 12, temperature=0, eos=eos)
    assert [row[m].tolist() for row, m in zip(ids, mask)] == expected
    assert mask.shape[1] == max(map(len, expected))  # the batch stops with its last row
    assert (ids[~mask] == 0).all() and expected[0][-1] in eos and len(expected[0]) <= 3


def test_sampling_is_reproducible_and_follows_the_distribution():
    model = tiny_gpt().float()
    prompts = [[1, 2, 3]] * 4000
    draw = lambda seed, **kw: model.generate(
        prompts, 1, generator=torch.Generator().manual_seed(seed), **kw
    )[0][:, 0]
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    with torch.no_grad():
        logits = model(torch.tensor([[1, 2, 3]]))[0, -1]
    for temperature in (1.0, 2.0):
        frequency = torch.bincount(draw(2, temperature=temperature), minlength=23) / 4000
        assert (frequency - (logits / temperature).softmax(-1)).abs().max() < 0.035
    assert set(draw(3, top_k=3).tolist()) == set(logits.topk(3).indices.tolist())
    assert (draw(4, top_k=1) == logits.argmax()).all() and (
        draw(5, top_p=1e-6) == logits.argmax()
    ).all()


@pytest.mark.parametrize("drawn", [0.0, 0.5, 1 - 2**-24])
def test_a_token_of_probability_zero_is_never_drawn(drawn, monkeypatch):
    """For any uniform number: first, last and middle tokens have probability 0 here."""
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 2.0, -torch.inf]])
    monkeypatch.setattr(torch, "rand", lambda *shape, **kw: torch.full(shape, drawn))
    assert sample(logits, 1.0, None, None, None).item() == {0.0: 3, 0.5: 3, 1 - 2**-24: 1}[drawn]


def test_top_p_keeps_the_token_that_crosses():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(500, 3)
    drawn = lambda top_p: set(
        sample(logits, 1.0, None, top_p, torch.Generator().manual_seed(0)).tolist()
    )
    assert drawn(0.5) == {0} and drawn(0.6) == {0, 1} and drawn(0.81) == {0, 1, 2}


@pytest.mark.parametrize("vocab", [5, 150_000])
def test_the_last_uniform_number_draws_a_token_that_has_probability(vocab, monkeypatch):
    """uniform = 1 lands on the sum itself: neither a tail of zeros nor the rounding of a long sum may be drawn."""
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(0))
    logits[:, -vocab // 3 :] = -torch.inf
    monkeypatch.setattr(torch, "rand", lambda *shape, **kw: torch.zeros(shape))
    drawn = sample(logits, 1.0, None, None, None)
    assert (logits.softmax(-1).gather(1, drawn[:, None]) > 0).all()


def test_half_precision_logits_are_sampled_in_fp32():
    """In bf16 the running sum of 1,000 equal probabilities has room for a fraction of them."""
    drawn = sample(
        torch.zeros(2000, 1000, dtype=torch.bfloat16),
        1.0,
        None,
        None,
        torch.Generator().manual_seed(0),
    )
    assert len(drawn.unique()) > 800


def test_the_rounding_of_a_parallel_sum_draws_no_token_of_probability_zero(monkeypatch):
    logits = torch.tensor([[0.0, -torch.inf, 0.0]])
    monkeypatch.setattr(torch, "rand", lambda *shape, **kw: torch.full(shape, 0.45))
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda probs, dim: torch.tensor([[0.5, 0.6, 1.0]]))
    assert sample(logits, 1.0, None, None, None).item() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("limits", [(None, None), (5, None), (None, 0.7), (5, 0.7)])
def test_sums_that_are_not_monotone_draw_no_token_of_probability_zero(limits, dtype, monkeypatch):
    """A GPU adds in another order, so that its running sums may decrease by a rounding error; here they decrease by more."""
    logits = 3 * torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    logits[:, ::3] = -torch.inf
    logits = logits.to(dtype)
    plain, generator = torch.Tensor.cumsum, torch.Generator().manual_seed(1)

    def shaky(probs, dim):
        return plain(probs, dim) + 0.02 * torch.randn(probs.shape, generator=generator)

    top_k, _ = limits
    allowed = logits > -torch.inf
    if top_k:
        allowed &= logits >= logits.topk(top_k).values[:, -1:]
    monkeypatch.setattr(torch.Tensor, "cumsum", shaky)
    for seed in range(20):
        drawn = sample(logits, 1.0, *limits, torch.Generator().manual_seed(seed))
        assert allowed.gather(1, drawn[:, None]).all()


# --------------------------------------------------------------------------------- half precision, by autocast
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("n_kv_head", [2, 4])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cached_decoding_under_autocast(dtype, biases, n_kv_head, adapters):
    model = tiny_gpt(
        qkv_bias=biases, out_bias=biases, mlp_bias=biases, n_kv_head=n_kv_head, qk_norm=True
    ).float()
    if adapters:
        add_adapters(model, 2)
    prompts, common = [[1, 2, 3], [4]], list(range(20))
    with warnings.catch_warnings(), torch.autocast("cpu", dtype):
        warnings.simplefilter("error")  # q/k norm: "fused path refused"
        for prefix in (None, model.read(common)):
            ids, mask = model.generate(prompts, 6, temperature=0, prefix=prefix)
            assert ids.shape == (2, 6) and mask.all()
        with torch.no_grad():
            ids, cache = random_ids(2, 9), KVCache(model.config, 5)
            pieces = torch.cat(
                [model(part, cache) for part in ids.split([4, 1, 4], dim=1)], dim=1
            ).float()
            whole = model(ids).float()
    exact = model(ids)
    assert (pieces - exact).norm() / exact.norm() < 0.1 and (
        whole - exact
    ).norm() / exact.norm() < 0.1


@torch.no_grad()
def test_a_prefix_read_without_autocast_serves_rows_under_it():
    model = tiny_gpt(qkv_bias=True).float()
    prefix = model.read(list(range(20)))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.generate([[1, 2], [3]], 4, prefix=prefix)[0].shape == (2, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "changes", [{}, dict(qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True, tied=False)]
)
def test_low_precision_weights_are_the_same_to_the_bit_under_autocast(dtype, changes):
    model = tiny_gpt(**changes).float()
    add_adapters(model, 2)
    for layer in model.blocks.modules():
        if getattr(layer, "B", None) is not None:
            layer.B.data.normal_(generator=torch.Generator().manual_seed(1))
    ids, results = random_ids(2, 9), []
    for low in (False, True):
        if low:
            low_precision_(model, dtype)
        model.zero_grad()
        with torch.autocast("cpu", dtype):
            logits = model(ids)
        logits.float().logsumexp(-1).sum().backward()
        results.append([logits, *[p.grad for p in model.parameters() if p.grad is not None]])
    assert len(results[0]) > 10 and all(torch.equal(a, b) for a, b in zip(*results))
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert {p.dtype for p in model.parameters()} == {dtype, torch.float32}
    assert (
        "embed.weight" in kept
        and "blocks.0.attention.q.A" in kept
        and "blocks.0.attention.q.weight" not in kept
    )
    assert {p.dtype for p in merged_copy(model).parameters()} == {torch.float32}


def test_the_eps_of_every_norm_reaches_its_module():
    for kind in ("rms", "layer"):
        model = tiny_gpt(norm=kind, norm_eps=0.5, qk_norm=True)
        norms = [m for m in model.modules() if hasattr(m, "eps")]
        assert len(norms) == 2 * 4 + 1 and all(m.eps == 0.5 for m in norms)
    layer = tiny_gpt(norm_eps=0.5, qk_norm=True).blocks[0].attention.q_norm
    x = torch.randn(3, 6, dtype=torch.float64)
    close(layer(x), x / (x.square().mean(-1, keepdim=True) + 0.5).sqrt() * layer.weight)


# --------------------------------------------------------------------------------------------------- errors
def test_position_limit_is_a_clear_error(model):
    with pytest.raises(ValueError, match="70 positions exceed the model's limit of 64"):
        model(random_ids(1, 70))
    with pytest.raises(ValueError, match="69 positions"), torch.no_grad():
        prefix = model.read(random_ids(60).tolist())
        model(random_ids(1, 9), KVCache(model.config, prefix=prefix))
    with pytest.raises(ValueError, match="65 positions"):
        model.generate([random_ids(60).tolist()], 6, temperature=0)  # 60 + 5 tokens are read
    ids, _ = model.generate([random_ids(60).tolist()], 5, temperature=0)
    assert ids.shape == (1, 5)


def test_refusals():
    for bad, message in [
        (dict(mlp="relu"), "mlp='relu': choose from .*swiglu"),
        (dict(n_layer=0), "every size must be at least 1"),
        (dict(n_kv_head=3), "n_head must be a multiple of n_kv_head"),
        (dict(head_dim=5), "a rotary head_dim even"),
        (dict(rope_scaling={"rope_type": "yarn"}), "'yarn'.*neither linear nor llama3"),
    ]:
        with pytest.raises(ValueError, match=message):
            tiny_gpt(**bad)
    model = tiny_gpt()
    for bad in (dict(temperature=-1), dict(top_p=0), dict(top_k=0)):
        with pytest.raises(ValueError, match="out of range"):
            model.generate([[1]], 3, **bad)
    with pytest.raises(ValueError, match="a token in each"):
        model.generate([[1], []], 3)
    cache = KVCache(model.config, 1)
    model(random_ids(1, 3), cache)
    with pytest.raises(RuntimeError, match="no_grad"):
        model(random_ids(1, 1), cache)
    with pytest.raises(ValueError):
        model(random_ids(3))  # not (B, T)


# ------------------------------------------------------------------------------------- devices, weights
def test_a_device_that_is_not_there_is_refused_by_flag():
    with pytest.raises(OSError, match="--device toaster cannot be used here"):
        resolve_device("toaster", "auto")


@pytest.mark.parametrize("dtype, low", [("auto", torch.float32), ("bf16", torch.bfloat16)])
def test_a_device_and_its_autocast(dtype, low):
    device, resolved, autocast = resolve_device("cpu", dtype)
    assert device == torch.device("cpu") and resolved == low
    with autocast():
        assert torch.is_autocast_enabled("cpu") == (low != torch.float32)
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == low


@pytest.mark.parametrize("adapters", [False, True])
def test_what_was_trained_comes_back_and_a_missing_name_is_an_error(adapters):
    model, other = tiny_gpt(), tiny_gpt()
    for each in (model, other):
        if adapters:
            add_adapters(each, 2)
    for parameter in trained(model).values():
        parameter.data.normal_(generator=torch.Generator().manual_seed(3))
    saved = {name: parameter.detach().clone() for name, parameter in trained(model).items()}
    assert all(name.endswith((".A", ".B")) == adapters for name in saved)
    assert len(saved) == (2 * 2 * 7 if adapters else len(list(model.parameters())))
    load_weights(other, saved)
    assert torch.equal(other(random_ids(2, 9)), model(random_ids(2, 9)))
    for name in saved:
        with pytest.raises(KeyError, match=name):
            load_weights(other, {other: p for other, p in saved.items() if other != name})


# ----------------------------------------------------------------------------------------- rotary positions
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def test_bf16_weights_keep_exact_rotary_angles():
    model = tiny_gpt().float()
    exact = model.frequencies.clone()
    assert (
        torch.equal(model.bfloat16().frequencies, exact)
        and model(random_ids(1, 9)).dtype == torch.bfloat16
    )


def test_llama3_frequencies_by_hand():
    """Short wavelengths stay, long ones stretch by the factor."""
    config = GPTConfig(23, head_dim=8, rope_theta=10_000.0, rope_scaling=LLAMA3)
    plain = rotary_frequencies(GPTConfig(23, head_dim=8, rope_theta=10_000.0))
    assert plain.tolist() == pytest.approx([1, 0.1, 0.01, 0.001])
    turns = 16 * 1 / (2 * torch.pi)  # 2.546 of the band 1..4: a blend
    keep = (turns - 1) / 3
    assert rotary_frequencies(config).tolist() == pytest.approx(
        [keep + (1 - keep) / 8, 0.1 / 8, 0.01 / 8, 0.001 / 8]
    )

"""The model: attention, masks, shapes, tying, counts, and the sliced loss."""

import math

import pytest
import torch
import torch.nn.functional as F

# Parameters of each preset as the course's outline gives them, and how closely.
OUTLINE = {
    "slm": (30.0e6, 0.002),
    "babymodel": (12.3e6, 0.005),
    "nano": (22e6, 0.03),
    "minimalist": (9e6, 0.03),
    "tiny": (4.8e6, 0.02),
}
KINDS = [{}, {"rope": True}, {"tie_weights": False}, {"bias": False}]
ALL = [
    {"rope": rope, "tie_weights": tie, "bias": bias}
    for rope in (False, True)
    for tie in (True, False)
    for bias in (True, False)
]


def ids(*shape, seed=0):
    return torch.randint(400, shape, generator=torch.Generator().manual_seed(seed))


# Sizes.
@pytest.mark.parametrize("changes", ALL, ids=str)
def test_the_formula_counts_the_parameters(nb, small_model, changes):
    model = small_model(**changes)
    expected = sum(p.numel() for p in model.parameters())
    assert sum(nb.count_parameters(model.config).values()) == expected


def test_there_are_the_eight_presets(nb):
    names = ["slm", "babymodel", "nano", "minimalist", "tiny", "storyteller", "bookworm", "laptop"]
    assert list(nb.PRESETS) == names


@pytest.mark.parametrize("name", OUTLINE)
def test_presets_have_the_outlines_sizes(nb, name):
    size, tolerance = OUTLINE[name]
    config = nb.GPTConfig(**nb.PRESETS[name]["model"])
    with torch.device("meta"):
        model = nb.GPT(config)
    n = sum(p.numel() for p in model.parameters())
    assert n == sum(nb.count_parameters(config).values())
    assert n == pytest.approx(size, rel=tolerance)


def test_slm_untied_has_49_million_and_storyteller_at_most_20(nb):
    untied = nb.count_parameters(nb.GPTConfig(tie_weights=False))
    assert sum(untied.values()) == pytest.approx(49.3e6, rel=0.002)
    storyteller = nb.GPTConfig(**nb.PRESETS["storyteller"]["model"])
    assert sum(nb.count_parameters(storyteller).values()) <= 20e6


def test_presets_keep_the_outlines_shapes_and_budgets(nb):
    shapes, steps = {}, {}
    for name, row in nb.PRESETS.items():
        c, t = nb.GPTConfig(**row["model"]), nb.TrainConfig(**row["training"])
        shapes[name] = (row["tokenizer"], c.vocab_size, c.n_layer, c.n_head, c.n_embd, c.block_size)
        steps[name] = t.max_steps or t.minutes
        assert t.tokens_per_step % c.block_size == 0
    assert shapes["slm"] == ("gpt2", 50_257, 6, 6, 384, 128)
    assert shapes["babymodel"] == ("gpt2", 50_257, 6, 6, 192, 128)
    assert shapes["nano"] == ("bpe", 10_000, 2, 8, 768, 128)
    assert shapes["minimalist"] == ("bpe", 10_000, 8, 8, 256, 256)
    assert shapes["tiny"][:2] == ("bpe", 4_096) and shapes["storyteller"][:2] == ("bpe", 8_192)
    assert shapes["laptop"][0] == "bpe" and 2_048 <= shapes["laptop"][1] <= 4_096
    assert (steps["slm"], steps["storyteller"], steps["laptop"]) == (60, 60, 8)
    nano = nb.TrainConfig(**nb.PRESETS["nano"]["training"])
    assert nano.max_steps * nano.tokens_per_step == 458_752_000


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_shapes(small_model, changes):
    model = small_model(**changes)
    logits, loss = model(ids(3, 11))
    assert logits.shape == (3, 11, 400) and loss is None
    logits, loss = model(ids(3, 16), ids(3, 16, seed=1))
    assert logits.shape == (3, 16, 400) and loss.shape == ()
    none, sliced = model(ids(3, 16), ids(3, 16, seed=1), loss_only=True)
    assert none is None and sliced.item() == pytest.approx(loss.item(), rel=1e-5)


def test_more_than_the_context_is_refused(small_model):
    with pytest.raises(AssertionError, match="context"):
        small_model()(ids(1, 17))


def test_tied_weights_are_one_tensor_and_learn_as_one(small_model):
    tied, untied = small_model(), small_model(tie_weights=False)
    assert tied.lm_head.weight is tied.transformer.wte.weight
    assert untied.lm_head.weight is not untied.transformer.wte.weight
    tied(ids(2, 8), ids(2, 8, seed=1), loss_only=True)[1].backward()
    untied.load_state_dict(tied.state_dict())
    untied(ids(2, 8), ids(2, 8, seed=1), loss_only=True)[1].backward()
    parts = untied.transformer.wte.weight.grad + untied.lm_head.weight.grad
    torch.testing.assert_close(tied.lm_head.weight.grad, parts)


def test_initialisation_is_gpt2s(nb):
    torch.manual_seed(0)
    model = nb.GPT(nb.GPTConfig(n_layer=8, n_embd=192, n_head=2, vocab_size=1_000))
    for name, p in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert p.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.03), name
        elif p.dim() == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.03), name
        elif name.endswith("bias"):
            assert not p.any(), name
        else:
            assert (p == 1).all(), name


def test_a_fresh_model_guesses_uniformly(nb):
    torch.manual_seed(0)
    model = nb.GPT(nb.GPTConfig(vocab_size=2_048, n_layer=2, dropout=0.0))
    loss = model(ids(8, 64), ids(8, 64, seed=1))[1].item()
    assert loss == pytest.approx(math.log(2_048), abs=0.2)


def test_names_inside_are_gpt2s(small_model):
    names = set(small_model().state_dict())
    assert {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"} <= names
    assert {"transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_proj.bias"} <= names
    assert "transformer.wpe.weight" not in small_model(rope=True).state_dict()


def test_weights_of_earlier_versions_load(nb, small_model):
    """They had a LayerNorm class of their own, with the names of PyTorch's."""
    norms = [f"transformer.h.{i}.ln_{n}" for i in (0, 1) for n in (1, 2)] + ["transformer.ln_f"]
    for bias in (True, False):
        model = small_model(bias=bias)
        names = {name for name in model.state_dict() if ".ln_" in name}
        assert names == {
            f"{norm}.{kind}" for norm in norms for kind in ["weight", "bias"][: 1 + bias]
        }
    published = nb.load_checkpoint(nb.Path(__file__).parent.parent / "best_model_params.pt")
    model = nb.GPT(nb.GPTConfig(**published["config"]))
    nb.load_weights(model, published)
    assert torch.equal(
        model.transformer.ln_f.weight.half(), published["model"]["transformer.ln_f.weight"].half()
    )


def test_the_model_equals_a_gpt2_written_again(small_model):
    """The forward pass from the weights alone, in plain matrix products."""
    model = small_model()
    w, x = model.state_dict(), ids(2, 10)
    h = w["transformer.wte.weight"][x] + w["transformer.wpe.weight"][:10]

    def linear(name, value):
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, value):
        centred = value - value.mean(-1, keepdim=True)
        deviation = (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return centred / deviation * w[f"{name}.weight"] + w[f"{name}.bias"]

    for i in range(2):
        block = f"transformer.h.{i}"
        q, k, v = linear(f"{block}.attn.c_attn", norm(f"{block}.ln_1", h)).split(32, dim=-1)
        heads = []
        for part in (slice(0, 16), slice(16, 32)):
            scores = q[..., part] @ k[..., part].transpose(1, 2) / 4
            future = torch.ones(10, 10).triu(1).bool()
            heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[..., part])
        h = h + linear(f"{block}.attn.c_proj", torch.cat(heads, -1))
        u = linear(f"{block}.mlp.c_fc", norm(f"{block}.ln_2", h))
        u = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
        h = h + linear(f"{block}.mlp.c_proj", u)
    logits = norm("transformer.ln_f", h) @ w["transformer.wte.weight"].T
    torch.testing.assert_close(model(x)[0], logits, rtol=1e-4, atol=1e-4)


# Attention and the mask.
def test_three_attentions_agree(nb):
    q, k, v = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(0))
    by_hand, weights = nb.attention_by_hand(q, k, v)
    torch.testing.assert_close(by_hand, nb.attention_by_loop(q, k, v))
    fused = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
    torch.testing.assert_close(by_hand, fused)
    assert not weights.triu(1).any()
    torch.testing.assert_close(weights.sum(-1), torch.ones(7))


@pytest.mark.parametrize(
    "mask, expected",
    [
        (None, "not tried yet"),
        (torch.ones(4, 4).tril(), "ok: exercise 2"),
        (torch.ones(4, 4).tril().bool(), "ok: exercise 2"),
        (torch.ones(4, 4).tril(-1), "token 0 may not look at token 0"),
        (torch.ones(4, 4).triu(), "token 0 may look at token 1"),
        (torch.ones(4, 4), "token 0 may look at token 1"),
        (torch.ones(3, 3).tril(), "shape (4, 4)"),
        ([[1, 0], [1, 1]], "shape (4, 4)"),
    ],
    ids=str,
)
def test_the_second_exercise_is_judged(nb, mask, expected):
    assert expected in nb.judge_mask(mask, 4)


def test_the_second_exercise_is_untouched_in_the_notebook(nb):
    assert nb.my_mask(5) is None


@pytest.mark.parametrize("changes", KINDS, ids=str)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("place", [1, 9, 15])
def test_no_earlier_output_sees_a_later_token(small_model, changes, grad, place):
    model, x = small_model(**changes), ids(2, 16)
    other = x.clone()
    other[:, place] = (other[:, place] + 1) % 400
    with torch.set_grad_enabled(grad):
        before, after = model(x)[0], model(other)[0]
    assert torch.equal(before[:, :place], after[:, :place])
    assert (before[:, place:] != after[:, place:]).any(-1).all()


def test_in_bfloat16_the_attention_by_hand_takes_over(nb, small_model, monkeypatch):
    """On a CPU, in training: near the float32 result, and blind to the future."""
    model, x = small_model(rope=True), ids(2, 16)
    exact = model(x)[0]
    other = x.clone()
    other[:, 9] = (other[:, 9] + 1) % 400
    monkeypatch.setattr(nb.F, "scaled_dot_product_attention", None)
    with torch.autocast("cpu", torch.bfloat16):
        before, after = model(x)[0], model(other)[0]
    assert torch.equal(before[:, :9], after[:, :9]) and not torch.equal(before, after)
    assert (before - exact).abs().max() < 0.02 * exact.abs().max()


def test_gradients_stay_in_the_past(small_model):
    """The loss at one position has exactly no gradient by any later token's vector."""
    model, x = small_model(), ids(1, 16)
    vectors = model.transformer.wte(x).detach().requires_grad_()
    model.transformer.wte.register_forward_hook(lambda *_: vectors)
    model(x)[0][0, 6].logsumexp(-1).backward()
    touched = vectors.grad[0].abs().sum(-1) > 0
    assert touched.tolist() == [True] * 7 + [False] * 9


def test_the_self_test_notices_a_leak(nb, cpu, monkeypatch):
    assert nb.causality_holds(cpu.device, cpu.dtype)
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(
        nb.F, "scaled_dot_product_attention", lambda q, k, v, is_causal: real(q, k, v)
    )
    assert not nb.causality_holds(cpu.device, cpu.dtype)


@pytest.mark.parametrize("changes", [{}, {"rope": True}], ids=str)
def test_windows_of_a_batch_do_not_mix(small_model, changes):
    model, x = small_model(**changes), ids(3, 16)
    alone = torch.cat([model(row[None])[0] for row in x])
    torch.testing.assert_close(model(x)[0], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"rope": True}], ids=str)
def test_order_matters(small_model, changes):
    x = ids(1, 16)
    swapped = x[:, [1, 0, *range(2, 16)]]
    model = small_model(**changes)
    assert not torch.allclose(model(x)[0][:, -1], model(swapped)[0][:, -1], atol=1e-3)


def test_rotations_keep_lengths_and_depend_on_distance_alone(nb):
    q, k = torch.randn(2, 1, 1, 1, 16, generator=torch.Generator().manual_seed(0)).double()

    def turned(x, t):
        return nb.apply_rope(x, *nb.rope_cos_sin(torch.tensor([float(t)]).double(), 16))

    assert turned(q, 37).norm().item() == pytest.approx(q.norm().item())
    scores = [(turned(q, t + 5) * turned(k, t)).sum().item() for t in (0, 11, 200)]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-3)
    assert (turned(q, 6) * turned(k, 0)).sum().item() != pytest.approx(scores[0], rel=1e-3)


def test_rotation_equals_complex_multiplication(nb):
    x = torch.randn(1, 1, 5, 8, generator=torch.Generator().manual_seed(0))
    times = 10_000.0 ** (-torch.arange(0, 8, 2) / 8)
    turn = torch.polar(torch.ones(5, 4), torch.arange(5)[:, None] * times)
    expected = torch.complex(x[..., :4], x[..., 4:]) * turn
    out = nb.apply_rope(x, *nb.rope_cos_sin(torch.arange(5), 8))
    torch.testing.assert_close(torch.complex(out[..., :4], out[..., 4:]), expected)


@pytest.mark.parametrize("changes", [{}, {"rope": True}], ids=str)
def test_attention_maps_are_what_the_model_computes(nb, small_model, changes):
    model, x = small_model(**changes).eval(), ids(1, 9)
    maps = nb.attention_maps(model, x)
    assert maps.shape == (2, 2, 9, 9) and not maps.triu(1).any()
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 9))
    block, seen = model.transformer.h[0], []
    block.attn.c_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    block.attn.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.inference_mode():
        model(x)
        (inside, rotation, *_), mixed = seen
        v = block.attn.queries_keys_values(inside, rotation)[2]
        expected = (maps[0] @ v[0]).transpose(0, 1).reshape(1, 9, 32)
    torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-5)


# The sliced loss.
def both_losses(nb, n, vocabulary, autocast):
    """[(loss, gradient by hidden, gradient by weight)] of the plain and the sliced way."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, 24, generator=generator)
    weight = torch.randn(vocabulary, 24, generator=generator) * 0.3
    targets = torch.randint(vocabulary, (n,), generator=generator)
    out = []
    for sliced in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if sliced:
                loss = nb.sliced_cross_entropy(h, w, targets)
            else:
                loss = F.cross_entropy((h @ w.T).float(), targets)
        (3 * loss).backward()
        out.append((loss.detach(), h.grad, w.grad))
    return out


@pytest.mark.parametrize("n, vocabulary", [(50, 300), (1, 300), (1_200, 65_536)])
def test_sliced_loss_and_gradients_are_the_plain_ones(nb, n, vocabulary):
    plain, sliced = both_losses(nb, n, vocabulary, autocast=False)
    torch.testing.assert_close(sliced, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n, vocabulary", [(50, 300), (1_200, 65_536)])
def test_sliced_loss_agrees_in_bfloat16(nb, n, vocabulary):
    plain, sliced = both_losses(nb, n, vocabulary, autocast=True)
    assert sliced[0].dtype == torch.float32
    torch.testing.assert_close(sliced[0], plain[0], rtol=1e-2, atol=1e-2)
    for ours, theirs in zip(sliced[1:], plain[1:]):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("rows", [None, 1, 3])
def test_the_sliced_loss_of_a_very_wrong_guess_is_exact(nb, rows):
    """As sure as e^300 of a token that never comes: more than float32 can hold."""
    hidden, weight = 300.0 * torch.eye(4), torch.eye(4)
    loss = nb.sliced_cross_entropy(hidden, weight, torch.tensor([1, 2, 3, 0]), rows)
    assert loss.item() == pytest.approx(300.0)


def test_sliced_gradients_are_those_of_finite_differences(nb):
    generator = torch.Generator().manual_seed(0)
    h, w = (torch.randn(n, 4, generator=generator).double().requires_grad_() for n in (5, 7))
    t = torch.tensor([0, 6, 3, 3, 1])
    loss = nb.sliced_cross_entropy(h, w, t, rows=2)
    assert loss.item() == pytest.approx(F.cross_entropy(h @ w.T, t).item(), rel=1e-6)
    for p, gradient in zip((h, w), torch.autograd.grad(loss, (h, w))):
        values = p.data.view(-1)
        for i, found in enumerate(gradient.flatten().tolist()):
            around = []
            for by in (1e-5, -2e-5):
                values[i] += by
                around.append(F.cross_entropy(h @ w.T, t).item())
            values[i] += 1e-5
            assert found == pytest.approx((around[0] - around[1]) / 2e-5, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("n_embd", [8, 384, 2_560])
def test_a_fresh_model_of_any_width_has_the_loss_that_step_7_expects(nb, small_model, n_embd):
    torch.manual_seed(1)
    shape = {"n_embd": n_embd, "n_layer": 1, "n_head": 1, "dropout": 0.0}
    model = nb.GPT(nb.GPTConfig(block_size=16, vocab_size=1_000, **shape))
    x, y = torch.randint(1_000, (2, 4, 16))
    assert model(x, y)[1].item() == pytest.approx(math.log(1_000) + 0.0002 * n_embd, abs=0.25)

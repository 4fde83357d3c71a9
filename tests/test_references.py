"""The notebook against others' code and against formulas written out by hand.

`python tests/test_references.py` prints the largest differences that the comparisons with
`transformers` find.
"""

import math
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import load_notebook, made_of, small_data

# Windows, tokens per window (the context is 16), layers, heads.
SIZES = [(1, 1, 1, 1), (4, 1, 2, 3), (3, 5, 1, 4), (2, 16, 4, 1), (2, 16, 2, 2)]
SIZES += [(5, 15, 3, 3), (1, 16, 4, 4), (7, 2, 2, 4)]
KINDS = [{"tie_weights": tie, "bias": bias} for tie in (True, False) for bias in (True, False)]
TOLERANCE = 1e-4  # of the largest number in a tensor


# The model and its gradients against GPT-2 in `transformers`.
def a_model(nb, **changes):
    """A model whose weights, biases and scales all differ clearly from their start."""
    torch.manual_seed(0)
    shape = {"block_size": 16, "vocab_size": 400, "n_embd": 48, "n_layer": 2, "n_head": 2}
    model = nb.GPT(nb.GPTConfig(**shape | {"dropout": 0.0} | changes))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


def windows(n, length, vocabulary=400):
    """Inputs and targets, each (n, length)."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (n, length + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def turned(name: str, tensor):
    """A tensor of ours as GPT-2 in `transformers` keeps it: its matrices lie the other way."""
    return tensor.T if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else tensor


def the_same_in_transformers(model):
    """GPT2LMHeadModel with the weights of our model, and zeros where ours has no biases."""
    transformers = pytest.importorskip("transformers")
    c = model.config
    settings = transformers.GPT2Config(
        vocab_size=c.vocab_size,
        n_positions=c.block_size,
        n_layer=c.n_layer,
        n_head=c.n_head,
        n_embd=c.n_embd,
        activation_function="gelu_new",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=c.tie_weights,
        bos_token_id=None,
        eos_token_id=None,
    )
    other, ours = transformers.GPT2LMHeadModel(settings), dict(model.named_parameters())
    with torch.no_grad():
        for name, p in other.named_parameters():
            if name in ours:
                p.copy_(turned(name, ours.pop(name)))
            else:
                assert name.endswith("bias") and not c.bias, name
                p.zero_()
    assert not ours  # each of our parameters has one place there
    return other


def difference(ours, theirs) -> float:
    """The largest difference of two tensors, as a share of the largest number."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def differences_from_gpt2(model, x, y) -> dict[str, float]:
    """The largest differences of logits, of losses, and of any parameter's gradient.

    Losses and gradients: once from the logits, once by the sliced loss.
    """
    other = the_same_in_transformers(model)
    logits = other(x).logits
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
    loss.backward()
    expected = {name: p.grad for name, p in other.named_parameters()}
    found = {"logits": difference(model(x)[0], logits)}
    for kind, loss_only in (("plain", False), ("sliced", True)):
        model.zero_grad()
        ours = model(x, y, loss_only=loss_only)[1]
        ours.backward()
        found[f"{kind} loss"] = difference(ours, loss)
        found[f"{kind} gradients"] = max(
            difference(turned(name, p.grad), expected[name]) for name, p in model.named_parameters()
        )
    return found


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_logits_and_all_gradients_are_gpt2s(nb, size, kind):
    n, length, n_layer, n_head = size
    model = a_model(nb, n_layer=n_layer, n_head=n_head, **kind)
    found = differences_from_gpt2(model, *windows(n, length))
    assert max(found.values()) < TOLERANCE, found


def slm(nb):
    """The main line in full size, fresh."""
    torch.manual_seed(0)
    return nb.GPT(nb.GPTConfig(**nb.PRESETS["slm"]["model"] | {"dropout": 0.0}))


def test_the_main_line_in_full_size_has_gpt2s_logits_and_gradients(nb):
    found = differences_from_gpt2(slm(nb), *windows(1, 128, 50_257))
    assert max(found.values()) < TOLERANCE, found


def difference_from_neox(nb, tokenizer, folder, tie: bool) -> float:
    """The largest difference of any gradient from that of an exported model with rotations.

    The export only moves numbers around. So our gradients, exported as if they were weights,
    must be the gradients of the exported model.
    """
    transformers = pytest.importorskip("transformers")
    model = a_model(nb, rope=True, tie_weights=tie, n_head=3, vocab_size=tokenizer.n_vocab)
    x, y = windows(3, 16)
    model(x, y, loss_only=True)[1].backward()
    gradients = nb.GPT(model.config)
    with torch.no_grad():
        for p, ours in zip(gradients.parameters(), model.parameters()):
            p.copy_(ours.grad)
    loaded = []
    for name, exported in (("weights", model), ("gradients", gradients)):
        nb.export_to_transformers(exported, tokenizer, folder / name)
        loaded.append(transformers.AutoModelForCausalLM.from_pretrained(folder / name))
    other, expected = loaded[0], dict(loaded[1].named_parameters())
    F.cross_entropy(other(x).logits.flatten(0, 1), y.flatten()).backward()
    return max(difference(expected[name], p.grad) for name, p in other.named_parameters())


@pytest.mark.parametrize("tie", [True, False])
def test_with_rotations_all_gradients_are_neoxs(nb, tokenizer, tmp_path, tie):
    assert difference_from_neox(nb, tokenizer, tmp_path, tie) < TOLERANCE


# Training against PyTorch's schedules and the formulas.
@pytest.mark.parametrize("max_steps, warmup", [(5, 200), (100, 3), (100, 200), (1_099, 99)])
def test_the_schedule_is_pytorchs_linear_then_cosine(nb, max_steps, warmup):
    cfg = nb.TrainConfig(learning_rate=1e-3, min_lr=1e-4, warmup_steps=warmup)
    warmup = min(warmup, max_steps // 10)
    sgd, lr = torch.optim.SGD([torch.zeros(1)], lr=1e-3), torch.optim.lr_scheduler
    schedule = lr.CosineAnnealingLR(sgd, T_max=max_steps - warmup, eta_min=1e-4)
    rates = []
    for _ in range(warmup, max_steps + 1):
        rates.append(schedule.get_last_lr()[0])
        sgd.step()
        schedule.step()
    steps = range(warmup, max_steps + 1)
    assert [nb.get_lr(step, max_steps, cfg) for step in steps] == pytest.approx(rates, rel=1e-6)
    rising = lr.LambdaLR(
        torch.optim.SGD([torch.zeros(1)], lr=1e-3), lambda i: (i + 1) / (warmup + 1)
    )
    for step in range(warmup):
        assert nb.get_lr(step, max_steps, cfg) == pytest.approx(rising.get_last_lr()[0])
        rising.optimizer.step()
        rising.step()


def test_two_steps_of_adamw_equal_its_formula(nb, cpu):
    """Loshchilov and Hutter 2019, with the clipped gradients that the optimizer is given."""
    model = a_model(nb)
    settings = {"beta1": 0.8, "beta2": 0.9, "weight_decay": 0.5, "grad_clip": 0.1}
    run, given = made_of(nb, cpu, model, 4, **settings), []
    (adamw,) = run.optimizers
    adamw.register_step_pre_hook(
        lambda *_: given.append([p.grad.clone() for p in model.parameters()])
    )
    values = [p.detach().clone() for p in model.parameters()]
    moments = [[torch.zeros_like(p), torch.zeros_like(p)] for p in values]
    for t, lr in ((1, 1e-2), (2, 3e-3)):
        _, norm = nb.training_step(run, *windows(4, 16), lr)
        length = torch.cat([g.flatten() for g in given[-1]]).norm().item()
        assert norm > 1 and length == pytest.approx(0.1, rel=1e-4)
        for p, (m, v), g in zip(values, moments, given[-1]):
            m.copy_(0.8 * m + 0.2 * g)
            v.copy_(0.9 * v + 0.1 * g * g)
            p -= lr * (0.5 if p.dim() > 1 else 0.0) * p  # decay apart from the gradient
            p -= lr * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-8)
        torch.testing.assert_close(list(model.parameters()), values, rtol=1e-5, atol=1e-6)


def test_float16_leaves_steps_out_until_its_scale_fits(nb, cpu):
    """The gradients overflow by themselves here, in the 16-bit products of the backward pass."""
    half = nb.Machine(cpu.device, torch.float16, "test")
    assert half.scaler().is_enabled()
    start, model, test_model = (a_model(nb) for _ in range(3))

    def step(learner, scaler, machine):
        sgd = [torch.optim.SGD(learner.parameters())]
        run = made_of(nb, machine, learner, 2, scaler, None, sgd, grad_clip=1.0)
        return nb.training_step(run, *windows(4, 16), 0.1)

    scaler, left_out = torch.amp.GradScaler("cpu", init_scale=2.0**24), 0
    while not math.isfinite((result := step(model, scaler, half))[1]):
        left_out += 1
        assert scaler.get_scale() == 2.0 ** (24 - left_out) and left_out < 30
        assert all(map(torch.equal, model.parameters(), start.parameters()))
    assert left_out
    expected = step(test_model, cpu.scaler(), cpu)
    assert result == pytest.approx(expected, rel=0.02)
    for ours, theirs, before in zip(*(m.parameters() for m in (model, test_model, start))):
        assert (ours - theirs).norm() < 0.05 * (theirs - before).norm()


# Bits per byte.
TEXTS = ["Lily lost her ball.", "A", "Tom saw a naïve fox 🦊. \n\nThe end.", "  two  spaces "]


@pytest.fixture(params=["tokenizer", "gpt2"])
def any_tokenizer(request):
    """Our own tokenizer, then GPT-2's."""
    return request.getfixturevalue(request.param)


def test_bits_per_byte_is_the_sum_over_all_tokens_by_the_bytes_of_the_text(nb, any_tokenizer):
    """End-of-text is predicted like any token, so its bits count; it has no bytes."""
    model = a_model(nb, vocab_size=any_tokenizer.n_vocab, block_size=64)
    eot, in_text, at_ends = any_tokenizer.eot_token, 0.0, 0.0
    for text in TEXTS:
        ids = torch.tensor([eot, *any_tokenizer.encode_ordinary(text), eot])
        with torch.no_grad():
            logp = model(ids[None, :-1])[0][0].double().log_softmax(-1)
        bits = -logp.gather(1, ids[1:, None])[:, 0] / math.log(2)
        in_text, at_ends = in_text + bits[:-1].sum().item(), at_ends + bits[-1].item()
    n_bytes = len("".join(TEXTS).encode())
    measured = nb.bits_per_byte(model, any_tokenizer, TEXTS)
    assert at_ends > 0.01 * in_text  # leaving the ends out would be noticed
    assert measured == pytest.approx((in_text + at_ends) / n_bytes, rel=1e-5)


def test_who_guesses_uniformly_needs_the_logarithm_of_the_vocabulary_per_token(nb, any_tokenizer):
    model = a_model(nb, vocab_size=any_tokenizer.n_vocab, block_size=64)
    torch.nn.init.zeros_(model.lm_head.weight)
    n_tokens = sum(len(any_tokenizer.encode_ordinary(text)) + 1 for text in TEXTS)
    expected = n_tokens * math.log2(any_tokenizer.n_vocab) / len("".join(TEXTS).encode())
    assert nb.bits_per_byte(model, any_tokenizer, TEXTS) == pytest.approx(expected, rel=1e-6)


if __name__ == "__main__":
    notebook, largest = load_notebook(), {}
    for n, length, n_layer, n_head in SIZES:
        for kind in KINDS:
            small = a_model(notebook, n_layer=n_layer, n_head=n_head, **kind)
            for what, value in differences_from_gpt2(small, *windows(n, length)).items():
                largest[f"small, {what}"] = max(value, largest.get(f"small, {what}", 0.0))
    for what, value in differences_from_gpt2(slm(notebook), *windows(1, 128, 50_257)).items():
        largest[f"slm, {what}"] = value
    for tie in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            value = difference_from_neox(notebook, small_data(notebook)[1], Path(folder), tie)
        largest[f"rotations, {'tied' if tie else 'untied'}, gradients"] = value
    for what, value in largest.items():
        print(f"{what:28} {value:.1e}")

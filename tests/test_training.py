"""Optimizer, schedule, one step, measuring, and whole small runs with their interruptions."""

import math
import os
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import made_of, twenty_steps


# The schedule and the groups.
def test_schedule_points(nb):
    cfg = nb.TrainConfig(learning_rate=1.0, min_lr=0.1, warmup_steps=99)
    points = {0: 0.01, 49: 0.5, 98: 0.99, 99: 1.0, 599: 0.55, 1_099: 0.1, 5_000: 0.1}
    for step, rate in points.items():
        assert nb.get_lr(step, 1_099, cfg) == pytest.approx(rate), step
    quarter = 0.1 + 0.45 * (1 + math.cos(math.pi / 4))
    assert nb.get_lr(99 + 250, 1_099, cfg) == pytest.approx(quarter)


@pytest.mark.parametrize("max_steps", [1, 2, 9, 10, 11, 100, 5_000])
def test_the_rate_rises_then_falls_and_stays_between_zero_and_the_top(nb, max_steps):
    cfg = nb.TrainConfig()
    rates = [nb.get_lr(step, max_steps, cfg) for step in range(max_steps)]
    top = rates.index(max(rates))
    assert top <= max_steps // 10 and rates[top] == cfg.learning_rate
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates) > 0 and min(rates[top:]) >= cfg.min_lr


@pytest.mark.parametrize("tie_weights", [True, False])
def test_matrices_decay_and_vectors_do_not(nb, small_model, tie_weights):
    model = small_model(tie_weights=tie_weights)
    decayed, spared = nb.decay_groups(model, 0.25)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.25, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    for p in decayed["params"]:
        assert names.pop(id(p)).endswith("weight") and p.dim() == 2
    for p in spared["params"]:
        assert "ln_" in (name := names.pop(id(p))) or name.endswith("bias")
    assert not names  # each parameter once


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_each_parameter_has_one_optimizer_and_muon_the_matrices_inside(nb, small_model, kind):
    model = small_model()
    optimizers = nb.make_optimizers(model, nb.TrainConfig(optimizer=kind))
    learned = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(learned) == sorted(map(id, model.parameters()))
    assert [type(o).__name__ for o in optimizers] == ["Muon"] * (kind == "muon") + ["AdamW"]
    inside = {id(p) for n, p in model.named_parameters() if ".h." in n and p.dim() == 2}
    if kind == "muon":
        assert {id(p) for g in optimizers[0].param_groups for p in g["params"]} == inside
    for group in optimizers[-1].param_groups:
        assert all((p.dim() > 1) == (group["weight_decay"] > 0) for p in group["params"])


# One step.
def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def a_batch(n=8, seed=0):
    return torch.randint(400, (2, n, 16), generator=torch.Generator().manual_seed(seed))


def one_step(nb, cpu, model, batch_size=8, scaler=None, forward=None, lr=1e-2, n=8, **changes):
    """(loss, norm) of one training_step with plain SGD, whose step is the gradient."""
    sgd = [torch.optim.SGD(model.parameters(), lr=123.0)]
    changes = {"grad_clip": 1e9} | changes
    run = made_of(nb, cpu, model, batch_size, scaler, forward, sgd, **changes)
    return nb.training_step(run, *a_batch(n), lr)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 100])
def test_accumulation_gives_the_step_of_the_whole_batch(nb, cpu, small_model, batch_size):
    whole, parts = small_model(), small_model()
    loss, norm = one_step(nb, cpu, whole)
    assert one_step(nb, cpu, parts, batch_size) == pytest.approx((loss, norm), rel=1e-4)
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=1e-4, atol=1e-5)


def test_a_step_follows_the_plain_gradient_at_the_given_rate(nb, cpu, small_model):
    model, test_model = small_model(), small_model()
    loss = test_model(*a_batch())[1]
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in test_model.parameters()]).norm()
    with torch.no_grad():
        for p in test_model.parameters():
            p -= 0.5 * p.grad / norm
    stepped = one_step(nb, cpu, model, lr=0.5, grad_clip=1.0)
    assert norm > 1.5
    assert stepped == pytest.approx((loss.item(), norm.item()), rel=1e-4)
    torch.testing.assert_close(model.state_dict(), test_model.state_dict(), rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in model.parameters())


def scaler_on_the_cpu():
    return torch.amp.GradScaler("cpu", init_scale=2.0**12)


def test_clipping_sees_the_true_gradient_not_the_scaled_one(nb, cpu, small_model):
    plain, scaled = small_model(), small_model()
    expected = one_step(nb, cpu, plain, grad_clip=1.0)
    result = one_step(nb, cpu, scaled, scaler=scaler_on_the_cpu(), grad_clip=1.0)
    assert result == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(scaled.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-6)


def broken(model):
    """A forward pass that gives a loss which is not a number in its second micro-batch."""
    calls = []

    def forward(x, y, loss_only):
        calls.append(1)
        logits, loss = model(x, y, loss_only=loss_only)
        return logits, loss * (math.nan if len(calls) == 2 else 1.0)

    return forward


def moments(optimizers):
    """All that the optimizers remember, as one dictionary of tensors."""
    return {
        (i, j, name): value.clone()
        for i, optimizer in enumerate(optimizers)
        for j, state in enumerate(optimizer.state.values())
        for name, value in state.items()
        if torch.is_tensor(value)
    }


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_broken_gradient_leaves_weights_and_optimizer_as_they_were(
    nb, cpu, small_model, scaled, kind
):
    model = small_model()
    run = made_of(nb, cpu, model, 4, scaler_on_the_cpu() if scaled else None, optimizer=kind)
    assert math.isfinite(nb.training_step(run, *a_batch(), 1e-2)[1])
    before, remembered = snapshot(model), moments(run.optimizers)
    run.forward = broken(model)
    assert not math.isfinite(nb.training_step(run, *a_batch(), 1e-2)[1])
    assert same(snapshot(model), before) and same(moments(run.optimizers), remembered)
    run.forward = model
    nb.training_step(run, *a_batch(), 1e-2)
    assert not same(snapshot(model), before)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_one_broken_matrix_holds_back_both_optimizers(nb, cpu, small_model, value):
    """float16's scaler judges each optimizer alone; a step must be taken by all or none."""
    model = small_model()
    run = made_of(nb, cpu, model, 4, scaler_on_the_cpu(), optimizer="muon")
    assert len(run.optimizers) == 2
    model.transformer.wpe.weight.register_hook(lambda grad: grad * value)
    before = snapshot(model)
    assert not math.isfinite(nb.training_step(run, *a_batch(), 1e-2)[1])
    assert same(snapshot(model), before)
    assert run.scaler.get_scale() == 2.0**11


def test_a_broken_step_halves_the_scale(nb, cpu, small_model):
    model, scaler = small_model(), scaler_on_the_cpu()
    one_step(nb, cpu, model, batch_size=4, scaler=scaler, forward=broken(model))
    assert scaler.get_scale() == 2.0**11


@pytest.fixture
def make_run(nb, cpu, small_model, tokenizer, tmp_path):
    """`make_run(**training)` makes a fresh run of 8 windows of 16 tokens per step, in one go."""

    def make(**training):
        cfg = nb.TrainConfig(**{"tokens_per_step": 128} | training)
        return nb.Run(tmp_path, small_model(), tokenizer, cfg, cpu, 1)

    return make


@pytest.fixture
def a_run(make_run):
    return make_run()


def test_ten_broken_steps_in_a_row_stop_with_advice(nb, tmp_path, monkeypatch):
    training_step, broken_at = nb.training_step, set(range(9)) | set(range(10, 19))

    def breaks(run, *rest):
        loss, norm = training_step(run, *rest)
        return loss, math.inf if run.step in broken_at else norm

    monkeypatch.setattr(nb, "training_step", breaks)
    assert twenty_steps(nb, tmp_path / "a").step == 20  # a good one starts the count again
    broken_at.add(9)
    with pytest.raises(nb.UserError, match="learning_rate"):
        twenty_steps(nb, tmp_path / "b")


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("MPS backend out of memory (MPS allocated: 3.57 GB)"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
]


def hungry(run, most: int, error: Exception):
    """Let the run's model fail on more than `most` windows."""
    forward = run.model.forward

    def limited(x, *rest, **options):
        if len(x) > most:
            raise error
        return forward(x, *rest, **options)

    run.model.forward = limited


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_short_memory_halves_the_micro_batch_and_changes_nothing(
    nb, cpu, a_run, small_model, error
):
    whole = made_of(nb, cpu, small_model(), 8)
    hungry(a_run, 2, error)
    loss, norm = nb.step_with_oom_retry(a_run, *a_batch(), 1e-3)
    assert a_run.batch_size == 2
    assert nb.training_step(whole, *a_batch(), 1e-3) == pytest.approx((loss, norm), rel=1e-4)
    hungry(a_run, 0, error)
    with pytest.raises(nb.UserError, match="block_size"):
        nb.step_with_oom_retry(a_run, *a_batch(), 1e-3)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_the_micro_batch_that_fits_is_found_before_anything_is_announced(
    nb, make_run, stream, capsys, error
):
    run = make_run(tokens_per_step=16 * 36, batch_size=30)
    assert run.batch_size == 30
    hungry(run, 5, error)
    run.cfg.compile = False
    text = nb.plan_run(run, stream, stream)
    assert run.batch_size == 3 and "Out of memory" in capsys.readouterr().out
    assert "tokens/s" in text


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_measuring_with_little_memory_gives_the_same_figure(nb, a_run, stream, tokenizer, error):
    expected = nb.evaluate(a_run.model, stream[:2_000], tokenizer)
    hungry(a_run, 5, error)
    assert nb.evaluate(a_run.model, stream[:2_000], tokenizer) == pytest.approx(expected)
    hungry(a_run, 0, error)
    with pytest.raises(RuntimeError):
        nb.evaluate(a_run.model, stream[:2_000], tokenizer)


def test_any_other_error_is_not_taken_for_short_memory(nb, a_run):
    hungry(a_run, 2, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        nb.step_with_oom_retry(a_run, *a_batch(), 1e-3)
    assert a_run.batch_size == 8


# Measuring.
def test_each_token_is_scored_once_with_half_a_window_before_it(nb):
    lengths = [1, 2, 7, 8, 9, 15, 16, 17, 24, 40, 100]
    text = np.concatenate([[*range(10, 10 + n - 1), 0] for n in lengths]).astype(np.uint16)
    scored = []
    for x, y, skip in nb.story_windows(text, 0, 8):
        assert 0 < len(x) == len(y) <= 8 and (x[1:] == y[:-1]).all()
        assert skip == 0 or skip >= 4
        assert x[0] == 0 or skip >= 4  # begins with the story, or is an overlapping window
        scored += y[skip:].tolist()
    assert scored == text.tolist()


def test_an_unfinished_story_at_the_end_is_scored_too(nb):
    windows = list(nb.story_windows(np.array([5, 6, 0, 7, 8], np.uint16), 0, 8))
    assert [y.tolist() for _, y, _ in windows] == [[5, 6, 0], [7, 8]]


@pytest.mark.parametrize("n, expected", [(1, 1), (4, 4), (5, 5), (7, 5), (8, 8), (99, 10)])
def test_the_first_tokens_are_whole_stories_or_a_part_of_the_first(nb, n, expected):
    text = np.array([5, 5, 5, 5, 0, 6, 6, 0, 7, 0], np.uint16)
    assert nb.first_tokens(text, 0, n).tolist() == text[:expected].tolist()


@pytest.mark.parametrize("rope", [False, True])
def test_evaluate_and_bits_per_byte_equal_a_direct_computation(nb, small_model, tokenizer, rope):
    texts = ["Lily lost her ball.", "Tom was sad. 🦊", "A", "The end of a story\n\nabout bees."]
    model = small_model(block_size=64, rope=rope).train()
    nats, n = 0.0, 0
    for text in texts:
        ids = [tokenizer.eot_token, *tokenizer.encode_ordinary(text), tokenizer.eot_token]
        with torch.no_grad():
            logp = model(torch.tensor([ids[:-1]]))[0][0].log_softmax(-1)
        nats -= sum(logp[i, token].item() for i, token in enumerate(ids[1:]))
        n += len(ids) - 1
    n_bytes = sum(len(text.encode()) for text in texts)
    result = nb.evaluate(model, nb.encode_stories(texts, tokenizer), tokenizer)
    assert (result["tokens"], result["bytes"]) == (n, n_bytes)
    assert result["loss"] == pytest.approx(nats / n, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(nats / n), rel=1e-4)
    bits = nats / math.log(2) / n_bytes
    assert result["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert nb.bits_per_byte(model, tokenizer, texts) == pytest.approx(bits, rel=1e-5)


def test_long_stories_are_scored_window_by_window(nb, small_model, tokenizer, stories):
    model, text = small_model(), nb.encode_stories(stories[:3], tokenizer)
    expected = []
    for x, y, skip in nb.story_windows(text, tokenizer.eot_token, 16):
        logits = model(torch.from_numpy(x)[None])[0][0, skip:]
        expected += F.cross_entropy(logits, torch.from_numpy(y)[skip:], reduction="none").tolist()
    assert len(expected) == len(text)
    result = nb.evaluate(model, text, tokenizer)
    assert result["loss"] == pytest.approx(np.mean(expected), rel=1e-5)


def test_measuring_switches_dropout_off_and_the_mode_back(nb, small_model, tokenizer, stories):
    model, text = small_model(dropout=0.5), nb.encode_stories(stories[:2], tokenizer)
    for training in (True, False):
        model.train(training)
        assert nb.evaluate(model, text, tokenizer) == nb.evaluate(model, text, tokenizer)
        assert model.training == training


def test_measuring_nothing_is_refused(nb, small_model, tokenizer):
    with pytest.raises(nb.UserError, match="no text"):
        nb.evaluate(small_model(), np.array([], np.uint16), tokenizer)


def test_baselines_equal_a_plain_count(nb):
    train = np.array([0, 1, 2, 1, 2, 0, 1, 1] * 3, np.uint16)
    val, V = np.array([0, 1, 2, 2, 1], np.uint16), 4
    nats = {"unigram": 0.0, "bigram": 0.0}
    for a, b in zip(val[:-1], val[1:]):
        one = (np.sum(train == b) + 1) / (len(train) + V)
        follows = sum(x == a and y == b for x, y in zip(train, train[1:]))
        two = (follows + 20 * one) / (np.sum(train == a) + 20)
        nats["unigram"] -= math.log(one) / 4
        nats["bigram"] -= math.log(two) / 4
    expected = {"uniform": math.log(V)} | nats
    assert nb.count_baselines(train, val, V) == pytest.approx(expected)


def test_the_longest_copied_run_equals_a_search_by_hand(nb):
    tokens = np.random.default_rng(0).integers(0, 4, 400) * 257  # equal bytes: false matches lurk
    places = {tuple(tokens[i : i + n]) for n in range(1, 30) for i in range(401 - n)}
    for seed in range(1, 6):
        ids = np.random.default_rng(seed).integers(0, 4, 30) * 257
        runs = [ids[i:j] for i in range(30) for j in range(i + 1, 31) if tuple(ids[i:j]) in places]
        length, where = nb.longest_copied(ids, tokens.astype(np.uint16))
        assert length == max(map(len, runs))
        assert tuple(ids[where : where + length]) in places


# The budget.
@pytest.fixture
def steps_of_half_a_second(nb, monkeypatch):
    monkeypatch.setattr(nb, "seconds_per_step", lambda *_: 0.5)


@pytest.mark.parametrize("done, seconds", [(0, 0.0), (400, 240.0)])
def test_minutes_become_steps_by_the_measured_speed(
    nb, make_run, stream, done, seconds, steps_of_half_a_second
):
    run = make_run(minutes=10.0)
    run.step, run.seconds = done, seconds
    text = nb.plan_run(run, stream, stream)
    assert run.max_steps == done + int((600 - seconds) / 0.5 * 0.96)
    assert f"{run.max_steps:,} steps" in text and f"{done:,} done" in text


def test_steps_are_exact_and_decide_over_minutes(nb, make_run, stream):
    run = make_run(minutes=1.0, max_steps=777)
    nb.plan_run(run, stream, stream)
    assert run.max_steps == 777 and run.eval_every == 39


def test_measuring_is_planned_to_cost_two_percent(nb, make_run, stream):
    run = make_run(max_steps=1_000, tokens_per_step=256)
    nb.plan_run(run, stream, stream)
    measured = run.max_steps / run.eval_every * run.eval_tokens
    assert measured / 3 / (1_000 * 256) == pytest.approx(0.02, rel=0.01)  # forward is a third
    nb.plan_run(run, stream, stream[:99])
    assert run.eval_tokens == 99


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_measuring_the_speed_changes_nothing(nb, make_run, stream, kind):
    run = make_run(batch_size=2, optimizer=kind)
    before = snapshot(run.model)
    nb.seconds_per_step(run, stream)
    assert same(snapshot(run.model), before) and not moments(run.optimizers)
    assert all(p.grad is None for p in run.model.parameters())


def test_the_speed_is_measured_on_two_micro_batches(nb, make_run, stream, monkeypatch):
    """Four micro-batches of 3 s, and for each two 0.5 s to clip and to move."""
    run, now = make_run(batch_size=2), [0.0]

    def slow(seconds, function):
        def slower(*given, **named):
            now[0] += seconds
            return function(*given, **named)

        return slower

    run.forward = slow(3.0, run.model)
    monkeypatch.setattr(nb, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(nb, "training_step", slow(0.5, nb.training_step))
    assert nb.seconds_per_step(run, stream) == pytest.approx(13.0)


@pytest.mark.parametrize(
    "budget, hint",
    [({"minutes": 1.0}, "MINUTES = 44 "), ({"max_steps": 50}, "MAX_STEPS = 5000.")],
)
def test_a_plan_for_too_few_tokens_says_so_and_what_would_do(
    nb, make_run, stream, budget, hint, steps_of_half_a_second
):
    text = nb.plan_run(make_run(**budget), stream, stream, enough=640_000)
    assert "TOO LITTLE" in text and "0.6 M tokens" in text and hint in text
    assert "TOO LITTLE" not in nb.plan_run(make_run(**budget), stream, stream, enough=6_000)


def test_a_finished_run_is_finished_until_its_budget_is_raised(
    nb, tmp_path, monkeypatch, stream, steps_of_half_a_second
):
    def reopened(**budget):
        run = twenty_steps(nb, tmp_path / "run", training=budget, stop_at=1)
        assert run.step == 20
        return run

    minutes = {"max_steps": None, "minutes": 1.0}
    run = twenty_steps(nb, tmp_path / "run")
    run.budget, run.seconds = ["minutes", 1.0], 50.0  # it ended a little early
    run.save("last.pt")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    with monkeypatch.context() as patch:
        patch.delattr(nb, "get_ready")  # neither compiled nor measured
        for budget in (minutes, {"max_steps": 20}, {"max_steps": 7}):
            run = reopened(**budget)
            assert "This run is complete: 20 steps" in nb.plan_run(run, stream, stream)
            nb.train(run, stream, stream)
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    for budget in ({"max_steps": None, "minutes": 2.0}, {"max_steps": 40}):
        run = reopened(**budget)
        nb.plan_run(run, stream, stream)
        assert run.max_steps > 20


# Runs.
def weights(run):
    return run.model.state_dict()


@pytest.fixture(scope="module")
def in_one_go(nb, tmp_path_factory):
    """A run of 20 undisturbed steps."""
    return twenty_steps(nb, tmp_path_factory.mktemp("one") / "run")


def test_twenty_steps_learn(in_one_go):
    losses = [e["loss"] for e in in_one_go.evaluations]
    assert [e["step"] for e in in_one_go.evaluations] == [0, 10, 20] and len(in_one_go.steps) == 20
    assert losses[2] < losses[1] < losses[0]


def test_another_seed_gives_other_weights(nb, in_one_go, tmp_path):
    assert not same(weights(twenty_steps(nb, tmp_path / "run", seed=2)), weights(in_one_go))


def test_ten_steps_reload_ten_steps_equal_twenty(nb, in_one_go, tmp_path):
    assert twenty_steps(nb, tmp_path / "run", stop_at=10).step == 10
    resumed = twenty_steps(nb, tmp_path / "run")
    assert same(weights(resumed), weights(in_one_go))
    assert [s[:3] for s in resumed.steps] == [s[:3] for s in in_one_go.steps]


def test_ten_and_ten_equal_twenty_with_muon_and_rotations_too(nb, tmp_path):
    parts = {"training": {"optimizer": "muon"}, "rope": True, "tie_weights": False}
    whole = twenty_steps(nb, tmp_path / "a", **parts)
    twenty_steps(nb, tmp_path / "b", stop_at=10, **parts)
    resumed = twenty_steps(nb, tmp_path / "b", **parts)
    assert same(weights(resumed), weights(whole))
    assert same(moments(resumed.optimizers), moments(whole.optimizers))


KILLED_BEFORE_STEP_14 = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from conftest import load_notebook, twenty_steps

nb = load_notebook()
get_batch = nb.get_batch

def deadly(tokens, batch_size, block_size, seed, step, *more):
    if step == 13:
        os.kill(os.getpid(), signal.SIGKILL)
    return get_batch(tokens, batch_size, block_size, seed, step, *more)

nb.get_batch = deadly
twenty_steps(nb, Path(sys.argv[2]))
"""


def test_ten_steps_a_kill_and_ten_more_equal_twenty(nb, in_one_go, tmp_path):
    """A process dies by SIGKILL three steps after its save; another goes on from the save."""
    command = [sys.executable, "-c", KILLED_BEFORE_STEP_14]
    command += [str(Path(__file__).parent), str(tmp_path / "run")]
    died = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert nb.load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 10
    resumed = twenty_steps(nb, tmp_path / "run")
    assert same(weights(resumed), weights(in_one_go))
    assert same(moments(resumed.optimizers), moments(in_one_go.optimizers))


def at_step(nb, monkeypatch, step, act):
    """Have `act` happen just before the given optimizer step."""
    get_batch = nb.get_batch

    def watched(tokens, batch_size, block_size, seed, now, *more):
        if now == step:
            act()
        return get_batch(tokens, batch_size, block_size, seed, now, *more)

    monkeypatch.setattr(nb, "get_batch", watched)


def test_an_interrupt_ends_the_step_saves_and_loses_nothing(nb, in_one_go, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(nb, patch, 6, lambda: os.kill(os.getpid(), signal.SIGINT))
        stopped = twenty_steps(nb, tmp_path / "run")
    assert stopped.step == 7 and (tmp_path / "run" / "best_model_params.pt").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert same(weights(twenty_steps(nb, tmp_path / "run")), weights(in_one_go))


def test_an_interrupt_says_so_and_a_second_one_stops_at_once(nb, capsys):
    with pytest.raises(KeyboardInterrupt), nb.GracefulInterrupt() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked and "Stopping" in capsys.readouterr().out
        os.kill(os.getpid(), signal.SIGINT)


def test_a_run_that_diverges_stops_and_keeps_the_last_good_checkpoint(nb, tmp_path, monkeypatch):
    get_lr = nb.get_lr
    monkeypatch.setattr(nb, "get_lr", lambda step, *_: 1e38 if step >= 11 else get_lr(step, *_))
    with pytest.raises(nb.UserError, match="not finite"):
        twenty_steps(nb, tmp_path / "run")
    for name in ("last.pt", "best_model_params.pt"):
        checkpoint = nb.load_checkpoint(tmp_path / "run" / name)
        assert checkpoint["metrics"]["step"] == 10
        assert all(value.isfinite().all() for value in checkpoint["model"].values())


def test_a_finished_run_trains_no_further(nb, in_one_go):
    again = twenty_steps(nb, in_one_go.folder)
    assert again.step == 20 and same(weights(again), weights(in_one_go))
    assert len(again.evaluations) == 3


def other_runs(nb):
    """Changes to a run: (to the model, to the training, to the seed, to the text)."""
    for change in ({"n_layer": 3}, {"rope": True}, {"dropout": 0.2}, {"bias": False}):
        yield change, {}, 1, "text"
    for change in (
        {"learning_rate": 2e-3},
        {"min_lr": 0.0},
        {"weight_decay": 0.0},
        {"tokens_per_step": 512},
        {"warmup_steps": 9},
        {"beta2": 0.99},
        {"grad_clip": 2.0},
        {"optimizer": "muon"},
    ):
        yield {}, change, 1, "text"
    yield {}, {}, 2, "text"
    yield {}, {}, 1, "another text"


def test_any_setting_that_shapes_the_run_makes_another_run(nb, in_one_go, tokenizer, stories):
    def name(shape, training, seed, text, tokenizer=tokenizer):
        config = nb.dataclasses.replace(in_one_go.model.config, **shape)
        cfg = nb.dataclasses.replace(in_one_go.cfg, **training)
        return nb.fingerprint(nb.identity_of(config, cfg, tokenizer, seed, text))

    here = name({}, {}, 1, "text")
    others = [name(*change) for change in other_runs(nb)]
    others.append(name({}, {}, 1, "text", nb.train_bpe(stories[50:], 400)))
    assert len({here, *others}) == len(others) + 1
    machine = {"minutes": 5.0, "max_steps": 21, "evaluations": 3, "save_minutes": 1.0}
    machine |= {"compile": False, "batch_size": 2, "precision": "float32"}
    assert name({}, machine, 1, "text") == here


def test_another_run_in_the_folder_is_refused(nb, in_one_go, tokenizer, cpu):
    config, before = in_one_go.model.config, (in_one_go.folder / "last.pt").read_bytes()
    for seed, text in ((7, ""), (1, "another text")):
        with pytest.raises(nb.UserError, match="last.pt is another run's"):
            nb.open_run(in_one_go.folder, config, in_one_go.cfg, tokenizer, cpu, seed, text)
    assert (in_one_go.folder / "last.pt").read_bytes() == before


def test_resume_false_starts_again_and_keeps_the_old_run(nb, tokenizer, cpu, tmp_path, monkeypatch):
    old = twenty_steps(nb, tmp_path / "run", stop_at=2)
    parts = (old.model.config, old.cfg, tokenizer, cpu, 1)
    for now in ("yesterday", "today"):
        monkeypatch.setattr(nb.time, "strftime", lambda _, now=now: now)
        assert nb.open_run(tmp_path / "run", *parts, resume=False).step == 0
        assert nb.load_checkpoint(tmp_path / f"run-until-{now}" / "last.pt")["step"] == 2
        assert not (tmp_path / "run").exists()
        twenty_steps(nb, tmp_path / "run", stop_at=2)


# Compiling.
def test_a_failing_compiler_is_one_line_and_the_plain_model(
    nb, make_run, stream, monkeypatch, capsys
):
    def fail(model):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(nb.torch, "compile", fail)
    for wish in (True, None):
        run = make_run(compile=wish)
        nb.get_ready(run, stream)
        assert run.forward is run.model
    assert capsys.readouterr().out.count("torch.compile fails here") == 1


def test_short_memory_while_compiling_halves_and_keeps_the_compiler(
    nb, make_run, stream, monkeypatch, capsys
):
    def compile_(model):
        def compiled(x, y, loss_only):
            if len(x) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return model(x, y, loss_only=loss_only)

        return compiled

    monkeypatch.setattr(nb.torch, "compile", compile_)
    run = make_run(compile=True)
    nb.get_ready(run, stream)
    assert run.forward is not run.model and run.batch_size == 2
    assert "fails" not in capsys.readouterr().out
    assert all(p.grad is None for p in run.model.parameters())


def test_the_weakest_of_several_processes_decides(nb, make_run, stream, monkeypatch):
    """The other process has memory for two windows, and takes nine seconds."""
    monkeypatch.setattr(nb, "WORLD", 2)
    monkeypatch.setattr(nb.torch, "compile", lambda model: lambda *args, **kw: model(*args, **kw))
    monkeypatch.setattr(nb.nn.parallel, "DistributedDataParallel", lambda forward: forward)
    other = {int: 2, float: 9.0}
    monkeypatch.setattr(nb, "gather_from_ranks", lambda value: [value, other[type(value)]])
    run = make_run(compile=True)
    assert run.batch_size > 2 and nb.get_ready(run, stream) == 9.0
    assert run.batch_size == 2


@pytest.mark.parametrize(
    "budget, wanted",
    [
        ({"minutes": 60.0}, True),
        ({"minutes": 4.0}, False),
        ({"minutes": 60.0, "max_steps": 900}, False),
        ({"minutes": 1.0, "max_steps": 1_000}, True),
    ],
)
def test_a_gpu_compiles_where_the_budget_that_decides_is_long(nb, monkeypatch, budget, wanted):
    monkeypatch.setattr(nb, "seconds_per_step", lambda *_: 1.0)
    monkeypatch.setattr(torch, "compile", lambda model: "compiled")
    gpu = nb.Machine(torch.device("cuda"), torch.bfloat16, "test")
    run = types.SimpleNamespace(cfg=nb.TrainConfig(**budget), machine=gpu, model=None, forward=None)
    assert nb.get_ready(run, None) == 1.0 and (run.forward == "compiled") == wanted


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("gcc"), reason="no compiler at hand")
def test_a_real_compiler_learns_what_the_plain_model_learns(nb, tmp_path, stream, monkeypatch):
    """With dropout off: compiled code draws other random numbers."""
    plain = twenty_steps(nb, tmp_path / "plain", dropout=0.0)
    open_run = nb.open_run

    def compiled(*parts, **options):
        run = open_run(*parts, **options)
        nb.get_ready(run, stream)
        assert run.forward is not run.model
        return run

    monkeypatch.setattr(nb, "open_run", compiled)
    run = twenty_steps(nb, tmp_path / "compiled", dropout=0.0, training={"compile": True})
    torch.testing.assert_close(weights(run), weights(plain), rtol=1e-3, atol=1e-4)
    assert [s[0] for s in run.steps] == pytest.approx([s[0] for s in plain.steps], rel=1e-4)


# What Step 10 shows.
def test_the_live_curve_prints_the_step_the_losses_and_the_story(
    nb, in_one_go, monkeypatch, capsys
):
    monkeypatch.setattr(nb, "IN_NOTEBOOK", False)
    nb.live_curve(in_one_go)
    said, latest = capsys.readouterr(), in_one_go.evaluations[-1]
    assert f"step 20 of 20: validation loss {latest['loss']:.3f}" in said.out
    assert latest["story"].split()[0] in said.out and not said.err

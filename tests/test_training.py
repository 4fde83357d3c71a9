"""Optimizer, schedule, one step, measuring, and whole small runs with their interruptions."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import twenty_steps


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


def test_without_muon_adamw_takes_over_with_a_notice(nb, small_model, monkeypatch, capsys):
    monkeypatch.delattr(nb.torch.optim, "Muon")
    optimizers = nb.make_optimizers(small_model(), nb.TrainConfig(optimizer="muon"))
    assert [type(o).__name__ for o in optimizers] == ["AdamW"]
    assert "Muon needs" in capsys.readouterr().out


# One step.
def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def a_batch(n=8, seed=0):
    return torch.randint(400, (2, n, 16), generator=torch.Generator().manual_seed(seed))


def one_step(nb, cpu, model, batch_size=8, scaler=None, forward=None, lr=1e-2, n=8, **changes):
    """(loss, norm, stepped) of one training_step with plain SGD, whose step is the gradient."""
    optimizer = torch.optim.SGD(model.parameters(), lr=123.0)
    cfg = nb.TrainConfig(**{"grad_clip": 1e9} | changes)
    parts = (forward or model, model, [optimizer], scaler or cpu.scaler(), *a_batch(n))
    return nb.training_step(*parts, lr, cfg, cpu, batch_size)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 7, 100])
def test_accumulation_gives_the_step_of_the_whole_batch(nb, cpu, small_model, batch_size):
    whole, parts = small_model(), small_model()
    loss, norm, _ = one_step(nb, cpu, whole)
    assert one_step(nb, cpu, parts, batch_size)[:2] == pytest.approx((loss, norm), rel=1e-4)
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=1e-4, atol=1e-5)


def test_a_step_follows_the_plain_gradient_at_the_given_rate(nb, cpu, small_model):
    model, twin = small_model(), small_model()
    loss = twin(*a_batch())[1]
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in twin.parameters()]).norm()
    with torch.no_grad():
        for p in twin.parameters():
            p -= 0.5 * p.grad / norm
    stepped = one_step(nb, cpu, model, lr=0.5, grad_clip=1.0)
    assert norm > 1.5 and stepped[2]
    assert stepped[:2] == pytest.approx((loss.item(), norm.item()), rel=1e-4)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-4, atol=1e-5)
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
    optimizers = nb.make_optimizers(model, nb.TrainConfig(optimizer=kind))
    scaler = scaler_on_the_cpu() if scaled else cpu.scaler()
    rest = (*a_batch(), 1e-2, nb.TrainConfig(), cpu, 4)
    assert nb.training_step(model, model, optimizers, scaler, *rest)[2]
    before, remembered = snapshot(model), moments(optimizers)
    _, norm, stepped = nb.training_step(broken(model), model, optimizers, scaler, *rest)
    assert not stepped and not math.isfinite(norm)
    assert same(snapshot(model), before) and same(moments(optimizers), remembered)
    assert nb.training_step(model, model, optimizers, scaler, *rest)[2]
    assert not same(snapshot(model), before)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_one_broken_matrix_holds_back_both_optimizers(nb, cpu, small_model, value):
    """float16's scaler judges each optimizer alone; a step must be taken by all or none."""
    model = small_model()
    optimizers = nb.make_optimizers(model, nb.TrainConfig(optimizer="muon"))
    assert len(optimizers) == 2
    model.transformer.wpe.weight.register_hook(lambda grad: grad * value)
    before, scaler = snapshot(model), scaler_on_the_cpu()
    rest = (scaler, *a_batch(), 1e-2, nb.TrainConfig(), cpu, 4)
    assert not nb.training_step(model, model, optimizers, *rest)[2]
    assert same(snapshot(model), before)
    assert scaler.get_scale() == 2.0**11


def test_a_broken_step_halves_the_scale(nb, cpu, small_model):
    model, scaler = small_model(), scaler_on_the_cpu()
    one_step(nb, cpu, model, batch_size=4, scaler=scaler, forward=broken(model))
    assert scaler.get_scale() == 2.0**11


@pytest.fixture
def a_run(nb, cpu, small_model, tmp_path):
    model = small_model()
    run = nb.Run(tmp_path, model, nb.make_optimizers(model, nb.TrainConfig()), cpu.scaler(), 1)
    run.batch_size = 8
    return run


def test_ten_broken_steps_in_a_row_stop_with_advice(nb, cpu, a_run):
    def step(forward):
        return nb.careful_step(a_run, forward, *a_batch(), 1e-3, nb.TrainConfig(), cpu)

    def never(x, y, loss_only):
        return None, a_run.model(x, y, loss_only=True)[1] * math.inf

    for forward in [never] * 9 + [a_run.model] + [never] * 9:  # a good one starts the count again
        step(forward)
    with pytest.raises(nb.UserError, match="learning_rate"):
        step(never)


def test_short_memory_halves_the_micro_batch_and_changes_nothing(nb, cpu, a_run, small_model):
    def forward(x, y, loss_only):
        if len(x) > 2:
            raise torch.OutOfMemoryError("test")
        return a_run.model(x, y, loss_only=loss_only)

    cfg, twin = nb.TrainConfig(), small_model()
    loss, norm = nb.careful_step(a_run, forward, *a_batch(), 1e-3, cfg, cpu)
    assert a_run.batch_size == 2
    rest = (nb.make_optimizers(twin, cfg), cpu.scaler(), *a_batch(), 1e-3, cfg, cpu, 8)
    assert nb.training_step(twin, twin, *rest)[:2] == pytest.approx((loss, norm), rel=1e-4)


def test_memory_for_not_even_one_window_is_a_plain_sentence(nb, cpu, a_run):
    def forward(x, y, loss_only):
        raise torch.OutOfMemoryError("test")

    with pytest.raises(nb.UserError, match="block_size"):
        nb.careful_step(a_run, forward, *a_batch(), 1e-3, nb.TrainConfig(), cpu)


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


def test_an_unfinished_story_at_the_end_is_not_scored(nb):
    windows = list(nb.story_windows(np.array([5, 6, 0, 7, 8], np.uint16), 0, 8))
    assert [y.tolist() for _, y, _ in windows] == [[5, 6, 0]]


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
    result = nb.evaluate(model, nb.ribbon_of(texts, tokenizer), tokenizer)
    assert (result["tokens"], result["bytes"]) == (n, n_bytes)
    assert result["loss"] == pytest.approx(nats / n, rel=1e-5)
    assert result["perplexity"] == pytest.approx(math.exp(nats / n), rel=1e-4)
    bits = nats / math.log(2) / n_bytes
    assert result["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert nb.bits_per_byte(model, tokenizer, texts) == pytest.approx(bits, rel=1e-5)


def test_long_stories_are_scored_window_by_window(nb, small_model, tokenizer, stories):
    model, text = small_model(), nb.ribbon_of(stories[:3], tokenizer)
    expected = []
    for x, y, skip in nb.story_windows(text, tokenizer.eot_token, 16):
        logits = model(torch.from_numpy(x)[None])[0][0, skip:]
        expected += F.cross_entropy(logits, torch.from_numpy(y)[skip:], reduction="none").tolist()
    assert len(expected) == len(text)
    result = nb.evaluate(model, text, tokenizer)
    assert result["loss"] == pytest.approx(np.mean(expected), rel=1e-5)


def test_measuring_switches_dropout_off_and_the_mode_back(nb, small_model, tokenizer, stories):
    model, text = small_model(dropout=0.5), nb.ribbon_of(stories[:2], tokenizer)
    for training in (True, False):
        model.train(training)
        assert nb.evaluate(model, text, tokenizer) == nb.evaluate(model, text, tokenizer)
        assert model.training == training


def test_measuring_nothing_is_refused(nb, small_model, tokenizer):
    with pytest.raises(nb.UserError, match="no whole story"):
        nb.evaluate(small_model(), np.array([3, 4, 5], np.uint16), tokenizer)


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
@pytest.mark.parametrize("done, seconds", [(0, 0.0), (400, 240.0)])
def test_minutes_become_steps_by_the_measured_speed(
    nb, cpu, a_run, ribbon, done, seconds, monkeypatch
):
    meta = {"stories": 300, "tokens": len(ribbon)}
    monkeypatch.setattr(nb, "seconds_per_step", lambda *_: 0.5)
    a_run.step, a_run.seconds = done, seconds
    text = nb.plan_run(a_run, ribbon, meta, nb.TrainConfig(minutes=10.0), cpu)
    assert a_run.max_steps == done + int((600 - seconds) / 0.5 * 0.96)
    assert f"{a_run.max_steps:,} steps" in text and f"{done:,} done" in text


def test_steps_are_exact_and_decide_over_minutes(nb, cpu, a_run, ribbon):
    meta = {"stories": 300, "tokens": len(ribbon)}
    cfg = nb.TrainConfig(minutes=1.0, max_steps=777, tokens_per_step=256)
    nb.plan_run(a_run, ribbon, meta, cfg, cpu)
    assert a_run.max_steps == 777 and a_run.eval_every == 39


def test_measuring_is_planned_to_cost_under_five_percent(nb, cpu, a_run, ribbon):
    meta = {"stories": 20_000, "tokens": 4_000_000}
    cfg = nb.TrainConfig(max_steps=10_000, tokens_per_step=4_096)
    nb.plan_run(a_run, ribbon, meta, cfg, cpu)
    measured = a_run.max_steps / a_run.eval_every * a_run.eval_stories * 200
    assert 0.001 < measured / 3 / (10_000 * 4_096) < 0.05  # forward alone is a third


def test_measuring_the_speed_changes_no_weight(nb, cpu, a_run, ribbon):
    before = [p.detach().clone() for p in a_run.model.parameters()]
    nb.seconds_per_step(a_run, ribbon, nb.TrainConfig(tokens_per_step=128, batch_size=2), cpu)
    assert all(map(torch.equal, before, a_run.model.parameters()))
    assert all(p.grad is None for p in a_run.model.parameters()) and not moments(a_run.optimizers)


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
    assert losses[2] < losses[1] < losses[0] and in_one_go.best_loss == losses[2]


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
    with pytest.raises(nb.UserError, match="another optimizer"):
        twenty_steps(nb, tmp_path / "b", **parts | {"training": {}})


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


def test_a_second_interrupt_stops_at_once(nb):
    with pytest.raises(KeyboardInterrupt), nb.PoliteStop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
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


def test_resuming_another_model_or_tokenizer_is_refused(nb, in_one_go, tokenizer, stories, cpu):
    cfg, config = nb.TrainConfig(max_steps=20), in_one_go.model.config
    other = nb.dataclasses.replace(config, n_layer=3)
    with pytest.raises(nb.UserError, match="n_layer = 2 there, 3 here"):
        nb.open_run(in_one_go.folder, other, cfg, tokenizer, cpu, 1)
    foreign = nb.train_bpe(stories[50:], 400)
    with pytest.raises(nb.UserError, match="another tokenizer"):
        nb.open_run(in_one_go.folder, config, cfg, foreign, cpu, 1)


def test_resume_false_starts_again_and_keeps_the_old_run(nb, tokenizer, cpu, tmp_path):
    old = twenty_steps(nb, tmp_path / "run", stop_at=2)
    for n in (1, 2):
        parts = (old.model.config, nb.TrainConfig(), tokenizer, cpu, 1)
        fresh = nb.open_run(tmp_path / "run", *parts, resume=False)
        assert fresh.step == 0 and not (tmp_path / "run" / "last.pt").exists()
        assert (tmp_path / f"run-old{n}").is_dir()
        fresh.folder.mkdir()
    assert (tmp_path / "run-old1" / "last.pt").exists()


def test_history_is_written_beside_the_weights(nb, in_one_go):
    history = nb.json.loads((in_one_go.folder / "history.json").read_text())
    assert len(history["steps"]) == 20
    assert [e["step"] for e in history["evaluations"]] == [0, 10, 20]
    assert all(e["story"].startswith("Once") for e in history["evaluations"])


def test_a_failing_compiler_is_one_line_and_the_plain_model(nb, cpu, a_run, ribbon, monkeypatch):
    def fail(model):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(nb.torch, "compile", fail)
    cfg = nb.TrainConfig(compile=True)
    assert nb.ready_forward(a_run.model, cfg, cpu, ribbon, 2) is a_run.model
    assert nb.ready_forward(a_run.model, nb.TrainConfig(), cpu, ribbon, 2) is a_run.model

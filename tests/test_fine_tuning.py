"""Training that starts from given weights."""

import re

import pytest
import torch
from conftest import DEFAULTS, small_data
from test_notebook import ENDING, run_script, script  # noqa: F401

SHAPE = {"block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32, "dropout": 0.1}


def write_weights(nb, path, **changes):
    """(path, model) of a checkpoint with random weights and the tokenizer of `small_data`."""
    tokenizer = small_data(nb)[1]
    torch.manual_seed(3)
    model = nb.GPT(nb.GPTConfig(vocab_size=tokenizer.n_vocab, **SHAPE | changes))
    nb.save_checkpoint(path, model, tokenizer, {"step": 5})
    return path, model.eval()


@pytest.fixture
def given(nb, tmp_path):
    """`given(**changes)` is a checkpoint of that shape, as the notebook reads it."""
    return lambda **changes: nb.load_checkpoint(write_weights(nb, tmp_path / "a.pt", **changes)[0])


def resolved(nb, checkpoint, **settings):
    """What a run that starts from the checkpoint resolves these settings to."""
    settings = nb.read_settings(DEFAULTS | settings, {})
    return nb.resolve(nb.start_from(checkpoint, settings, cuda=False), cuda=False)


def opened(nb, folder, checkpoint, cpu, **model):
    """A run that starts from the checkpoint, with changes to its shape."""
    _, _, config, cfg = resolved(nb, checkpoint, MODEL=model, MAX_STEPS=4)
    tokenizer = small_data(nb)[1]
    run = nb.open_run(folder, config, cfg, tokenizer, cpu, 1, given=checkpoint)
    run.max_steps, run.eval_every, run.eval_tokens = 4, 2, 500
    return run


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"MODEL": {"n_layer": 3}}, "n_layer = 2, not 3"),
        ({"MODEL": {"vocab_size": 512}}, "vocab_size = 400, not 512"),
        ({"MODEL": {"rope": True}}, "rope = False, not True"),
        ({"MODEL": {"block_size": 64}}, "block_size = 32, not 64"),
        ({"MODEL": {"n_experts": 4}}, "n_experts"),
        ({"TRAINING": {"learning_rate": 2.0}}, "learning rate"),
    ],
)
def test_what_contradicts_the_weights_is_refused_in_one_sentence(nb, given, settings, named):
    with pytest.raises(nb.UserError) as caught:
        resolved(nb, given(), **settings)
    assert named in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize("preset", ["laptop", "slm"])
def test_the_shape_is_the_weights_and_training_is_gentle_unless_it_is_named(nb, given, preset):
    checkpoint, model = given(rope=True), {"dropout": 0.3, "block_size": 16, "n_layer": 2}
    name, _, config, cfg = resolved(nb, checkpoint, PRESET=preset, MODEL=model, TOKENIZER="bpe")
    assert name == preset and nb.asdict(config) == checkpoint["config"] | model
    usual = nb.resolve(DEFAULTS | {"PRESET": preset}, cuda=False)[3]
    assert cfg.learning_rate == pytest.approx(nb.FINE_TUNING_RATE * usual.learning_rate)
    assert cfg.warmup_steps == nb.FINE_TUNING_WARMUP < usual.warmup_steps
    wished = {"learning_rate": 5e-5, "warmup_steps": 70, "optimizer": "adamw"}
    cfg = resolved(nb, given(), PRESET=preset, TRAINING=wished, MINUTES=3)[3]
    assert wished.items() <= nb.asdict(cfg).items() and cfg.minutes == 3


@pytest.mark.parametrize("block_size", [16, 64])
def test_the_context_may_change_and_the_weights_stay(nb, given, cpu, tmp_path, block_size):
    whole, ids = given(rope=True), torch.arange(16)[None]
    model = nb.GPT(nb.GPTConfig(**whole["config"])).eval()
    nb.load_weights(model, whole)
    run = opened(nb, tmp_path / "run", given(rope=True), cpu, block_size=block_size)
    assert run.model.config.block_size == block_size
    torch.testing.assert_close(run.model.eval()(ids)[0], model(ids)[0])


def test_a_run_begins_with_the_weights_and_resumes_with_its_own(
    nb, given, cpu, tmp_path, stream, tokenizer
):
    checkpoint = given()
    run = opened(nb, tmp_path / "run", checkpoint, cpu)
    nb.train(run, stream, stream, stop_at=3)
    model = nb.load_model(tmp_path / "a.pt")[0]
    some = nb.first_tokens(stream, tokenizer.eot_token, 500)
    first = nb.evaluate(model, some, tokenizer, cpu.autocast())
    assert run.evaluations[0]["step"] == 0
    assert run.evaluations[0]["loss"] == pytest.approx(first["loss"], rel=1e-5)
    again = opened(nb, tmp_path / "run", checkpoint, cpu)
    assert again.step == 3
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, run.model.state_dict()[name])


def test_the_identity_follows_the_weights(nb, given, tokenizer):
    checkpoint = given()
    parts = (nb.GPTConfig(**checkpoint["config"]), nb.TrainConfig(), tokenizer, 1, "text")
    plain, one = nb.identity_of(*parts), nb.identity_of(*parts, checkpoint)
    assert "given" not in plain and one == plain | {"given": one["given"]}
    assert one == nb.identity_of(*parts, given())
    checkpoint["metrics"]["step"] += 1
    assert nb.identity_of(*parts, checkpoint) != one


def test_a_given_tokenizer_has_a_data_folder_of_its_own(nb, given, folder, stories, monkeypatch):
    monkeypatch.setattr(nb, "source", nb.Source("mine", "test", "text", None), raising=False)
    checkpoint, config = given(), nb.GPTConfig(vocab_size=400)
    chosen, where = nb.choose_tokenizer("bpe", {}, config, checkpoint)
    other = checkpoint | {"tokenizer": nb.describe_tokenizer(nb.train_bpe(stories[50:], 400))}
    assert nb.describe_tokenizer(chosen) == checkpoint["tokenizer"]
    assert where.name.startswith("mine-bpe400-")
    assert nb.choose_tokenizer("bpe", {}, config, other)[1] != where


@pytest.mark.parametrize("split, n, named", [("train", 6, "block_size"), ("validation", 1, "10")])
def test_text_that_is_too_short_is_refused_with_advice(nb, tokenizer, tmp_path, split, n, named):
    words = {"train": 90, "validation": 90} | {split: n}
    batches = {key: [[" ".join(["ab"] * number)]] for key, number in words.items()}
    source = nb.Source("mine", "test", "text", lambda s: iter(batches[s]))
    with pytest.raises(nb.UserError, match=f"The {split} text has .*{named}"):
        nb.prepare(source, tokenizer, tmp_path, block_size=64)


def test_the_whole_notebook_starts_from_given_weights_on_little_text(nb, script, tmp_path):  # noqa: F811
    """A text of three kilobytes, and a second session that resumes."""
    lines = [line for story in small_data(nb)[0][:8] for line in story.split("\n") if line]
    (tmp_path / "text.txt").write_text("\n".join(lines)[:3_000])
    path, model = write_weights(nb, tmp_path / "friend.pt", block_size=64)
    settings = {"WEIGHTS": path.name, "DATASET": "text.txt", "PRESET": "laptop", "MAX_STEPS": 8}
    settings["TRAINING"] = {"tokens_per_step": 512, "batch_size": 8, "precision": "float32"}
    text = run_script(script, tmp_path, settings)
    assert "Training starts from friend.pt" in text and "TOO LITTLE" not in text
    assert "both copies are better at pirate stories" in text and ENDING.search(text)
    (run,) = tmp_path.glob("runs/laptop-2x2x32x64-bpe400-text-*")
    (data,) = tmp_path.glob("data/text-*-bpe400-*")
    stored = nb.load_checkpoint(run / "last.pt")
    tokenizer = small_data(nb)[1]
    assert stored["tokenizer"] == nb.describe_tokenizer(tokenizer) and stored["step"] == 8
    tokens = nb.np.fromfile(data / "validation.bin", nb.np.uint16)
    first = stored["evaluations"][0]
    assert first["step"] == 0
    expected = nb.evaluate(model, tokens, tokenizer)["loss"]
    assert first["loss"] == pytest.approx(expected, rel=1e-4)
    again = run_script(script, tmp_path, settings | {"MAX_STEPS": 10})
    assert re.search(r"Resuming after step 8\.", again) and len(list(run.parent.iterdir())) == 1

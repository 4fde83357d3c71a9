"""What readers rarely meet: the hub itself, the clock, odd files, resuming in float16."""

import types

import datasets
import numpy as np
import pytest
import torch
from conftest import twenty_steps
from test_notebook import run_script, script  # noqa: F401 (script is a fixture)


# The hub, with its answers made up.
def stand_in(monkeypatch, n: int) -> list[dict]:
    """The hub's dataset becomes `n` numbered stories; returns how it was asked for, each time."""
    asked = []

    def load_dataset(name, streaming, **wish):
        asked.append({"name": name, "streaming": streaming} | wish)
        data = datasets.Dataset.from_dict({"text": [f"story {i}" for i in range(n)]})
        return data.to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("limit", [None, 3_000, 2_000, 1])
def test_the_hub_gives_its_first_stories_in_batches(nb, monkeypatch, limit):
    asked = stand_in(monkeypatch, 4_500)
    monkeypatch.setattr(nb, "HUB_STORIES", {"train": 4_500, "validation": 4_500})
    source = nb.hub_source(limit)
    batches = list(source.batches("train"))
    stories, n = sum(batches, []), limit or 4_500
    assert stories == [f"story {i}" for i in range(n)] and source.totals["train"] == n
    assert max(map(len, batches)) <= nb.BATCH_STORIES
    expected = {"name": nb.HUB_NAME, "revision": nb.HUB_REVISION, "split": "train"}
    assert asked == [expected | {"streaming": True}]


def test_whole_and_limited_tinystories_have_different_names_and_identities(nb):
    whole, part = nb.hub_source(None), nb.hub_source(20_000)
    assert (whole.name, part.name) == ("tinystories", "tinystories20k")
    assert whole.identity != part.identity and nb.HUB_REVISION in whole.identity


@pytest.mark.parametrize("error", [ConnectionError, datasets.exceptions.DatasetNotFoundError])
def test_a_hub_that_breaks_off_is_a_plain_sentence(nb, monkeypatch, error):
    def fail(*_, **__):
        raise error("gone")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(nb.UserError, match='DATASET = "practice"'):
        next(nb.hub_source(None).batches("train"))


@pytest.mark.parametrize("wish", ["auto", "tinystories"])
def test_a_hub_that_answers_is_used(nb, monkeypatch, wish):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    answer = types.SimpleNamespace(close=lambda: None)
    monkeypatch.setattr(nb.urllib.request, "urlopen", lambda *_, **__: answer)
    assert nb.open_source(wish, 20_000).name == "tinystories20k"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if wish == "auto":
        assert nb.open_source(wish, None).name == "practice"
    else:
        with pytest.raises(nb.UserError, match="cannot be reached"):
            nb.open_source(wish, None)


# Odd names and files.
@pytest.mark.parametrize("wish", ["~nobody-of-this-name/stories", "x" * 5_000, "a\0b"])
def test_a_dataset_that_cannot_be_a_path_is_a_plain_sentence(nb, wish):
    with pytest.raises(nb.UserError, match="nor a path"):
        nb.open_source(wish, None)


def test_a_single_document_cannot_be_split(script, tmp_path):  # noqa: F811
    (tmp_path / "one.txt").write_text("Lily lost her ball. Tom found it.")
    with pytest.raises(AssertionError, match="both splits need at least one"):
        run_script(script, tmp_path, {"DATASET": "one.txt"})


def test_text_that_cannot_be_written_is_a_plain_sentence(nb, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(nb.UserError, match="could not be written"):
        nb.write_atomically(tmp_path / "file" / "history.json", "{}")


def test_another_programs_checkpoint_is_refused(nb, tmp_path):
    torch.save({"format": "of another program", "model": {}}, tmp_path / "other.pt")
    with pytest.raises(nb.UserError, match="no whole checkpoint of this notebook"):
        nb.load_checkpoint(tmp_path / "other.pt")


# The clock.
@pytest.fixture
def clock(nb, monkeypatch):
    """A clock that stands still, but for half a second per training step: [seconds]."""
    now, training_step = [0.0], nb.training_step

    def slow(*arguments):
        now[0] += 0.5
        return training_step(*arguments)

    monkeypatch.setattr(nb, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(nb, "training_step", slow)
    return now


@pytest.mark.parametrize("minutes, steps", [(0.25, 30), (0.5, 60)])
def test_a_plan_of_the_wrong_length_is_mended_to_end_on_time(nb, clock, tmp_path, minutes, steps):
    """Planned: twenty steps. Found out at step 10: how many the minutes are enough for."""
    budget = {"max_steps": None, "minutes": minutes}
    run = twenty_steps(nb, tmp_path / "run", training=budget)
    assert run.step == run.max_steps == steps and run.seconds == 60 * minutes
    assert run.evaluations[-1]["step"] == steps


def test_between_two_evaluations_the_run_is_saved_every_few_minutes(
    nb, clock, tmp_path, monkeypatch
):
    careful_step = nb.careful_step

    def breaks_down(run, *rest):
        if run.step == 18:
            raise RuntimeError("test")
        return careful_step(run, *rest)

    monkeypatch.setattr(nb, "careful_step", breaks_down)
    with pytest.raises(RuntimeError, match="test"):
        twenty_steps(nb, tmp_path / "run", training={"save_minutes": 1.9 / 60})
    assert nb.load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 18  # at 10, 14 and 18
    monkeypatch.setattr(nb, "careful_step", careful_step)
    resumed = twenty_steps(nb, tmp_path / "run")
    assert len(resumed.steps) == 20 and [e["step"] for e in resumed.evaluations] == [0, 10, 20]


def test_the_last_measurement_takes_as_many_whole_stories_as_there_is_time_for(
    nb, small_model, tokenizer, ribbon, clock, monkeypatch
):
    def evaluate(model, tokens, *_):
        clock[0] += len(tokens) / 1_000

    monkeypatch.setattr(nb, "evaluate", evaluate)
    assert nb.affordable_ribbon(small_model(), ribbon, tokenizer, None, 1e6) is ribbon
    ends = np.flatnonzero(ribbon == tokenizer.eot_token)
    for seconds in (0.0, 4.0, 20.0):
        part = nb.affordable_ribbon(small_model(), ribbon, tokenizer, None, seconds)
        n = np.count_nonzero(part == tokenizer.eot_token)
        assert len(part) == ends[n - 1] + 1  # whole stories, at least one
        assert n == 1 or len(part) <= 1_000 * seconds + 1
        assert ends[n] + 1 >= 1_000 * seconds - 1  # one more would be too many


# Resuming.
def test_ten_and_ten_equal_twenty_in_float16_with_its_scale(nb, tmp_path, monkeypatch):
    machine = nb.Machine
    monkeypatch.setattr(nb, "Machine", lambda device, _, why: machine(device, torch.float16, why))
    scaler = torch.amp.GradScaler  # this one overflows at first, and soon grows again
    options = {"init_scale": 2.0**24, "growth_interval": 4}
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda kind, enabled: scaler(kind, **options, enabled=enabled)
    )
    whole = twenty_steps(nb, tmp_path / "a")
    twenty_steps(nb, tmp_path / "b", stop_at=10)
    resumed = twenty_steps(nb, tmp_path / "b")
    assert all(map(torch.equal, whole.model.parameters(), resumed.model.parameters()))
    assert resumed.scaler.state_dict() == whole.scaler.state_dict()


def test_another_text_is_refused_and_another_seed_is_not_taken(
    nb, tokenizer, cpu, tmp_path, capsys
):
    old = twenty_steps(nb, tmp_path / "run", stop_at=2)
    parts = (tmp_path / "run", old.model.config, nb.TrainConfig(), tokenizer, cpu)
    with pytest.raises(nb.UserError, match="The text has changed"):
        nb.open_run(*parts, 1, identity="another text")
    assert nb.open_run(*parts, 99).seed == 1
    assert "its own seed, 1" in capsys.readouterr().out


# Compiling, and processes that die.
def test_a_compiler_that_works_is_used(nb, cpu, small_model, ribbon, monkeypatch):
    model, made = small_model(), []

    def compile_(module):
        made.append(lambda *given, **named: module(*given, **named))
        return made[0]

    monkeypatch.setattr(nb.torch, "compile", compile_)
    forward = nb.ready_forward(model, nb.TrainConfig(compile=True), cpu, ribbon, 2)
    assert forward is made[0] and all(p.grad is None for p in model.parameters())


def test_an_error_of_a_process_is_a_sentence_only_among_several(
    nb, cpu, small_model, tmp_path, monkeypatch
):
    model, cfg = small_model(), nb.TrainConfig()
    run = nb.Run(tmp_path, model, nb.make_optimizers(model, cfg), cpu.scaler(), 1)

    def dies(*_, **__):
        raise RuntimeError("Connection closed by peer")

    x = torch.zeros(2, 16, dtype=torch.long)
    with pytest.raises(RuntimeError, match="Connection"):
        nb.careful_step(run, dies, x, x, 1e-3, cfg, cpu)
    monkeypatch.setattr(nb, "WORLD", 2)
    with pytest.raises(nb.UserError, match="has died at step 0"):
        nb.careful_step(run, dies, x, x, 1e-3, cfg, cpu)

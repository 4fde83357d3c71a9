"""What readers rarely meet: the hub itself, the clock, odd files, resuming in float16."""

import contextlib
import types

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import twenty_steps
from test_notebook import run_script, script  # noqa: F401 (script is a fixture)


# The hub, with its answers made up.
def stand_in(monkeypatch, texts: list[str]) -> list[dict]:
    """The hub's dataset becomes these texts; returns how it was asked for, each time."""
    asked = []

    def load_dataset(name, streaming, **wish):
        asked.append({"name": name, "streaming": streaming} | wish)
        data = datasets.Dataset.from_dict({"text": texts})
        return data.to_iterable_dataset() if streaming else data

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize("limit", [None, 3_000, 2_000, 1])
def test_the_hub_gives_its_first_stories_in_batches(nb, monkeypatch, limit):
    """Stripped, without the empty ones; streamed only where not all are wanted."""
    texts = [f" story {i}\n" if i % 5 else "\n" for i in range(1, 4_501)]
    asked = stand_in(monkeypatch, texts)
    monkeypatch.setattr(nb, "HUB_STORIES", {"train": 4_500, "validation": 4_500})
    source = nb.hub_source(limit)
    batches = list(source.batches("train"))
    n = limit or 4_500
    assert sum(batches, []) == [f"story {i}" for i in range(1, n + 1) if i % 5]
    assert source.totals["train"] == n and max(map(len, batches)) <= nb.BATCH_STORIES
    expected = {"name": nb.HUB_NAME, "revision": nb.HUB_REVISION, "split": "train"}
    assert asked == [expected | {"streaming": limit is not None}]


@pytest.mark.parametrize("limit", [None, 3_000])
def test_a_hub_that_ends_too_early_is_noticed(nb, monkeypatch, limit):
    stand_in(monkeypatch, ["story"] * 2_990)
    monkeypatch.setattr(nb, "HUB_STORIES", {"train": 3_000, "validation": 3_000})
    with pytest.raises(nb.UserError, match="10 stories too early"):
        list(nb.hub_source(limit).batches("train"))


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
    asked = []
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda _, name, **wish: asked.append((name, wish))
    )
    assert nb.open_source(wish, 20_000).name == "tinystories20k"
    assert asked == [(nb.HUB_NAME, {"revision": nb.HUB_REVISION, "timeout": 5.0})]


# Odd names and files.
@pytest.mark.parametrize("wish", ["~nobody-of-this-name/stories", "x" * 5_000, "a\0b"])
def test_a_dataset_that_cannot_be_a_path_is_a_plain_sentence(nb, wish):
    with pytest.raises(nb.UserError, match="nor a path"):
        nb.open_source(wish, None)


def test_a_single_document_too_short_to_be_split_is_a_plain_sentence(script, tmp_path):  # noqa: F811
    (tmp_path / "one.txt").write_text("A")
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
    step_with_oom_retry = nb.step_with_oom_retry

    def breaks_down(run, *rest):
        if run.step == 18:
            raise RuntimeError("test")
        return step_with_oom_retry(run, *rest)

    monkeypatch.setattr(nb, "step_with_oom_retry", breaks_down)
    with pytest.raises(RuntimeError, match="test"):
        twenty_steps(nb, tmp_path / "run", training={"save_minutes": 1.9 / 60})
    assert nb.load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 18  # at 10, 14 and 18
    monkeypatch.setattr(nb, "step_with_oom_retry", step_with_oom_retry)
    resumed = twenty_steps(nb, tmp_path / "run")
    assert len(resumed.steps) == 20 and [e["step"] for e in resumed.evaluations] == [0, 10, 20]


def test_the_last_measurement_takes_as_many_whole_stories_as_there_is_time_for(
    nb, small_model, tokenizer, stream, clock, monkeypatch
):
    def evaluate(model, tokens, *_):
        clock[0] += len(tokens) / 1_000

    monkeypatch.setattr(nb, "evaluate", evaluate)
    assert len(nb.affordable_tokens(small_model(), stream, tokenizer, None, 1e6)) == len(stream)
    ends = np.flatnonzero(stream == tokenizer.eot_token)
    for seconds in (0.0, 6.0, 20.0):
        part = nb.affordable_tokens(small_model(), stream, tokenizer, None, seconds)
        n = np.count_nonzero(part == tokenizer.eot_token)
        assert len(part) == ends[n - 1] + 1 <= max(4, seconds) * 1_000 < ends[n] + 1


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


# Processes that die.
def test_an_error_of_a_process_is_a_sentence_only_among_several(nb, tmp_path):
    run, x = twenty_steps(nb, tmp_path / "run", stop_at=2), torch.zeros(2, 16, dtype=torch.long)
    for error in ("Connection closed by peer\nmore", "CUDA out of memory"):

        def dies(*_, error=error, **__):
            raise RuntimeError(error)

        run.forward = dies
        with pytest.raises((RuntimeError, nb.UserError)) as alone:
            nb.step_with_oom_retry(run, x, x, 1e-3)
        assert "rocess" not in str(alone.value)
        dies.no_sync = contextlib.nullcontext  # joined: nothing is tried again, the others wait
        with pytest.raises(nb.UserError, match=f"step 2: {error.splitlines()[0]}") as caught:
            nb.step_with_oom_retry(run, x, x, 1e-3)
        assert "\n" not in str(caught.value) and "has died" in str(caught.value)


def test_a_broken_connection_is_one_sentence(nb, monkeypatch):
    def breaks(*_):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(nb, "WORLD", 2)
    monkeypatch.setattr(nb, "patient", None, raising=False)
    monkeypatch.setattr(nb.dist, "all_gather_object", breaks)
    monkeypatch.setattr(nb.dist, "broadcast_object_list", breaks)
    for talk in (nb.gather_from_ranks, lambda: nb.broadcast_from_rank_0(1)):
        with pytest.raises(nb.UserError, match="Another process of this run has died"):
            talk()

"""Files from which a model or a run can be restored."""

import os
import pickle
import re
import zipfile

import pytest
import torch
from conftest import ROOT, SAMPLE, twenty_steps


@pytest.fixture(scope="module")
def run(nb, tmp_path_factory):
    """A finished run of 20 steps, with its files."""
    return twenty_steps(nb, tmp_path_factory.mktemp("run") / "run")


@pytest.fixture
def saved(nb, small_model, tokenizer, tmp_path):
    """(path of a checkpoint, the model in it)."""
    model, path = small_model(), tmp_path / "deep" / "model.pt"
    nb.save_checkpoint(path, model, tokenizer, {"step": 3})
    return path, model


def all_values(value):
    """A value and everything inside it."""
    yield value
    inside = value.values() if isinstance(value, dict) else value
    if isinstance(value, (dict, list, tuple)):
        for part in inside:
            yield from all_values(part)


@pytest.mark.parametrize("name", ["last.pt", "best_model_params.pt"])
def test_checkpoints_hold_plain_data_and_load_safely(run, name):
    stored = torch.load(run.folder / name, weights_only=True)
    plain = (dict, list, tuple, str, int, float, bool, type(None), torch.Tensor)
    assert {type(v) for v in all_values(stored)} - {type(stored["model"])} <= set(plain)
    assert {"model", "config", "tokenizer", "metrics", "format"} <= set(stored)


def test_last_holds_the_whole_state_and_best_the_weights_alone(nb, run):
    last = nb.load_checkpoint(run.folder / "last.pt")
    best = nb.load_checkpoint(run.folder / "best_model_params.pt")
    assert {"optimizer", "scaler", "identity", "step", "steps", "evaluations"} <= set(last)
    assert "optimizer" not in best and "steps" not in best
    assert best["metrics"]["validation_loss"] == min(e["loss"] for e in run.evaluations)


def test_no_temporary_file_is_left(run):
    assert not list(run.folder.rglob("*.tmp"))


@pytest.mark.parametrize("changes", [{}, {"tie_weights": False}, {"rope": True, "bias": False}])
def test_a_model_is_restored_from_its_file_alone(
    nb, small_model, tokenizer, tmp_path, stories, changes
):
    model = small_model(**changes).eval()
    nb.save_checkpoint(tmp_path / "a.pt", model, tokenizer, {"step": 3})
    restored, its_tokenizer, info = nb.load_model(tmp_path / "a.pt")
    ids = torch.tensor([its_tokenizer.encode_ordinary(stories[0])[:16]])
    assert torch.equal(restored(ids)[0], model(ids)[0]) and not restored.training
    assert restored.config == model.config and info["metrics"] == {"step": 3}
    assert (restored.lm_head.weight is restored.transformer.wte.weight) == model.config.tie_weights


def test_a_half_size_copy_is_half_the_size_and_nearly_the_same(
    nb, small_model, saved, tokenizer, tmp_path
):
    path, model = saved
    nb.save_checkpoint(tmp_path / "half.pt", small_model().half(), tokenizer, {})
    half, _, _ = nb.load_model(tmp_path / "half.pt")
    stored = torch.load(tmp_path / "half.pt", weights_only=True)["model"]
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert half.lm_head.weight.dtype == torch.float32
    ids = torch.arange(16)[None]
    torch.testing.assert_close(half(ids)[0], model(ids)[0], rtol=0.02, atol=0.02)


class Bomb:
    """An object that writes a file when it is unpickled carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def truncated(path, data, bomb):
    path.write_bytes(data[: len(data) // 2])


def empty(path, data, bomb):
    path.write_bytes(b"")


def noise(path, data, bomb):
    path.write_bytes(bytes(range(256)) * 40)


def flipped(path, data, bomb):
    with zipfile.ZipFile(path) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        at = data.index(archive.read(name)) + 5
    path.write_bytes(data[:at] + b"\xff\xff\xff" + data[at + 3 :])


def malicious_torch(path, data, bomb):
    torch.save({"format": "slm_from_scratch 1", "model": Bomb(bomb)}, path)


def malicious_pickle(path, data, bomb):
    path.write_bytes(pickle.dumps({"format": Bomb(bomb)}, protocol=2))


def no_dictionary(path, data, bomb):
    torch.save([1, 2, 3], path)


def foreign(path, data, bomb):
    torch.save({"model_state_dict": {}, "epoch": 3}, path)


@pytest.mark.parametrize(
    "spoil",
    [truncated, empty, noise, flipped, malicious_torch, malicious_pickle, no_dictionary, foreign],
)
def test_spoilt_files_are_refused_and_nothing_in_them_runs(nb, saved, tmp_path, spoil):
    path, bomb = saved[0], tmp_path / "bomb"
    spoil(path, path.read_bytes(), bomb)
    with pytest.raises(nb.UserError, match="no whole checkpoint"):
        nb.load_model(path)
    assert not bomb.exists()


def test_the_bomb_would_have_gone_off(tmp_path):
    """The test above means something: careless loading does run the program."""
    malicious_torch(tmp_path / "x.pt", b"", tmp_path / "bomb")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "bomb").exists()


def test_a_missing_file_is_a_plain_sentence(nb, tmp_path):
    for path in (tmp_path / "nothing.pt", tmp_path):
        with pytest.raises(nb.UserError, match="no checkpoint"):
            nb.load_model(path)


@pytest.mark.parametrize(
    "key, value",
    [
        ("config", {"n_layer": 2, "n_experts": 4}),
        ("config", {"n_embd": 7, "n_head": 2}),
        ("config", None),
        ("model", {}),
        ("model", {"transformer.wte.weight": torch.zeros(2, 2)}),
        ("model", [1]),
        ("tokenizer", {}),
        ("tokenizer", {"name": "bpe"}),
        ("tokenizer", {"name": "bpe", "merges": [[999, 999]]}),
        ("tokenizer", {"name": "bpe", "merges": [[97]]}),
    ],
    ids=str,
)
def test_checkpoints_that_do_not_fit_are_refused(nb, saved, key, value):
    stored = torch.load(saved[0], weights_only=True)
    torch.save(stored | {key: value}, saved[0])
    with pytest.raises(nb.UserError):
        nb.load_model(saved[0])


def test_a_folder_that_cannot_be_written_is_a_plain_sentence(nb, small_model, tokenizer, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(nb.UserError, match="FOLDER"):
        nb.save_checkpoint(tmp_path / "file" / "run" / "last.pt", small_model(), tokenizer, {})


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_a_read_only_folder_keeps_its_older_file(nb, saved, small_model, tokenizer):
    path, before = saved[0], saved[0].read_bytes()
    path.parent.chmod(0o500)
    try:
        with pytest.raises(nb.UserError, match="could not be written"):
            nb.save_checkpoint(path, small_model(rope=True), tokenizer, {})
    finally:
        path.parent.chmod(0o700)
    assert path.read_bytes() == before


@pytest.mark.parametrize("moment", ["open", "write", "fsync", "replace"])
def test_a_full_disk_leaves_the_older_file_whole(
    nb, saved, small_model, tokenizer, monkeypatch, moment
):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    path, before = saved[0], saved[0].read_bytes()
    where = {"open": nb, "write": nb.torch}.get(moment, nb.os)
    name = "save" if moment == "write" else moment
    monkeypatch.setattr(where, name, full, raising=moment != "open")
    with pytest.raises(nb.UserError, match="No space left"):
        nb.save_checkpoint(path, small_model(rope=True), tokenizer, {})
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["model.pt"]


def test_a_damaged_last_is_refused_and_not_overwritten(nb, tmp_path):
    twenty_steps(nb, tmp_path / "run", stop_at=2)
    last = tmp_path / "run" / "last.pt"
    last.write_bytes(last.read_bytes()[:-500])
    damaged = last.read_bytes()
    with pytest.raises(nb.UserError, match="no whole checkpoint"):
        twenty_steps(nb, tmp_path / "run")
    assert last.read_bytes() == damaged


def test_weights_alone_cannot_be_resumed(nb, run, tmp_path):
    (tmp_path / "run").mkdir()
    best = (run.folder / "best_model_params.pt").read_bytes()
    (tmp_path / "run" / "last.pt").write_bytes(best)
    with pytest.raises(nb.UserError, match="RESUME = False"):
        twenty_steps(nb, tmp_path / "run")


# The weights that are published beside the notebook.
PUBLISHED = ROOT / "best_model_params.pt"


def test_the_published_weights_are_half_size_and_tell_a_story(nb):
    stored = torch.load(PUBLISHED, weights_only=True)
    assert {p.dtype for p in stored["model"].values()} == {torch.float16}
    assert PUBLISHED.stat().st_size < 60e6
    model, tokenizer, info = nb.load_model(PUBLISHED)
    pieces = list(nb.stream_text(model, tokenizer, "Once upon a time", 300, seed=1))
    assert pieces[-1] == nb.EOT and len("".join(pieces).split()) > 50
    assert info["metrics"]["step"] > 0


@pytest.mark.slow
def test_the_published_weights_have_the_figure_that_is_told(nb, sample):
    """Exactly on real stories; on practice stories, which they have not read, within bounds."""
    model, tokenizer, _ = nb.load_model(PUBLISHED)
    stories = [s for batch in nb.file_source(sample).batches("validation") for s in batch]
    measured = nb.bits_per_byte(model, tokenizer, stories)
    told = (ROOT / "plots" / "MEASURED.md").read_text(encoding="utf-8")
    told = float(re.search(r"`best_model_params.pt`: (0\.\d+) bits per byte", told)[1])
    assert abs(measured - told) < 1e-3 if SAMPLE else told < measured < 1.4

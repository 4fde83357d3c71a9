"""Beyond one notebook: several processes, settings from outside, other people's libraries."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from test_notebook import launch, script  # noqa: F401 (script is a fixture)

TINY = {
    "DATASET": "practice",
    "MODEL": {"n_layer": 1, "n_head": 2, "n_embd": 32, "dropout": 0.0, "vocab_size": 500},
    "TRAINING": {
        "tokens_per_step": 2_048,
        "batch_size": 2,
        "precision": "float32",
        "optimizer": "adamw",
        "evaluations": 2,
    },
}


def losses(folder) -> list[float]:
    """Training losses, step by step, of the only run in a folder."""
    (history,) = folder.glob("runs/*/history.json")
    return [step[0] for step in json.loads(history.read_text())["steps"]]


def torchrun(script, n: int) -> list:  # noqa: F811
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*command, f"--nproc_per_node={n}", str(script)]


@pytest.mark.slow
def test_two_processes_learn_what_one_learns_and_resume(script, tmp_path):  # noqa: F811
    settings = TINY | {"MAX_STEPS": 8}
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    launch([sys.executable, str(script)], one, settings)
    said = launch(torchrun(script, 2), two, settings)
    assert "2 processes work together" in said
    assert said.count("8 steps, ") == 1  # process 0 alone speaks
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    again = launch(torchrun(script, 2), two, settings | {"MAX_STEPS": 10})
    assert "Resuming after step 8" in again
    assert len(losses(two)) == 10


@pytest.mark.slow
def test_papermill_sets_any_setting(tmp_path):
    pytest.importorskip("papermill")
    command = [sys.executable, "-m", "papermill", str(ROOT / "slm_from_scratch.ipynb"), "out.ipynb"]
    for name, value in {"DATASET": "practice", "PRESET": "tiny", "MAX_STEPS": 2}.items():
        command += ["-p", name, str(value)]
    command += ["-y", str({"TRAINING": {"tokens_per_step": 512}, "MODEL": {"n_layer": 1}})]
    launch(command, tmp_path, {})
    assert list(tmp_path.glob("runs/tiny-1x6x192x256-*-practice-*/last.pt"))


SHAPES = [{}, {"tie_weights": False}, {"bias": False}, {"rope": True}]
SHAPES += [{"rope": True, "bias": False, "tie_weights": False}]


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_an_exported_model_gives_the_same_logits_ids_and_story(
    nb, small_model, tokenizer, tmp_path, changes
):
    transformers = pytest.importorskip("transformers")
    model = small_model(vocab_size=tokenizer.n_vocab, block_size=64, **changes).eval()
    nb.export_to_transformers(model, tokenizer, tmp_path)
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    its_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = 'Once there was a naïve fox 🦊.\n\n"Don\'t run," 12345 said  it.'
    ids = tokenizer.encode_ordinary(text)
    assert its_tokenizer.encode(text) == ids
    assert its_tokenizer.decode(ids) == text
    idx = nb.torch.tensor([[tokenizer.eot_token, *ids[:20]]])
    with nb.torch.no_grad():
        nb.torch.testing.assert_close(other(idx).logits, model(idx)[0], rtol=1e-4, atol=1e-4)
    ours = model.generate(idx, 20, temperature=0.0)
    theirs = other.generate(
        idx, max_new_tokens=20, do_sample=False, eos_token_id=None, temperature=None, top_p=None
    )
    assert nb.torch.equal(ours, theirs)


def test_the_exported_gpt2_tokenizer_gives_tiktokens_ids(nb, gpt2):
    pytest.importorskip("transformers")
    text = "Once upon a time, there wasn't  a café 🦊\n\nanymore! 1234567"
    assert nb.export_tokenizer(gpt2, 128).encode(text) == gpt2.encode_ordinary(text)


def test_a_wrong_setting_ends_a_program_with_one_sentence(script, tmp_path):  # noqa: F811
    environment = {"SLM_PRESET": "smal", "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("UserError: PRESET = 'smal' is unknown")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_with_a_sentence_and_a_whole_checkpoint(
    nb,
    script,  # noqa: F811
    tmp_path,
):
    steps = TINY | {"MAX_STEPS": 3_000}
    steps["TRAINING"] = steps["TRAINING"] | {"evaluations": 300}
    environment = os.environ | {f"SLM_{name}": str(value) for name, value in steps.items()}
    environment |= {"OMP_NUM_THREADS": "1"}
    with open(tmp_path / "said", "w") as said:
        run = subprocess.Popen(
            torchrun(script, 2), cwd=tmp_path, env=environment, stdout=said, stderr=said
        )
        deadline = time.time() + 120
        while not list(tmp_path.glob("runs/*/last.pt")):
            assert time.time() < deadline and run.poll() is None, (tmp_path / "said").read_text()
            time.sleep(0.5)
        time.sleep(2)
        workers = subprocess.run(["ps", "--ppid", str(run.pid), "-o", "pid="], capture_output=True)
        os.kill(int(workers.stdout.split()[-1]), signal.SIGKILL)
        assert run.wait(timeout=60) != 0
    assert "of this run has died" in (tmp_path / "said").read_text()
    (last,) = tmp_path.glob("runs/*/last.pt")
    nb.load_checkpoint(last)  # raises if it is not whole
    assert not list(tmp_path.glob("runs/*/*.tmp"))


@pytest.mark.slow
def test_a_book_of_ones_own_trains_and_is_measured(nb, script, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("RANK", "1")  # a cluster's leavings: torchrun has not started this
    monkeypatch.setenv("WORLD_SIZE", "2")
    chapters = nb.practice_corpus(400, seed=3)[0]
    (tmp_path / "my book.txt").write_text("\n\n".join(chapters), encoding="utf-8")
    said = launch(
        [sys.executable, str(script)], tmp_path, TINY | {"DATASET": "my book.txt", "MAX_STEPS": 3}
    )
    assert "your own files (my book.txt)" in said
    paragraphs = sum(len(chapter.split("\n\n")) for chapter in chapters)
    splits = [json.loads(p.read_text())["stories"] for p in tmp_path.glob("data/*/*n.json")]
    assert len(splits) == 2 and sum(splits) == paragraphs
    assert 0 < min(splits) < 0.1 * paragraphs
    assert "bits per byte" in said

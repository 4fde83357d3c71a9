"""Beyond one notebook: several processes, settings from outside, other people's libraries."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, needs_gpt2
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
    out = (tmp_path / "out.ipynb").read_text()
    assert "PRESET = 'tiny' (from the settings" in out
    assert list(tmp_path.glob("runs/tiny-1x6x192x256-*-practice/last.pt"))


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


@needs_gpt2
def test_the_exported_gpt2_tokenizer_gives_tiktokens_ids(nb):
    pytest.importorskip("transformers")
    gpt2 = nb.restore_tokenizer({"name": "gpt2"})
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

"""The notebook as a file, and the notebook as a program: executed from end to end."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import DEFAULTS, GPT2_VOCABULARY, NOTEBOOK, ROOT, SAMPLE, code_cells

# What the notebook promises to others who run its cells before Step 10.
NAMES = """GPTConfig TrainConfig PRESETS GPT train_bpe get_batch get_lr train evaluate
save_checkpoint load_checkpoint load_model generate_text bits_per_byte""".split()


# The file.
@pytest.fixture(scope="module")
def book():
    return nbformat.read(NOTEBOOK, as_version=4)


def all_outputs(book):
    """(cell, output) of all code cells."""
    for cell in book.cells:
        for output in cell.get("outputs", []):
            yield cell, output


def shown(book) -> str:
    """The text that the outputs show, one after the other."""
    texts = [o.get("text") or o.get("data", {}).get("text/plain", "") for _, o in all_outputs(book)]
    return "\n".join(texts)


def test_the_file_is_valid_and_small(book):
    nbformat.validate(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
    assert (book.nbformat, book.nbformat_minor) >= (4, 5)
    ids = [cell.id for cell in book.cells]
    assert len(set(ids)) == len(ids)
    assert NOTEBOOK.stat().st_size < 2_000_000
    assert book.metadata.language_info.file_extension == ".py"  # else nbconvert writes a .txt


def test_it_was_executed_once_from_the_first_cell_to_the_last(book):
    counts = [cell.execution_count for cell in book.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))


def test_its_outputs_hold_no_errors_warnings_or_paths_of_a_machine(book):
    for cell, output in all_outputs(book):
        where = f"cell {cell.id}"
        assert output.output_type != "error", where
        assert output.get("name") != "stderr", f"{where}: {output.get('text')}"
        assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {}), where
    assert not re.findall(r"/(?:home|root|Users|tmp|work|mnt|content)/\S*", shown(book))
    assert "Warning" not in shown(book)
    assert "widgets" not in book.metadata


def test_nothing_is_left_to_fill_in(book):
    text = "\n".join(cell.source for cell in book.cells)
    assert not re.findall(r"\w*_GOES_HERE|TODO|FIXME|XXX", text)


def test_the_settings_cell_is_tagged_and_names_every_setting(nb):
    assert sorted(DEFAULTS) == sorted(nb.KINDS)  # conftest reads the tagged cell


def test_the_steps_are_all_there_in_order(book):
    heads = [c.source.split("\n")[0] for c in book.cells if c.cell_type == "markdown"]
    steps = [re.match(r"## Step (\d+)\. ", head) for head in heads]
    assert [int(step[1]) for step in steps if step] == list(range(17))


def test_the_promised_names_are_defined_before_step_10(book):
    heads = [cell.source.startswith("## Step 10.") for cell in book.cells]
    before = [c.source for c in book.cells[: heads.index(True)] if c.cell_type == "code"]
    defined = set(re.findall(r"^(?:def |class )?(\w+)(?:\(| = |:)", "\n".join(before), re.M))
    assert not set(NAMES) - defined


def test_each_code_cell_is_plain_python():
    for source in code_cells():
        compile(source, "cell", "exec")


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff_has_nothing_to_say(command):
    ruff = [sys.executable, "-m", "ruff", *command, "--no-cache", str(NOTEBOOK), "tests"]
    done = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# How much stands in front of what is taught. Open cells are the course; folded ones add safety,
# speed or looks, and GitHub unfolds them.
BUDGETS = {
    "open code lines": 1_150,
    "folded code lines": 1_618,  # the design asks for 950
    "longest open cell": 45,
    "longest folded cell": 80,
    "words of prose": 8_500,
    "open lines before the first network": 300,
}


def sizes(book) -> dict[str, int]:
    """What BUDGETS limits; code lines are those that are not blank."""
    cells = {False: [], True: []}  # by folded: the lines of each cell
    before = None
    for cell in book.cells:
        if cell.cell_type == "code":
            folded = cell.metadata.get("jupyter", {}).get("source_hidden", False)
            if before is None and not folded and re.search(r"\bnn\.[A-Z]", cell.source):
                before = sum(cells[False])
            cells[folded].append(sum(bool(line.strip()) for line in cell.source.split("\n")))
    words = sum(len(c.source.split()) for c in book.cells if c.cell_type == "markdown")
    open_ones, folded_ones = cells[False], cells[True]
    counts = (sum(open_ones), sum(folded_ones), max(open_ones), max(folded_ones), words, before)
    return dict(zip(BUDGETS, counts))


def test_the_notebook_keeps_its_budgets(book):
    found = sizes(book)
    print("\n" + "\n".join(f"{key}: {found[key]:,} of {most:,}" for key, most in BUDGETS.items()))
    assert not {key: found[key] for key, most in BUDGETS.items() if found[key] > most}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 110


# The program.
SMALL = {
    "MODEL": {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64, "vocab_size": 512},
    "TRAINING": {"tokens_per_step": 1_024, "batch_size": 8, "evaluations": 4},
    "MAX_STEPS": 40,
}
ENDING = re.compile(r"(The end\.|\(limit of 300 tokens reached\))\s*$")
WITHOUT_IPYTHON = """
import runpy, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("IPython", "ipykernel", "ipywidgets", "jupyter_client"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, Missing())
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def launch(command, folder: Path, settings: dict, vocabulary: Path | None = None) -> str:
    """Run a command there, without a network; returns what it printed."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MPL", "HF_", "TIKTOKEN"))}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
    nowhere = "http://127.0.0.1:9"
    env |= {"HTTP_PROXY": nowhere, "HTTPS_PROXY": nowhere, "https_proxy": nowhere, "NO_PROXY": ""}
    env |= {"HF_HUB_ETAG_TIMEOUT": "1", "PYTHONIOENCODING": "utf-8"}
    if vocabulary:
        env["TIKTOKEN_CACHE_DIR"] = str(vocabulary)
    env |= {f"SLM_{name}": str(value) for name, value in settings.items()}
    done = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, encoding="utf-8", timeout=900
    )
    assert done.returncode == 0, done.stdout[-1_000:] + done.stderr[-3_000:]
    return done.stdout


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The notebook as an exported script."""
    folder = tmp_path_factory.mktemp("script")
    command = [sys.executable, "-m", "nbconvert", "--to", "script", str(NOTEBOOK)]
    launch([*command, "--output-dir", str(folder)], folder, {})
    (written,) = folder.iterdir()
    return written.rename(folder / "slm_from_scratch.py")


def run_script(script: Path, folder: Path, settings: dict, vocabulary=None) -> str:
    """Run the exported script by plain Python, where IPython cannot be imported."""
    command = [sys.executable, "-W", "error::FutureWarning", "-c", WITHOUT_IPYTHON, str(script)]
    return launch(command, folder, settings, vocabulary)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """(folder, executed notebook): the README's first command, with a small model."""
    folder = tmp_path_factory.mktemp("executed")
    shutil.copy(NOTEBOOK, folder)
    command = [sys.executable, "-m", "jupyter", "execute", NOTEBOOK.name, "--output=my_run.ipynb"]
    launch(command, folder, SMALL)
    return folder, nbformat.read(folder / "my_run.ipynb", as_version=4)


@pytest.fixture(scope="module")
def run_folder(executed):
    (folder,) = executed[0].glob("runs/laptop-2x2x32x64-bpe512-practice-??????")
    return folder


def test_every_cell_runs_without_network_error_or_warning(executed):
    _, book = executed
    counts = [cell.execution_count for cell in book.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    for cell, output in all_outputs(book):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", f"{cell.source[:80]}: {output.text}"
    assert sum("image/png" in o.get("data", {}) for _, o in all_outputs(book)) >= 15


def test_the_executed_notebook_says_practice_and_what_was_set(executed):
    text = shown(executed[1])
    assert "PRACTICE CORPUS" in text and "it is not TinyStories" in text
    assert "MAX_STEPS = 40 (from the environment" in text
    assert "40 steps of 1,024 tokens, 0 done" in text
    assert "The entropy of the practice corpus is 36.70 nats per story" in text
    assert re.search(r"validation: 1,000 stories, ([\d,]+) of \1 tokens", text)  # all of them


def test_the_last_cell_holds_a_story_and_how_it_ended(executed):
    last = [cell for cell in executed[1].cells if cell.cell_type == "code"][-1]
    text = shown(nbformat.v4.new_notebook(cells=[last]))
    assert text.startswith("Once upon a time, there was a little girl") and ENDING.search(text)
    assert "<|endoftext|>" not in text


def test_it_writes_below_data_and_runs_alone(executed, run_folder):
    folder, _ = executed
    names = {path.name for path in folder.iterdir()}
    assert names - {"__pycache__"} == {NOTEBOOK.name, "my_run.ipynb", "data", "runs"}
    assert {p.name for p in (folder / "data" / "practice-bpe512").iterdir()} == {
        *("tokenizer.json", "train.bin", "train.json", "validation.bin", "validation.json")
    }
    assert [p.name for p in (folder / "runs").iterdir()] == [run_folder.name]
    files = {p.name for p in run_folder.iterdir()}
    assert {"last.pt", "best_model_params.pt", "plots"} <= files
    assert {"curves.png"} <= {p.name for p in (run_folder / "plots").iterdir()}
    assert not list(folder.rglob("*.tmp"))


def test_token_files_and_history_are_what_they_say(nb, executed, run_folder):
    data = executed[0] / "data" / "practice-bpe512"
    for split, stories in (("train", 40_000), ("validation", 1_000)):
        meta = json.loads((data / f"{split}.json").read_text())
        assert meta["stories"] == stories
        assert (data / f"{split}.bin").stat().st_size == 2 * meta["tokens"]
        content = (data / f"{split}.bin").read_bytes()
        assert nb.hashlib.sha256(content).hexdigest() == meta["sha256"]
    history = nb.load_checkpoint(run_folder / "last.pt")
    assert len(history["steps"]) == 40
    assert [e["step"] for e in history["evaluations"]] == [0, 10, 20, 30, 40]
    assert history["evaluations"][-1]["loss"] < history["evaluations"][0]["loss"]


def test_the_weights_are_those_that_were_measured(nb, executed, run_folder):
    model, tokenizer, info = nb.load_model(run_folder / "best_model_params.pt")
    validation = nb.practice_source(10, 1_000).batches("validation")
    measured = json.loads((run_folder / "measured.json").read_text())["validation"]
    stories = [story for batch in validation for story in batch]
    ours = nb.bits_per_byte(model, tokenizer, stories)
    assert ours == pytest.approx(measured["bits_per_byte"], rel=0.02)  # 16 bits there, 32 here
    assert info["metrics"]["step"] == 40


@pytest.fixture(scope="module")
def continued(executed, script):
    """What the plain script prints in the folder of the executed notebook, with four more steps."""
    return run_script(script, executed[0], SMALL | {"MAX_STEPS": 44})


def test_the_plain_script_resumes_the_notebooks_run(nb, continued, run_folder):
    assert "Resuming after step 40." in continued and "44 steps of 1,024 tokens" in continued
    assert "train.bin: reusing" in continued and "BPE: reusing" in continued
    assert len(nb.load_checkpoint(run_folder / "last.pt")["steps"]) == 44
    assert ENDING.search(continued)
    assert (run_folder / "plots" / "attention.png").stat().st_size > 1_000


def test_running_again_says_that_the_run_is_complete(continued, executed, script, run_folder):
    before = (run_folder / "last.pt").read_bytes()
    again = run_script(script, executed[0], SMALL | {"MAX_STEPS": 44})
    assert "This run is complete: 44 steps" in again and ENDING.search(again)
    assert (run_folder / "last.pt").read_bytes() == before


def test_without_training_the_given_weights_tell_a_story(run_folder, executed, script, tmp_path):
    weights = tmp_path / "somewhere" / "weights.pt"
    weights.parent.mkdir()
    shutil.copy(run_folder / "best_model_params.pt", weights)
    text = run_script(script, tmp_path, {"TRAIN": False, "WEIGHTS": weights, "PROMPT": "Ben had"})
    assert f"weights: weights.pt of {weights.parent.name}" in text
    assert "Nothing was trained" in text and not list(tmp_path.rglob("last.pt"))
    assert "\nBen had" in text and ENDING.search(text)


def test_without_training_the_published_weights_speak(script, tmp_path):
    shutil.copy(ROOT / "best_model_params.pt", tmp_path)
    text = run_script(script, tmp_path, {"TRAIN": False})
    assert f"weights: best_model_params.pt of {tmp_path.name}" in text
    assert "Nothing was trained" in text and ENDING.search(text)


def test_missing_weights_end_the_program_with_a_sentence(script, tmp_path):
    with pytest.raises(AssertionError, match="There is no checkpoint no.pt"):
        run_script(script, tmp_path, {"TRAIN": False, "WEIGHTS": "no.pt"})


# The presets, on real stories where they are at hand.
@pytest.fixture(scope="module")
def real(nb, sample, tmp_path_factory):
    """A folder whose dataset has the sample's training stories and 100 to validate."""
    import pyarrow

    folder, source = tmp_path_factory.mktemp("real"), nb.file_source(sample)
    for split in ("train", "validation"):
        texts = [text for batch in source.batches(split) for text in batch]
        table = pyarrow.table({"text": texts[: None if split == "train" else 100]})
        (folder / "stories").mkdir(exist_ok=True)
        pyarrow.parquet.write_table(table, folder / "stories" / f"{split}.parquet")
    return folder


FAST = ("laptop",)
ALL = ("slm", "babymodel", "storyteller", "bookworm", "laptop")  # the others: only other numbers


@pytest.mark.parametrize(
    "preset", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ALL]
)
def test_the_preset_runs_every_cell_on_stories(nb, real, script, preset):
    settings = {
        "PRESET": preset,
        "DATASET": real / "stories",
        "MAX_STEPS": 2,
        "TRAINING": {"tokens_per_step": 1_024, "batch_size": 4, "evaluations": 1},
    }
    text = run_script(script, real, settings, GPT2_VOCABULARY)
    row = nb.PRESETS[preset]
    (last,) = real.glob(f"runs/{preset}-*/last.pt")
    stored = nb.load_checkpoint(last)
    config, size = nb.GPTConfig(**row["model"]), stored["config"]["vocab_size"]
    if not SAMPLE or not GPT2_VOCABULARY:  # practice stories have fewer tokens to learn
        assert size <= config.vocab_size
        config.vocab_size = size
    assert f"parameters: {sum(nb.count_parameters(config).values()):,};" in text
    name = "gpt2" if row["tokenizer"] == "gpt2" and GPT2_VOCABULARY else f"bpe{size}"
    assert stored["config"] == nb.asdict(config) and stored["step"] == 2
    assert stored["tokenizer"]["name"] == name and f"-{name}-stories" in last.parent.name
    n_stories = nb.file_source(real / "stories").totals["train"]
    assert f"train: {n_stories:,} stories" in text and ENDING.search(text)

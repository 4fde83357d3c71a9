"""Beyond one notebook: several processes, settings from outside, other people's libraries."""

import ast
import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, code_cells, defines
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
    (last,) = folder.glob("runs/*/last.pt")
    return [step[0] for step in torch.load(last, weights_only=True)["steps"]]


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


# Several machines: one torchrun each, in folders of their own.
# The cells that a training run needs; of all others, only what they define.
NEEDED = [
    "class UserError",
    "\nPRESET = ",
    "RANK, WORLD",
    "def choose_precision",
    "def rank_zero_first",
]
NEEDED += ["source = open_source(", "data_folder = choose_tokenizer(", "streams = prepare("]
NEEDED += ["run = open_run(folder, *parts", "train(run, train_tokens, val_tokens, live_curve)"]


@pytest.fixture(scope="module")
def training_script(tmp_path_factory):
    """The notebook as a program that prepares and trains, and shows nothing."""
    cells, found = [], 0
    for source in code_cells():
        tree = ast.parse(source)
        if any(mark in source for mark in NEEDED):
            found += 1
        else:
            tree.body = [node for node in tree.body if defines(node)]
        cells.append(ast.unparse(tree))
    assert found == len(NEEDED)
    path = tmp_path_factory.mktemp("script") / "training.py"
    path.write_text("\n".join(cells), encoding="utf-8")
    return path


@pytest.fixture
def machines(nb, training_script, tmp_path):
    """`machines(settings, ...)` starts a torchrun of one process for each of these settings.

    They run in folders "0", "1" and so on, each with a file "said" that takes what they print.
    The process of the first one has rank 0. `machines()` starts one process without torchrun.
    """
    started = []
    stories = "\n\n".join(nb.practice_corpus(600, seed=3)[0])

    def start(*settings, alone=False):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        several = ["-m", "torch.distributed.run", f"--nnodes={len(settings)}", "--nproc_per_node=1"]
        several += ["--rdzv-backend=c10d", f"--rdzv-endpoint={address}", "--local-addr=localhost"]
        runs = []
        for number, changes in enumerate(settings):
            folder = tmp_path / ("alone" if alone else str(number))
            folder.mkdir(exist_ok=True)
            (folder / "stories.txt").write_text(stories, encoding="utf-8")
            wanted = TINY | {"DATASET": "stories.txt"} | changes
            env = os.environ | {f"SLM_{name}": str(value) for name, value in wanted.items()}
            command = [sys.executable, *([] if alone else several), str(training_script)]
            with open(folder / "said", "w") as said:
                options = {"stdout": said, "stderr": said, "start_new_session": True}
                runs.append(subprocess.Popen(command, cwd=folder, env=env, **options))
        started.extend(runs)
        return runs

    yield start
    for run in started:
        stop(run)


def stop(run):
    """SIGKILL a process and its children, as a machine that loses its power does."""
    children = subprocess.run(["ps", "--ppid", str(run.pid), "-o", "pid="], capture_output=True)
    for pid in [run.pid, *map(int, children.stdout.split())] if run.poll() is None else []:
        os.kill(pid, signal.SIGKILL)
    run.wait()


def ended(runs, folder, seconds=600) -> list[str]:
    """What they have printed when all of them have ended, without an error."""
    codes = [run.wait(timeout=seconds) for run in runs]
    said = [path.read_text() for path in sorted(folder.glob("*/said"))]
    assert not any(codes), "\n\n".join(text[-3_000:] for text in said)
    return said


@pytest.mark.slow
def test_two_machines_with_disks_of_their_own_learn_what_one_learns_and_resume(machines, tmp_path):
    """The second machine has no last.pt, so rank 0 has to send what it has read."""
    for steps in (6, 9):
        ended(machines({"MAX_STEPS": steps}, alone=True), tmp_path)
        said = ended(machines({"MAX_STEPS": steps}, {"MAX_STEPS": steps}), tmp_path)
        assert len(losses(tmp_path / "0")) == steps
        assert losses(tmp_path / "0") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    assert "Resuming after step 6" in said[0]
    assert not list(tmp_path.glob("1/runs/*")) and list(tmp_path.glob("1/data/*/train.bin"))


@pytest.mark.slow
def test_machines_whose_texts_or_plans_differ_are_refused_with_a_sentence(nb, machines, tmp_path):
    (tmp_path / "other.txt").write_text("\n\n".join(nb.practice_corpus(600, seed=4)[0]))
    runs = machines({"MAX_STEPS": 6}, {"MAX_STEPS": 7, "DATASET": tmp_path / "other.txt"})
    assert all(run.wait(timeout=240) for run in runs)
    for said in sorted(tmp_path.glob("*/said")):
        (sentence,) = [line for line in said.read_text().split("\n") if "UserError: " in line]
        assert "The processes of this run differ in text, tokenizer, max_steps:" in sentence
    assert not list(tmp_path.glob("*/runs/*/last.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_a_machine_that_dies_ends_the_other_within_a_minute(machines, tmp_path, nb, dies):
    settings = {"MAX_STEPS": 30_000, "TRAINING": TINY["TRAINING"] | {"evaluations": 3_000}}
    runs = machines(settings, settings)
    deadline = time.time() + 240
    while not list(tmp_path.glob("0/runs/*/last.pt")):
        assert time.time() < deadline and runs[0].poll() is None, (tmp_path / "0/said").read_text()
        time.sleep(0.5)
    stop(runs[dies])
    other = 1 - dies
    assert runs[other].wait(timeout=60) != 0
    said = (tmp_path / str(other) / "said").read_text()
    (sentence,) = [line for line in said.split("\n") if "UserError: " in line]
    assert "of this run has died" in sentence
    nb.load_checkpoint(*tmp_path.glob("0/runs/*/last.pt"))  # raises if it is not whole


@pytest.mark.slow
def test_two_machines_that_compile_learn_what_one_learns(machines, tmp_path):
    settings = {"MAX_STEPS": 3, "TRAINING": TINY["TRAINING"] | {"compile": True}}
    ended(machines({"MAX_STEPS": 3}, alone=True), tmp_path)
    said = ended(machines(settings, settings), tmp_path)
    assert "Compiling the model" in said[0] and "torch.compile fails" not in said[0]
    assert losses(tmp_path / "0") == pytest.approx(losses(tmp_path / "alone"), rel=1e-4)


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
    assert done.stderr.startswith("UserError: PRESET: 'smal' is unknown")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_and_leaves_a_whole_checkpoint(
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

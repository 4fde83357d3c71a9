"""The notebook's definitions as a module, and the data that tests share.

The notebook is the only source of its code: `load_notebook` executes its imports, functions,
classes and constants, and nothing that downloads, trains or draws.
"""

import ast
import functools
import json
import linecache
import os
import re
import sys
import types
from pathlib import Path

import pytest

os.environ["MPLBACKEND"] = "Agg"
os.environ["HF_HUB_OFFLINE"] = "1"
# One thread: small models gain nothing from a second, and two that compete with other programs
# for the cores take ten times as long.
os.environ["OMP_NUM_THREADS"] = "1"
for name in [name for name in os.environ if name.startswith("SLM_")]:
    del os.environ[name]

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "slm_from_scratch.ipynb"


def from_environment_or_shared(variable: str, name: str) -> Path | None:
    """A folder named by an environment variable, or in `shared` beside the repository."""
    path = Path(os.environ.get(variable, ROOT.parent / "shared" / name)).resolve()
    return path if path.is_dir() else None


SAMPLE = from_environment_or_shared("TINYSTORIES_SAMPLE", "tinystories-sample")
GPT2_VOCABULARY = from_environment_or_shared("TIKTOKEN_CACHE_DIR", "tiktoken-cache")
needs_sample = pytest.mark.skipif(not SAMPLE, reason="no TinyStories sample at hand")
needs_gpt2 = pytest.mark.skipif(not GPT2_VOCABULARY, reason="no GPT-2 vocabulary at hand")
if GPT2_VOCABULARY:
    os.environ["TIKTOKEN_CACHE_DIR"] = str(GPT2_VOCABULARY)


def code_cells() -> list[str]:
    """The sources of the notebook's code cells."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def defines(node: ast.stmt) -> bool:
    """Whether a statement only defines: an import, a function, a class, a CONSTANT."""
    if isinstance(node, ast.Try):
        return any(isinstance(part, (ast.Import, ast.ImportFrom)) for part in node.body)
    if isinstance(node, ast.Assign):
        names = [n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)]
        return all(re.fullmatch(r"[A-Z][A-Z_0-9]{2,}", name) for name in names)
    return isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))


def load_notebook() -> types.ModuleType:
    """A module `slm_from_scratch` with all that the notebook's cells define."""
    module = types.ModuleType("slm_from_scratch")
    sys.modules[module.__name__] = module  # dataclasses look themselves up there
    for number, source in enumerate(code_cells()):
        tree = ast.parse(source)
        tree.body = [node for node in tree.body if defines(node)]
        name = f"{NOTEBOOK}, code cell {number}"  # for tracebacks, and for coverage_of_cells.py
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        exec(compile(tree, name, "exec"), module.__dict__)
    return module


@pytest.fixture(scope="session")
def nb():
    """The notebook's definitions."""
    return load_notebook()


@pytest.fixture
def folder(nb, tmp_path, monkeypatch):
    """An empty folder that is both the working directory and the notebook's FOLDER."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nb, "FOLDER", tmp_path)
    return tmp_path


@functools.cache
def small_data(nb) -> tuple:
    """300 practice stories, a BPE of 400 tokens learned from them, and their ribbon."""
    stories = nb.practice_corpus(300, seed=5)[0]
    tokenizer = nb.train_bpe(stories, 400)
    return stories, tokenizer, nb.ribbon_of(stories, tokenizer)


def twenty_steps(nb, folder: Path, stop_at=None, seed=1, training=None, **changes):
    """A small run with dropout, trained to step 20 or to `stop_at`, resumed where it stopped."""
    _, tokenizer, ribbon = small_data(nb)
    shape = {"block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32, "dropout": 0.1}
    config = nb.GPTConfig(vocab_size=tokenizer.n_vocab, **shape | changes)
    plan = {"max_steps": 20, "tokens_per_step": 256, "batch_size": 4, "warmup_steps": 4}
    cfg = nb.TrainConfig(**plan | (training or {}))
    cpu = nb.Machine(nb.torch.device("cpu"), nb.torch.float32, "test")
    run = nb.open_run(folder, config, cfg, tokenizer, cpu, seed, quiet=True)
    run.max_steps, run.eval_every, run.eval_stories = 20, 10, 2
    nb.train(run, ribbon, ribbon, tokenizer, cfg, cpu, "Once", stop_at=stop_at)
    return run


@pytest.fixture(scope="session")
def stories(nb) -> list[str]:
    return small_data(nb)[0]


@pytest.fixture(scope="session")
def tokenizer(nb):
    return small_data(nb)[1]


@pytest.fixture(scope="session")
def ribbon(nb):
    return small_data(nb)[2]


@pytest.fixture(scope="session")
def cpu(nb):
    """Plain float32 on the CPU."""
    return nb.Machine(nb.torch.device("cpu"), nb.torch.float32, "test")


@pytest.fixture(scope="session")
def small_model(nb):
    """`small_model(**changes)` builds a small model with seeded weights, without dropout."""

    def build(**changes):
        shape = {"block_size": 16, "vocab_size": 400, "n_layer": 2, "n_head": 2, "n_embd": 32}
        nb.torch.manual_seed(0)
        model = nb.GPT(nb.GPTConfig(**shape | {"dropout": 0.0} | changes))
        for p in model.parameters():  # far from the start, so that outputs differ clearly
            if p.dim() > 1:
                nb.nn.init.normal_(p, std=0.2)
        return model

    return build

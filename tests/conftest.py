"""The notebook's definitions as a module, and the data that tests share.

The notebook is the only source of its code: `load_notebook` executes its imports, functions,
classes and constants, and nothing that downloads, trains or draws.
"""

import ast
import functools
import itertools
import json
import linecache
import os
import re
import sys
import types
from pathlib import Path

import pyarrow.parquet
import pytest
from tiktoken_ext.openai_public import r50k_pat_str

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
if GPT2_VOCABULARY:
    os.environ["TIKTOKEN_CACHE_DIR"] = str(GPT2_VOCABULARY)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Tests that share an expensive fixture stay in one process (`pytest -n 2 --dist loadgroup`)."""
    for item in items:
        for name in {"executed", "fetched", "run_again"} & set(item.fixturenames):
            item.add_marker(pytest.mark.xdist_group(name))


def code_cells() -> list[str]:
    """The sources of the notebook's code cells."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def default_settings() -> dict:
    """The values in the notebook's settings cell."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    (cell,) = (c for c in cells if "parameters" in c["metadata"].get("tags", []))
    values = {}
    exec("".join(cell["source"]), values)
    del values["__builtins__"]
    return values


DEFAULTS = default_settings()


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


def made_of(nb, machine, model, batch_size, scaler=None, forward=None, optimizers=None, **training):
    """As much of a run as `training_step` needs."""
    cfg = nb.TrainConfig(**training)
    return types.SimpleNamespace(
        model=model,
        forward=forward or model,
        optimizers=optimizers or nb.make_optimizers(model, cfg, machine.dtype),
        scaler=scaler or machine.scaler(),
        cfg=cfg,
        machine=machine,
        batch_size=batch_size,
    )


@functools.cache
def small_data(nb) -> tuple:
    """300 practice stories, a BPE of 400 tokens learned from them, and their stream."""
    stories = nb.practice_corpus(300, seed=5)[0]
    tokenizer = nb.train_bpe(stories, 400)
    return stories, tokenizer, nb.encode_stories(stories, tokenizer)


def twenty_steps(nb, folder: Path, stop_at=None, seed=1, training=None, **changes):
    """A small run with dropout, trained to step 20 or to `stop_at`, resumed where it stopped."""
    _, tokenizer, stream = small_data(nb)
    shape = {"block_size": 32, "n_layer": 2, "n_head": 2, "n_embd": 32, "dropout": 0.1}
    config = nb.GPTConfig(vocab_size=tokenizer.n_vocab, **shape | changes)
    plan = {"max_steps": 20, "tokens_per_step": 256, "batch_size": 4, "warmup_steps": 4}
    cfg = nb.TrainConfig(**plan | (training or {}))
    cpu = nb.Machine(nb.torch.device("cpu"), nb.torch.float32, "test")
    run = nb.open_run(folder, config, cfg, tokenizer, cpu, seed)
    run.max_steps, run.eval_every, run.eval_tokens = 20, 10, 500
    nb.train(run, stream, stream, stop_at=stop_at)
    return run


def write_dataset(nb, folder: Path) -> Path:
    """A folder in the hub's layout, with 14,000 and 400 practice stories."""
    for seed, (split, n) in enumerate({"train": 14_000, "validation": 400}.items()):
        table = pyarrow.table({"text": nb.practice_corpus(n, seed)[0]})
        pyarrow.parquet.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="session")
def sample(nb, tmp_path_factory) -> Path:
    """The TinyStories sample or, where it is not at hand, practice stories in its layout."""
    return SAMPLE or write_dataset(nb, tmp_path_factory.mktemp("sample"))


@functools.cache
def like_gpt2(nb):
    """A stand-in for GPT-2's vocabulary: learned from practice stories, filled up to its size."""
    merges = nb.train_bpe(nb.practice_corpus(2_000, seed=1)[0], 2_000).merges
    a, b, c = range(128, 170), range(170, 212), range(212, 254)  # bytes that no story has
    pairs = list(itertools.product(a, b))
    triples = itertools.product(range(256 + len(merges), 256 + len(merges) + len(pairs)), c)
    ranks = nb.encoding_from_merges([*merges, *pairs, *triples][:50_000])._mergeable_ranks
    return nb.tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={nb.EOT: 50_256}
    )


@pytest.fixture
def gpt2(nb, monkeypatch):
    """GPT-2's vocabulary or, where it is not at hand, one of our own in its place."""
    if not GPT2_VOCABULARY:
        monkeypatch.setattr(nb.tiktoken, "get_encoding", lambda name: like_gpt2(nb))
    return nb.restore_tokenizer({"name": "gpt2"})


@pytest.fixture(scope="session")
def stories(nb) -> list[str]:
    return small_data(nb)[0]


@pytest.fixture(scope="session")
def tokenizer(nb):
    return small_data(nb)[1]


@pytest.fixture(scope="session")
def stream(nb):
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

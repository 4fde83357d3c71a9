"""Each concept is broken on purpose, and a check of the notebook must notice.

The cells run in order in one process. Where a breakage belongs to a cell, a copy of the process
(a fork) goes on with that cell broken, until an exception ends it or the notebook is through.
"""

import functools
import json
import os
import shutil
import sys
import tempfile
import traceback
import types

import pytest
from conftest import code_cells

BREAKAGES = {  # what is broken: (what stands in the notebook, what takes its place)
    "the splits share their stories": (
        "lambda s: in_batches(stories[s]), sizes)",
        'lambda s: in_batches(stories["train"]), sizes)',
    ),
    "BPE does not recount touched pairs": ("pair_counts[old] -= n", "pass"),
    "BPE breaks ties by chance": ("(-count, pair) for pair", "(-count, pair[::-1]) for pair"),
    "tokens are put together the wrong way round": (
        "tokens[left] + tokens[right]",
        "tokens[right] + tokens[left]",
    ),
    "no end-of-text between stories": (
        'story.replace(EOT, " ") + EOT for',
        'story.replace(EOT, " ") for',
    ),
    "token ids in 8 bits": ("{EOT}).astype(np.uint16)", "{EOT}).astype(np.uint8)"),
    "the memory map reads other numbers": (
        'np.memmap(path, np.uint16, mode="r")\n    print',
        'np.memmap(path, np.int16, mode="r")[::-1]\n    print',
    ),
    "the naive trainer merges the rarest pair": ("(-pairs[pair], pair)", "(pairs[pair], pair)"),
    "targets are not shifted": (
        "return windows[:, :-1], windows[:, 1:]",
        "return windows[:, :-1], windows[:, :-1]",
    ),
    "batches do not depend on the step": (
        "np.arange(step * batch_size, (step + 1)",
        "np.arange(0, (0 + 1)",
    ),
    "batches cannot be repeated": (
        "starts[shuffled(len(starts), batch_size, seed, step)]",
        "np.random.default_rng().choice(starts, batch_size)",
    ),
    "an epoch reads some windows twice": ("permutation(n)", "integers(n, size=n)"),
    "windows begin anywhere": (
        "for i in range(a, b, block_size)",
        "for i in range(a + 1, b, block_size)",
    ),
    "the gradient by hand has the wrong sign": ("(loss_of(1.0 + 1e-4) -", "(loss_of(1.0 + 1e-4) +"),
    "the chain rule forgets a link": ("by_h = by_z * h, by_z * b", "by_h = by_z * h, by_z"),
    "attention weights do not sum to one": (
        "weights = scores.softmax(dim=-1)\nprint",
        "weights = scores.exp()\nprint",
    ),
    "the toy keeps large scores": ("in (raw / math.sqrt(D), raw)", "in (raw, raw)"),
    "the mask by hand lets one token through": (".triu(1)", ".triu(2)"),
    "no division by the root of D": ("scores = (q / math.sqrt(D))", "scores = q"),
    "no mask in the model": ("is_causal=first)", "is_causal=False)"),
    "the heads are put together wrongly": ("y.transpose(1, 2).flatten(2)", "y.reshape(x.shape)"),
    "rotations depend on nothing": (
        "angles = positions[:, None]",
        "angles = 0 * positions[:, None]",
    ),
    "rotations are stretched, not turned": ("a * sin + b * cos", "a * sin - b * cos"),
    "the model forgets positions": ("rotation = rope_cos_sin(positions", "rope_cos_sin(positions"),
    "no residual connection": ("x = x + self.attn(self.ln_1", "x = self.attn(self.ln_1"),
    "the last LayerNorm does nothing": ("return self.transformer.ln_f(x)", "return x"),
    "the weights are not tied": ("self.lm_head.weight = self.transformer.wte.weight", "pass"),
    "the initial weights are large": (
        "if adds else 0.02)",
        "if adds else 1.0)",
    ),
    "c_proj is not started smaller": (
        "std=0.02 / math.sqrt(2 * config.n_layer) if adds",
        "std=0.02 if adds",
    ),
    "the sliced loss is no mean": ("detach())) / len(hidden)", "detach()))"),
    "the sliced gradient forgets the minus one": ("p.gather(1, t) - 1)", "p.gather(1, t))"),
    "what carries the gradients counts in the loss": ("(carrier - carrier.detach())", "carrier"),
    "matrices do not decay": (
        'if p.dim() >= 2], "weight_decay"',
        'if p.dim() < 2], "weight_decay"',
    ),
    "the schedule rises": ("0.5 * (1 + math.cos", "0.5 * (1 - math.cos"),
    "the warm-up begins at zero": ("cfg.learning_rate * (step + 1)", "cfg.learning_rate * step"),
    "micro-batches count in full": ("[1] * (len(xs) / len(x))", "[1]"),
    "gradients are clipped before they are unscaled": ("run.scaler.unscale_(optimizer)", "pass"),
    "nothing is clipped": ("run.cfg.grad_clip)", "1e9)"),
    "old gradients stay": (
        "run.model.zero_grad(set_to_none=True)\n    return total",
        "return total",
    ),
    "the optimizer never moves": ("run.scaler.step(optimizer)", "pass"),
    "measuring with dropout": (
        "was_training = next(model.parameters()).device, model.training\n    model.eval()",
        "was_training = next(model.parameters()).device, model.training",
    ),
    "nats are sold as bits": ("losses.sum().item() / math.log(2)", "losses.sum().item()"),
    "tokens are scored twice": ("overlap if first else 0", "0"),
    "the last token of a story is not scored": (
        "np.concatenate([[eot], story])",
        "np.concatenate([[eot], story[:-1]])",
    ),
    "a checkpoint's weights are not used": ("    model.load_state_dict(state)", "    pass"),
    "the optimizer's state is forgotten": (
        'optimizer.load_state_dict(optimizer.state_dict() | {"state": state})',
        "pass",
    ),
    "dropout cannot be repeated": (
        "torch.manual_seed((run.seed * 1_000_003",
        "print((run.seed * 1_000_003",
    ),
    "the cache forgets where it is": ("torch.arange(past, past + ", "torch.arange(0, "),
    "the cache keeps nothing": (
        "k, v = cache[:, :, :, :end]",
        "k, v = cache[:, :, :, end - 1 : end]",
    ),
    "the cache is masked": ("is_causal=first)", "is_causal=True)"),
    "a leak is none": ("(q, k, v)  # is_causal=True is missing", "(q, k, v, is_causal=True)"),
    "ten stories are enough": ("short_run(many[:10])", "short_run(many)"),
    "the rate that is too high is not": ("short_run(many, 0.1)", "short_run(many, 0.01)"),
    "temperature the wrong way round": (
        "logits = logits.float() / max(temperature",
        "logits = logits.float() * max(temperature",
    ),
    "top-k keeps one": ("dim=-1).values[:, -1:]", "dim=-1).values[:, :1]"),
    "top-p keeps all": ("before >= top_p", "before >= 2"),
    "the softmax is forgotten": (
        "probs = logits.softmax(dim=-1)\n    if top_p",
        "probs = logits.exp()\n    if top_p",
    ),
}

# These are noticed too, but by an error before the check could speak.
STOPPED_OTHERWISE = set()


def run_from(first: int, cells: list[str], names: dict) -> str:
    """Execute cells from `first` on; returns where an exception came, or "" at the end."""
    for number in range(first, len(cells)):
        try:
            exec(compile(cells[number], f"<cell {number}>", "exec"), names)
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)
            lines = [f.lineno for f in last if f.filename == f"<cell {number}>"]
            line = cells[number].splitlines()[lines[0] - 1] if lines else ""
            return f"{type(error).__name__} in cell {number}: {line.strip() or error}"
    return ""


def in_a_copy(function, folder) -> str:
    """What `function` returns in a fork of this process that works in a copy of `folder`."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reader)
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1), os.dup2(devnull, 2)
        with tempfile.TemporaryDirectory() as copy:
            shutil.copytree(folder, copy, dirs_exist_ok=True)
            os.chdir(copy)
            answer = function()
        os.write(writer, json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return json.loads(answer) if answer else "the process died"


@pytest.mark.slow
def test_every_breakage_is_noticed(nb, tmp_path, monkeypatch):
    texts = tmp_path.with_name("stories")
    texts.mkdir()
    for split, seed, n in (("train", 0, 400), ("valid", 1, 60)):
        lines = [json.dumps({"text": s}) + "\n" for s in nb.practice_corpus(n, seed)[0]]
        (texts / f"{split}.jsonl").write_text("".join(lines))
    settings = {
        "PRESET": "laptop",
        "DATASET": str(texts),
        "MODEL": {"vocab_size": 512, "n_embd": 48, "block_size": 64, "dropout": 0.1},
        "TRAINING": {"precision": "float32", "evaluations": 2, "tokens_per_step": 512},
        "MAX_STEPS": 12,
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"SLM_{name}", str(value))
    monkeypatch.chdir(tmp_path)
    cells, found = code_cells(), {}
    module = types.ModuleType("broken")
    monkeypatch.setitem(sys.modules, "broken", module)  # dataclasses look themselves up there
    for number, cell in enumerate(cells):
        for name, (old, new) in BREAKAGES.items():
            if old in cell and name not in found:
                broken = cells[:number] + [cell.replace(old, new)] + cells[number + 1 :]
                broken_run = functools.partial(run_from, number, broken, module.__dict__)
                found[name] = in_a_copy(broken_run, tmp_path)
        exec(compile(cell, f"<cell {number}>", "exec"), module.__dict__)
    for name in BREAKAGES:
        print(f"BROKEN {name}: {found.get(name, 'NOT FOUND') or 'NOT NOTICED'}")
    noticed = {name for name, how in found.items() if how.startswith("AssertionError")}
    assert set(BREAKAGES) - noticed == STOPPED_OTHERWISE
    assert all(found[name] for name in STOPPED_OTHERWISE)

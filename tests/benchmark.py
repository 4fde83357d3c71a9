"""How fast the notebook is, beside plain versions in the manner of most notebooks.

    python tests/benchmark.py            # under 10 minutes on two cores
    python tests/benchmark.py --quick    # under a minute, fewer repeats

Each row is measured in a process of its own, the variants of a row in turns; figures are
medians with minimum and maximum. What is slow on a machine is repeated less often there. The text is the TinyStories sample where it is at hand
(see conftest.py), else the practice corpus.
"""

import argparse
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import numpy as np
import torch
import torch.nn.functional as F
from conftest import GPT2_VOCABULARY, ROOT, SAMPLE, like_gpt2, load_notebook, made_of

nb = load_notebook()
nb.WORLD, nb.RANK = 1, 0
CORES = os.cpu_count()
torch.set_num_threads(CORES)  # the tests take one thread; here all cores count
LIMIT = 12.0  # seconds after which a measurement is not repeated


def stories() -> list[str]:
    """Training stories: the sample's, or practice."""
    if SAMPLE:
        return [s for batch in nb.file_source(SAMPLE).batches("train") for s in batch]
    return nb.practice_corpus(20_000, 0)[0]


def tokenizer():
    """GPT-2's where its vocabulary is at hand, else our own of 4,096."""
    return nb.restore_tokenizer({"name": "gpt2"}) if GPT2_VOCABULARY else own_tokenizer()


def own_tokenizer():
    return nb.train_bpe(stories()[:5_000], 4_096)


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turns(variants: dict, repeats: int) -> dict[str, list[float]]:
    """Seconds of each variant, called in turns, without its first call if there are others."""
    times = {name: [] for name in variants}
    for name in list(variants) * (repeats + 1):
        if sum(times[name]) < LIMIT:
            times[name].append(seconds(variants[name]))
    return {name: values[1:] or values for name, values in times.items()}


def rates(times: dict, amount: float) -> dict[str, list[float]]:
    return {name: [amount / t for t in values] for name, values in times.items()}


def preparation(repeats):
    """MB of text per second, from stories to train.bin (GPT-2 tokens)."""
    import datasets

    datasets.disable_progress_bars()
    texts, tok = stories(), tokenizer()
    texts = texts * (1 if repeats < 3 else 4)
    size = sum(len(text.encode()) for text in texts) / 1e6
    plain = texts[: len(texts) // 8] if repeats < 3 else texts
    plain_size = sum(len(text.encode()) for text in plain) / 1e6
    shards = max(1, len(plain) // 55)  # 1,024 for the sample four times over, as is usual
    one_string = "\n".join(texts[: len(texts) // 4])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.bin"

        def ours():
            nb.write_tokens(nb.in_batches(iter(texts)), tok, path, None, "benchmark")

        def mapped():  # per example, then through 1,024 shards into a memmap
            data = datasets.Dataset.from_dict({"text": plain})

            def encode(row):
                ids = [*tok.encode_ordinary(row["text"]), tok.eot_token]
                return {"ids": ids, "len": len(ids)}

            data = data.map(encode, remove_columns="text", num_proc=CORES)
            length = int(np.sum(data["len"], dtype=np.uint64))
            out = np.memmap(Path(folder) / "mapped.bin", np.uint16, "w+", shape=(length,))
            at = 0
            for i in range(shards):
                shard = data.shard(shards, i, contiguous=True).with_format("numpy")
                ids = np.concatenate(shard["ids"])
                out[at : at + len(ids)] = ids
                at += len(ids)
            out.flush()

        result = rates(in_turns({"ours": ours}, repeats), size)
        result |= rates(in_turns({"datasets.map, shards, memmap": mapped}, 1), plain_size)
        alone = {"tiktoken, one string, one thread": lambda: tok.encode_ordinary(one_string)}
        result |= rates(in_turns(alone, repeats), len(one_string.encode()) / 1e6)
    return result, "MB/s"


def bpe(repeats):
    """Seconds to learn 4,096 tokens."""
    import tokenizers

    texts = stories()

    def rust():
        model = tokenizers.Tokenizer(tokenizers.models.BPE())
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(nb.SPLIT_PATTERN), "isolated")
        by_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, by_bytes])
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=4_096, initial_alphabet=alphabet, show_progress=False
        )
        model.train_from_iterator(texts, trainer)

    variants = {"ours (Python)": lambda: nb.train_bpe(texts, 4_096), "tokenizers (Rust)": rust}
    return in_turns(variants, repeats), "s"


def batch(repeats):
    """Milliseconds for a batch of 32 x 256."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stream.bin"
        np.random.default_rng(0).integers(0, 50_000, 20_000_000).astype(np.uint16).tofile(path)
        stream = np.memmap(path, np.uint16, "r")
        starts = np.arange(0, len(stream) - 257, 200)

        def slices():  # the file opened anew, one slice after the other
            data = np.memmap(path, np.uint16, "r")
            ix = torch.randint(len(data) - 256, (32,))
            torch.stack([torch.from_numpy(data[i : i + 256].astype(np.int64)) for i in ix])
            torch.stack([torch.from_numpy(data[i + 1 : i + 257].astype(np.int64)) for i in ix])

        many = 200
        variants = {
            "ours": lambda: [nb.get_batch(stream, 32, 256, 0, t, starts) for t in range(many)],
            "list of slices": lambda: [slices() for _ in range(many)],
        }
        times = in_turns(variants, repeats)
    return {name: [1e3 * t / many for t in values] for name, values in times.items()}, "ms"


def training(preset: str, variant: str, repeats: int):
    """Tokens per second of whole optimizer steps, and peak memory in MB."""
    row = nb.PRESETS[preset]
    config = nb.GPTConfig(**row["model"])
    windows = 8 if preset == "laptop" or repeats < 3 else 32
    x, y = torch.randint(config.vocab_size, (2, windows, config.block_size))
    torch.manual_seed(0)
    model = nb.GPT(config)
    if variant == "plain":  # float32, logits in full, nothing fused, nothing kept
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def step():
            logits = model(x)[0]
            F.cross_entropy(logits.view(-1, logits.shape[-1]), y.flatten()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    else:
        if variant == "fused":  # ours, but with PyTorch's attention in place of that by hand
            fused = F.scaled_dot_product_attention
            nb.attention_by_hand = lambda q, k, v: (fused(q, k, v, is_causal=True), None)
        nb.keep_big_buffers()
        machine = nb.Machine(torch.device("cpu"), *nb.choose_precision(torch.device("cpu")))
        changes = {"optimizer": "adamw"} if variant == "adamw" else {}
        changes |= {"learning_rate": 1e-4, "min_lr": 1e-5}
        changes |= {"batch_size": min(windows, 16)}
        run = made_of(nb, machine, model, **row["training"] | changes)

        def step():
            nb.training_step(run, x, y, 1e-4)

    step()
    at_once = max(1, min(20, round(1.5 / seconds(step))))  # steps per measurement

    def steps():
        for _ in range(at_once):
            step()

    amount = at_once * windows * config.block_size
    speeds = rates(in_turns({"": steps}, repeats), amount)[""]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    work = nb.flops_per_token(config) * windows * config.block_size
    if variant in ("ours", "fused") and row["training"].get("optimizer") == "muon":
        work += sum(muon_flops(*p.shape) for p in model.transformer.h.parameters() if p.dim() == 2)
    rate = work / (windows * config.block_size) * statistics.median(speeds)
    dtype = "torch.float32" if variant == "plain" else str(machine.dtype)
    return {"speed": speeds, "peak": peak, "flops": rate, "dtype": dtype}


def muon_flops(rows: int, columns: int) -> float:
    """Operations to orthogonalise a matrix: five rounds of three products."""
    a, b = sorted((rows, columns))
    return 5 * 2 * (a * a * b + a * a * a + a * a * b)


def beside(repeats):
    """Tokens per second of `laptop` beside a busy program, with and without early sleep."""
    command = [sys.executable, __file__, "--only", "training laptop ours", "--repeats", "2"]
    found = {"ours: threads sleep early": [], "threads spin, the default": []}
    start = time.perf_counter()
    for name in list(found) * repeats:
        if found[name] and time.perf_counter() - start > 60:
            break
        environment = os.environ | ({"GOMP_SPINCOUNT": "1000"} if "ours" in name else {})
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, check=True
            )
        finally:
            busy.kill()
        found[name] += json.loads(done.stdout.splitlines()[-1])["speed"]
    return found, "tokens/s"


def generation(repeats):
    """Tokens per second, 30 M parameters, 200 tokens after 8, greedy."""
    torch.manual_seed(0)
    model = nb.GPT(nb.GPTConfig(block_size=256)).eval()
    start = torch.randint(50_257, (1, 8))
    written = {}

    def write(use_cache):
        written[use_cache] = model.generate(start, 200, temperature=0.0, use_cache=use_cache)

    times = in_turns(
        {"ours (cache)": lambda: write(True), "no cache": lambda: write(False)}, repeats
    )
    assert torch.equal(written[True], written[False])
    return rates(times, 200), "tokens/s"


def beside_llama(size: str, repeats: int):
    """Tokens per second on one thread, 200 tokens, greedy: ours and llama.cpp's, same weights."""
    from test_gguf import LlamaCpp

    torch.set_num_threads(1)
    if size == "4.2M":
        model, tok, _ = nb.load_model(ROOT / "best_model_params.pt")
    else:
        torch.manual_seed(0)
        model, tok = nb.GPT(nb.GPTConfig(block_size=256)).eval(), like_gpt2(nb)
    start = torch.tensor([[tok.eot_token, *tok.encode_ordinary("Once upon a time")]])
    question = {"n_predict": 200, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
    found, written = {"ours": [], "llama.cpp, float16": []}, []
    with tempfile.TemporaryDirectory() as folder:
        llama = LlamaCpp(nb, model, tok, Path(folder))
        for _ in range(repeats + 1):
            took = seconds(lambda: written.append(model.generate(start, 200, temperature=0.0)))
            found["ours"].append(200 / took)
            reply = llama.ask("/completion", prompt="Once upon a time", **question)
            found["llama.cpp, float16"].append(reply["timings"]["predicted_per_second"])
        del llama
    return {name: values[1:] for name, values in found.items()}, "tokens/s"


def matrix_rate(dtype) -> tuple[float, int]:
    """(operations per second, n) of n x n matrix products that take some 50 ms or more."""
    for n in (256, 512, 1_024, 2_048, 4_096):
        m = torch.randn(n, n).to(dtype)
        if min(in_turns({"": lambda m=m: m @ m}, 3)[""]) > 0.05:
            break
    return 2 * n**3 / nb.call_seconds(lambda: m @ m), n


def processor() -> str:
    """Its name, and which instructions for matrix products it has and PyTorch uses."""
    name, flags = platform.processor() or platform.machine(), []
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = dict(line.replace("\t", "").split(": ", 1) for line in lines if ": " in line)
        name, flags = fields.get("model name", name), fields.get("flags", "").split()
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    has = ", ".join(flag for flag in known if flag in flags) or "none of " + ", ".join(known)
    return f"{name}; it has {has}; PyTorch uses {torch.backends.cpu.get_cpu_capability()}"


def measure(name: str, repeats: int):
    """Run one measurement in a process of its own; returns what it found."""
    command = [sys.executable, __file__, "--only", name, "--repeats", str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(what, name, values, unit, remark=""):
    middle = statistics.median(values)
    text = f"{middle:,.3g}" if middle < 1_000 else f"{middle:,.0f}"
    low, high = (f"{v:,.3g}" if v < 1_000 else f"{v:,.0f}" for v in (min(values), max(values)))
    print(f"| {what} | {name} | {text} {unit} | {low} to {high} | {remark} |", flush=True)


def main(repeats: int):
    text = "TinyStories sample" if SAMPLE else "practice corpus"
    print(f"{processor()}, {CORES} cores, torch {torch.__version__}")
    print(f"text: {text}; vocabulary: {'GPT-2' if GPT2_VOCABULARY else 'own'}\n")
    print("| what | variant | median | range | remark |\n| --- | --- | --- | --- | --- |")
    names = ["preparation", "bpe", "batch", "generation"]
    if importlib.util.find_spec("gguf") and importlib.util.find_spec("xllamacpp"):
        names += ["beside_llama 4.2M", "beside_llama 30M"]
    for name in names:
        found, unit = measure(name, repeats)
        first = next(iter(found))
        ours = statistics.median(found[first])
        for variant, values in found.items():
            ratio = ours / statistics.median(values)
            remark = "" if variant == first else f"ours / this: {ratio:.2f}"
            what = name.replace("beside_llama", "generation, one thread,")
            row(what, variant, values, unit, remark)
    bfloat16, float32 = matrix_rate(torch.bfloat16), matrix_rate(torch.float32)
    rate = max(bfloat16[0], float32[0])
    for preset in ("slm", "laptop"):
        what = f"training `{preset}`"
        plain = measure(f"training {preset} plain", repeats)
        ours = measure(f"training {preset} ours", repeats)
        speedup = statistics.median(ours["speed"]) / statistics.median(plain["speed"])
        remark = (
            f"{speedup:.2f} x plain; {ours['flops'] / rate:.0%} of the matrix rate; peak "
            f"{ours['peak']:,.0f} MB against {plain['peak']:,.0f}"
        )
        muon = nb.PRESETS[preset]["training"].get("optimizer") == "muon"
        row(what, "ours, with Muon" if muon else "ours", ours["speed"], "tokens/s", remark)
        row(what, "plain float32 loop, AdamW", plain["speed"], "tokens/s")
        others = {"adamw": "ours, with AdamW"} if muon else {}
        if ours["dtype"] == "torch.bfloat16":  # elsewhere it is what the model uses
            others["fused"] = "ours, PyTorch's attention"
        for variant, name in others.items():
            speed = measure(f"training {preset} {variant}", repeats)["speed"]
            ratio = statistics.median(ours["speed"]) / statistics.median(speed)
            row(what, name, speed, "tokens/s", f"ours / this: {ratio:.2f}")
    found, unit = measure("beside", 1 if repeats < 3 else 3)
    first, second = found
    ratio = statistics.median(found[first]) / statistics.median(found[second])
    row("`laptop` beside a busy program", first, found[first], unit)
    row("`laptop` beside a busy program", second, found[second], unit, f"ours / this: {ratio:.2f}")
    for name, (rate, n) in {"bfloat16": bfloat16, "float32": float32}.items():
        print(f"\nmatrix rate, {name}: {rate / 1e9:,.0f} GFLOP/s ({n:,} x {n:,})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats, under a minute")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.only:
        main(1 if arguments.quick else arguments.repeats)
    else:
        name, *rest = arguments.only.split()
        found = globals()[name](*rest, arguments.repeats)
        print(json.dumps(found))

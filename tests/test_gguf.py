"""The exported GGUF file in llama.cpp: the same ids, the same story, the same bits per byte."""

import json
import math
import urllib.request

import pyarrow.parquet
import pytest
from conftest import ROOT

gguf = pytest.importorskip("gguf")
xllamacpp = pytest.importorskip("xllamacpp")


class LlamaCpp:
    """llama.cpp's server, with a model that is exported for it."""

    def __init__(self, nb, model, tokenizer, folder):
        self.tokenizer = tokenizer
        nb.export_to_gguf(model, tokenizer, folder / "model.gguf")
        settings = xllamacpp.CommonParams()
        settings.model.path = str(folder / "model.gguf")
        settings.n_parallel = settings.cpuparams.n_threads = 1
        settings.verbosity = 0
        self.server = xllamacpp.Server(settings)

    def ask(self, path: str, **question) -> dict:
        address, data = self.server.listening_address + path, json.dumps(question).encode()
        request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def encode(self, text: str, **options) -> list[int]:
        return self.ask("/tokenize", content=text, **options)["tokens"]

    def log_probability(self, ids: list[int], target: int) -> float:
        """Of the token `target` after `ids`; the bias makes it the one that is reported."""
        options = {"n_predict": 1, "n_probs": 1, "temperature": 0.0}
        reply = self.ask("/completion", prompt=ids, logit_bias=[[target, 1e6]], **options)
        (reported,) = reply["completion_probabilities"]
        assert reported["id"] == target
        return reported["logprob"]

    def bits_per_byte(self, stories: list[str]) -> float:
        """Of stories that fit into the context, end-of-text included."""
        nats, eot = 0.0, self.tokenizer.eot_token
        for story in stories:
            ids = [eot, *self.encode(story), eot]
            nats -= sum(self.log_probability(ids[:i], ids[i]) for i in range(1, len(ids)))
        return nats / math.log(2) / sum(len(story.encode()) for story in stories)


def validation_stories(folder) -> list[str]:
    (path,) = folder.rglob("validation-*.parquet")
    return pyarrow.parquet.read_table(path)["text"].to_pylist()


SHAPES = [{}, {"tie_weights": False}, {"bias": False}, {"rope": True}]
SHAPES += [{"rope": True, "bias": False, "tie_weights": False}]


@pytest.mark.parametrize("changes", SHAPES, ids=str)
def test_llama_cpp_gives_the_same_story_and_bits_per_byte(
    nb, small_model, stories, tokenizer, tmp_path, changes
):
    model = small_model(vocab_size=tokenizer.n_vocab, block_size=64, **changes).eval()
    with nb.torch.no_grad():
        for name, p in model.named_parameters():  # as if they had been learned
            if name.endswith("bias"):
                nb.nn.init.normal_(p, std=0.2)
    llama = LlamaCpp(nb, model, tokenizer, tmp_path)
    some = [story[:120] for story in stories[:3]]
    ours = nb.bits_per_byte(model, tokenizer, some)
    assert llama.bits_per_byte(some) == pytest.approx(ours, abs=0.001)
    told = llama.ask(
        "/completion", prompt="Once", n_predict=30, temperature=0.0, return_tokens=True
    )
    start = nb.torch.tensor([[tokenizer.eot_token, *tokenizer.encode_ordinary("Once")]])
    assert (
        told["tokens"] == model.generate(start, 30, temperature=0.0)[0, start.shape[1] :].tolist()
    )


HARD = [
    "naïve 🦊  \n\n 12345 it's",
    "  \ttabs\r\n \n",
    "DON'T 'S 'll",
    "日本語 e\u0301",
    "a\u00a0\u00a0b",
]


@pytest.mark.parametrize("kind", ["bpe", "gpt2"])
def test_llama_cpp_finds_tiktokens_ids_in_all_validation_stories(
    nb, sample, request, tmp_path, kind
):
    texts = validation_stories(sample)
    given = request.getfixturevalue("gpt2") if kind == "gpt2" else nb.train_bpe(texts, 4_096)
    shape = {"block_size": 16, "n_layer": 1, "n_head": 1, "n_embd": 8}
    model = nb.GPT(nb.GPTConfig(vocab_size=given.n_vocab, **shape))
    llama = LlamaCpp(nb, model, given, tmp_path)
    for text in texts + HARD:
        ids = given.encode_ordinary(text)
        assert llama.encode(text) == ids
    assert llama.encode(text, add_special=True) == [given.eot_token, *ids]
    assert llama.ask("/detokenize", tokens=ids)["content"] == text


def test_the_published_weights_tell_the_same_story_in_llama_cpp(nb, sample, tmp_path):
    model, tokenizer, _ = nb.load_model(ROOT / "best_model_params.pt")
    llama = LlamaCpp(nb, model, tokenizer, tmp_path)
    some = [story[:500] for story in validation_stories(sample)[:3]]
    ours = nb.bits_per_byte(model, tokenizer, some)
    assert llama.bits_per_byte(some) == pytest.approx(ours, abs=0.001)
    prompt = "Once upon a time"
    told = llama.ask("/completion", prompt=prompt, n_predict=100, temperature=0.0)["content"]
    assert prompt + told == nb.generate_text(model, tokenizer, prompt, 100, temperature=0.0)


def test_a_full_disk_leaves_the_earlier_file(nb, small_model, tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    nb.export_to_gguf(small_model(), tokenizer, path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(nb.UserError, match="No space left"):
        nb.export_to_gguf(small_model(n_layer=1), tokenizer, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]

"""Stories and their sources, the ribbon on disk, and batches."""

import math
import random
from collections import Counter

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import SAMPLE, needs_gpt2, needs_sample


# The practice corpus.
def test_practice_corpus_depends_on_the_seed_alone(nb):
    assert nb.practice_corpus(20, 7) == nb.practice_corpus(20, 7)
    assert nb.practice_corpus(20, 7)[0] != nb.practice_corpus(20, 8)[0]


def test_practice_probability_belongs_to_the_text(nb):
    """However a text came about, its probability is the same (the entropy needs that)."""
    by_text = {}
    for text, logp in zip(*nb.practice_corpus(20_000, 3)):
        assert math.isclose(by_text.setdefault(text, logp), logp, rel_tol=1e-12)


def test_practice_probability_is_what_sampling_gives(nb, monkeypatch):
    """In a grammar of a few stories, frequencies match exp(logp), and these sum to one."""
    monkeypatch.setattr(nb, "PLOTS", [[nb.parse("{A|{who:GIRL}} b.\n/ c.")], [nb.parse("{x|y}")]])
    monkeypatch.setitem(nb.WORDS, "GIRL", ["Lily", "Mia"])
    texts, logps = nb.practice_corpus(8_000, 0)
    probability, counts = dict(zip(texts, map(math.exp, logps))), Counter(texts)
    assert math.isclose(sum(probability.values()), 1.0)
    for text, p in probability.items():
        assert abs(counts[text] / 8_000 - p) < 5 * math.sqrt(p / 8_000)


def test_practice_stories_leave_no_slot_open(nb, stories):
    assert not [s for s in stories if nb.regex.search(r"[{}|@_]|\b[A-Z]{2,}\b|  ", s)]


def test_practice_pronouns_agree_with_the_name(nb):
    girls, boys = (set(nb.WORDS[kind]) for kind in ("GIRL", "BOY"))
    for text in nb.practice_corpus(500, 1)[0]:
        words = set(nb.regex.findall(r"\w+", text))
        assert bool(words & girls) != bool(words & boys)
        wrong = {"he", "him", "his"} if words & girls else {"she", "her"}
        assert not words & wrong, text


def test_practice_splits_share_almost_nothing(nb):
    source = nb.practice_source(3_000, 300)
    train, held_out = ([s for b in source.batches(p) for s in b] for p in source.totals)
    assert (len(train), len(held_out)) == (3_000, 300) == tuple(source.totals.values())
    assert len(source.best_nats) == 300
    assert len(set(train) & set(held_out)) < 0.05 * len(held_out)


# Own files and dataset folders.
def write(path, text, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode(encoding))
    return path


def all_of(source, split):
    return [story for batch in source.batches(split) for story in batch]


def test_text_is_split_at_end_of_text_marks(nb, tmp_path):
    path = write(tmp_path / "a.txt", f"one\n\nstill one{nb.EOT}\ntwo\n{nb.EOT}  {nb.EOT}")
    assert [t.strip() for t in nb.documents_in(path, alone=True)] == ["one\n\nstill one", "two"] + [
        ""
    ] * 2


def test_a_mark_across_two_read_blocks_is_found(nb, tmp_path):
    long = "x" * ((1 << 20) - 5)
    path = write(tmp_path / "a.txt", f"y{nb.EOT}{long[:-20]}{nb.EOT}end")
    assert list(nb.documents_in(path, alone=True)) == ["y", long[:-20], "end"]


def test_a_lone_text_without_marks_is_cut_at_blank_lines(nb, tmp_path):
    path = write(tmp_path / "book.txt", "first\nparagraph\n\nsecond\n\n\n\nthird")
    docs = {*all_of(s := nb.file_source(path), "train"), *all_of(s, "validation")}
    assert docs == {"first\nparagraph", "second", "third"}


def test_several_texts_are_one_document_each(nb, tmp_path):
    for i in range(40):
        write(tmp_path / "mine" / f"{i}.txt", f"story {i}\n\nand its end")
    source = nb.file_source(tmp_path / "mine")
    documents = all_of(source, "train") + all_of(source, "validation")
    assert sorted(documents) == sorted(f"story {i}\n\nand its end" for i in range(40))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_are_documents(nb, tmp_path, kind):
    texts = [f"story {i} – naïve 🦊\nwith a line" for i in range(50)]
    path = tmp_path / f"mine.{kind}"
    if kind == "jsonl":
        write(path, "\n".join(nb.json.dumps({"text": text}) for text in texts) + "\n\n")
    else:
        table = pyarrow.table({"id": range(50), "text": texts})
        pyarrow.parquet.write_table(table, path)
    source = nb.file_source(path)
    assert sorted(all_of(source, "train") + all_of(source, "validation")) == sorted(texts)


def test_the_hash_split_is_disjoint_complete_and_about_one_in_twenty(nb, tmp_path):
    texts = [f"story number {i}" for i in range(4_000)]
    source = nb.file_source(write(tmp_path / "mine.txt", nb.EOT.join(texts + texts[:100])))
    train, held_out = all_of(source, "train"), all_of(source, "validation")
    assert not set(train) & set(held_out)  # not even where a document comes twice
    assert set(train) | set(held_out) == set(texts)
    assert 0.04 < len(held_out) / 4_000 < 0.065
    assert all_of(source, "train") == train  # a second reading gives the same


def test_files_named_train_and_valid_are_the_splits(nb, tmp_path):
    write(tmp_path / "d" / "train.txt", f"a{nb.EOT}b")
    write(tmp_path / "d" / "valid.txt", f"c{nb.EOT}d")
    source = nb.file_source(tmp_path / "d")
    assert all_of(source, "train") == ["a", "b"] and all_of(source, "validation") == ["c", "d"]


def test_identity_follows_the_files(nb, tmp_path):
    path = write(tmp_path / "a.txt", "one")
    before = nb.file_source(path).identity
    assert nb.file_source(path).identity == before
    write(path, "another")
    assert nb.file_source(path).identity != before


UNREADABLE = {
    "latin1.txt": "naïve caf\xe9".encode("latin-1"),
    "utf16.txt": "a text".encode("utf-16"),
    "broken.jsonl": b'{"text": "a"}\n{"text": ',
    "other.jsonl": b'{"story": "a"}\n',
    "list.jsonl": b"[1, 2]\n",
    "number.jsonl": b'{"text": 5}\n',
    "broken.parquet": b"PAR1 and then nothing",
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_files_are_refused_by_name(nb, tmp_path, name):
    path = tmp_path / name
    path.write_bytes(UNREADABLE[name])
    with pytest.raises(nb.UserError, match=f"{name} cannot be read"):
        all_of(nb.file_source(path), "train")


@pytest.mark.parametrize("columns", [{"story": ["a"]}, {"text": [1, 2]}, {"text": [b"\xff\xff"]}])
def test_parquet_without_a_text_column_is_refused(nb, tmp_path, columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    with pytest.raises(nb.UserError, match="x.parquet"):
        all_of(nb.file_source(tmp_path / "x.parquet"), "train")


def test_parquet_rows_without_text_are_refused_or_left_out(nb, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), tmp_path / "x.parquet")
    source = nb.file_source(tmp_path / "x.parquet")
    try:
        assert sorted(all_of(source, "train") + all_of(source, "validation")) == ["a", "b"]
    except nb.UserError as error:
        assert "x.parquet" in str(error)


@pytest.mark.parametrize("wish", ["", "nowhere/at/all"])
def test_a_missing_path_is_refused(nb, folder, wish):
    (folder / "empty").mkdir()
    with pytest.raises(nb.UserError, match="DATASET"):
        nb.open_source(wish or str(folder / "empty"), None)


def test_without_the_hub_auto_practises_loudly_and_tinystories_is_refused(nb, monkeypatch, capsys):
    monkeypatch.setattr(nb, "hub_answers", lambda: False)
    monkeypatch.setattr(nb, "practice_source", lambda: nb.Source("practice", "", "", None))
    assert nb.open_source("auto", None).name == "practice"
    assert "PRACTICE CORPUS" in capsys.readouterr().out
    with pytest.raises(nb.UserError, match='DATASET = "practice"'):
        nb.open_source("tinystories", None)


def test_the_hub_is_asked_for_seconds_only(nb, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(nb.urllib.request, "urlopen", lambda *_, **__: nb.time.sleep(20))
    start = nb.time.perf_counter()
    assert nb.hub_answers(seconds=0.2) is False
    assert nb.time.perf_counter() - start < 5


# The ribbon.
@pytest.fixture
def written(nb, tokenizer, stories, tmp_path):
    """(path, what write_tokens returned) of the practice stories, as a ribbon on disk."""
    path = tmp_path / "train.bin"
    return path, nb.write_tokens(nb.in_batches(stories), tokenizer, path, None, "practice 1")


def test_the_ribbon_is_every_story_and_end_of_text_in_uint16(nb, tokenizer, stories, written):
    path, meta = written
    expected = []
    for story in stories:
        expected += [*tokenizer.encode_ordinary(story), tokenizer.eot_token]
    assert np.fromfile(path, np.uint16).tolist() == expected
    assert (meta["stories"], meta["tokens"]) == (len(stories), len(expected))
    assert meta["bytes"] == sum(len(story.encode()) for story in stories)
    assert meta["sha256"] == nb.hashlib.sha256(path.read_bytes()).hexdigest()
    assert sorted(p.name for p in path.parent.iterdir()) == ["train.bin", "train.json"]


def test_batches_do_not_change_the_ribbon(nb, tokenizer, stories, tmp_path, written):
    pieces = [stories[i : i + 7] for i in range(0, len(stories), 7)]
    other = nb.write_tokens(pieces, tokenizer, tmp_path / "other.bin", None, "practice 1")
    assert other == written[1]


def test_a_story_that_holds_the_mark_stays_one_story(nb, tokenizer, tmp_path):
    meta = nb.write_tokens([[f"a{nb.EOT}b", "c"]], tokenizer, tmp_path / "x.bin", None, "")
    ids = np.fromfile(tmp_path / "x.bin", np.uint16)
    assert meta["stories"] == np.count_nonzero(ids == tokenizer.eot_token) == 2
    sizes = nb.bytes_of_tokens(tokenizer)
    assert sizes[ids].sum() == meta["bytes"]


def test_a_whole_ribbon_is_read_back(nb, tokenizer, written):
    tokens, meta = nb.read_tokens(written[0], tokenizer, "practice 1")
    assert tokens.dtype == np.uint16 and isinstance(tokens, np.memmap)
    assert len(tokens) == meta["tokens"] and meta == written[1]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2])


def alter(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def lose(path):
    path.unlink()


def halve_json(path):
    meta = path.with_suffix(".json")
    meta.write_text(meta.read_text()[:40])


def empty_json(path):
    path.with_suffix(".json").write_text("[]")


@pytest.mark.parametrize("damage", [truncate, alter, lose, halve_json, empty_json])
def test_a_damaged_ribbon_is_refused_and_written_again(nb, tokenizer, stories, tmp_path, damage):
    source = nb.Source("x", "", "some text", lambda split: nb.in_batches(stories[:30]))
    nb.prepare(source, tokenizer, tmp_path)
    path = tmp_path / "train.bin"
    intact = path.read_bytes()
    damage(path)
    assert nb.read_tokens(path, tokenizer, "some text") is None
    tokens, _ = nb.prepare(source, tokenizer, tmp_path)["train"]
    assert tokens.tobytes() == path.read_bytes() == intact


def test_another_tokenizer_or_text_is_refused(nb, tokenizer, stories, written, capsys):
    other = nb.train_bpe(stories[100:], 400)
    assert other.merges != tokenizer.merges
    assert nb.read_tokens(written[0], other, "practice 1") is None
    assert nb.read_tokens(written[0], tokenizer, "practice 2") is None
    assert capsys.readouterr().out.count("other text or another tokenizer") == 2


def test_a_good_ribbon_is_not_written_again(nb, tokenizer, stories, tmp_path, monkeypatch):
    source = nb.Source("x", "", "some text", lambda split: nb.in_batches(stories[:30]))
    nb.prepare(source, tokenizer, tmp_path)
    monkeypatch.setattr(nb, "write_tokens", None)
    assert nb.prepare(source, tokenizer, tmp_path)["train"][1]["stories"] == 30


def test_an_interrupted_preparation_leaves_no_ribbon(nb, tokenizer, stories, tmp_path):
    def broken():
        yield stories[:5]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nb.write_tokens(broken(), tokenizer, tmp_path / "train.bin", None, "")
    assert not (tmp_path / "train.bin").exists()


def test_a_full_disk_is_a_plain_sentence(nb, tokenizer, stories, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nb.os, "fsync", full)
    with pytest.raises(nb.UserError, match="No space left"):
        nb.write_tokens([stories[:5]], tokenizer, tmp_path / "train.bin", None, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [65_537, 100_000, 257, 256])
def test_a_vocabulary_that_does_not_fit_is_refused(nb, size):
    with pytest.raises(nb.UserError, match="vocab_size"):
        nb.GPTConfig(vocab_size=size)


def test_the_largest_vocabulary_fits_into_uint16(nb):
    assert nb.GPTConfig(vocab_size=65_536).vocab_size - 1 <= np.iinfo(np.uint16).max


@needs_sample
@needs_gpt2
def test_the_sample_has_the_stories_and_bytes_that_it_says(nb, tmp_path):
    source = nb.file_source(SAMPLE)
    assert source.totals == {"train": 13_972, "validation": 4_000}
    gpt2 = nb.restore_tokenizer({"name": "gpt2"})
    path = tmp_path / "validation.bin"
    meta = nb.write_tokens(source.batches("validation"), gpt2, path, 4_000, source.identity)
    assert meta["stories"] == 4_000
    assert meta["bytes"] / meta["tokens"] == pytest.approx(4.043, abs=0.005)
    last = np.fromfile(path, np.uint16)[-1]
    assert last == gpt2.eot_token


# Batches.
def test_targets_are_inputs_moved_by_one(nb, ribbon):
    x, y = nb.get_batch(ribbon, 6, 16, seed=3, step=4)
    assert x.shape == y.shape == (6, 16) and x.dtype == y.dtype == nb.torch.int64
    assert nb.torch.equal(x[:, 1:], y[:, :-1])
    text = ribbon.astype(np.int64)
    for window, last in zip(x.numpy(), y[:, -1].numpy()):
        whole = np.append(window, last)
        places = np.flatnonzero(text[:-16] == whole[0])
        assert any((text[p : p + 17] == whole).all() for p in places)


def test_a_batch_depends_on_seed_and_step_alone(nb, ribbon):
    first, _ = nb.get_batch(ribbon, 8, 16, 1, 700)
    random.seed(9)
    np.random.seed(9)
    nb.torch.manual_seed(9)
    nb.get_batch(ribbon, 8, 16, 1, 701)
    assert nb.torch.equal(nb.get_batch(ribbon, 8, 16, 1, 700)[0], first)
    assert not nb.torch.equal(nb.get_batch(ribbon, 8, 16, 1, 701)[0], first)
    assert not nb.torch.equal(nb.get_batch(ribbon, 8, 16, 2, 700)[0], first)


@pytest.mark.parametrize("block_size", [1, 3, 8, 20])
def test_windows_begin_with_a_story_or_follow_within_a_long_one(nb, block_size):
    lengths = [1, 3, 4, 8, 9, 17, 30, 40]
    ribbon = np.concatenate([[*range(1, n), 0] for n in lengths]).astype(np.uint16)
    expected, begin = [], 0
    for end in np.flatnonzero(ribbon == 0):
        expected += range(begin, end, block_size)
        begin = end
    last = len(ribbon) - block_size - 1
    starts = nb.find_starts(ribbon, 0, block_size)
    assert starts.tolist() == [min(start, last) for start in expected]
    covered = {i for start in starts for i in range(start + 1, start + block_size + 1)}
    assert covered == set(range(1, len(ribbon)))  # each token but the first is once a target


def test_batches_take_all_given_starts_and_no_others(nb, ribbon, tokenizer):
    starts = nb.find_starts(ribbon[:2_000], tokenizer.eot_token, 16)
    x, y = nb.get_batch(ribbon, 4_000, 16, 1, 2, starts)
    windows = ribbon[starts[:, None] + np.arange(17)].astype(np.int64)
    drawn = np.hstack([x.numpy(), y[:, -1:].numpy()])
    assert set(map(tuple, drawn)) == set(map(tuple, windows))


def test_windows_reach_both_ends_of_the_ribbon(nb):
    ribbon = np.arange(20, dtype=np.uint16)
    x, y = nb.get_batch(ribbon, 2_000, 16, 0, 0)
    assert set(x[:, 0].tolist()) == {0, 1, 2, 3} and y.max() == 19

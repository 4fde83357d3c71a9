"""Stories and their sources, the token stream on disk, and batches."""

import gzip
import json
import math
import random
import tracemalloc
from collections import Counter
from pathlib import Path

import huggingface_hub
import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from conftest import GPT2_VOCABULARY, SAMPLE


# The practice corpus.
def test_practice_corpus_depends_on_the_seed_alone(nb):
    assert nb.practice_corpus(20, 7) == nb.practice_corpus(20, 7)
    assert nb.practice_corpus(20, 7)[0] != nb.practice_corpus(20, 8)[0]


def test_the_practice_corpus_stays_what_it_was(nb):
    """Whoever compares losses on it needs the same stories and the same entropy."""
    texts, logps = nb.practice_corpus(1_000, seed=1)  # the validation split
    digest = nb.hashlib.sha256("\n".join(texts).encode()).hexdigest()
    assert digest.startswith("ab256bd781f97206")
    assert -sum(logps) / 1_000 == pytest.approx(36.702528, abs=1e-6)


def test_practice_probability_belongs_to_the_text(nb):
    """However a text came about, its probability is the same (the entropy needs that)."""
    by_text = {}
    for text, logp in zip(*nb.practice_corpus(20_000, 3)):
        assert math.isclose(by_text.setdefault(text, logp), logp, rel_tol=1e-12)


def test_practice_probability_is_what_sampling_gives(nb, monkeypatch):
    """In a grammar of a few stories, frequencies match exp(logp), and these sum to one."""
    monkeypatch.setattr(nb, "PLOTS", [[nb.parse("{A|B} {who:GIRL}. / c.")], [nb.parse("{x|y}")]])
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


def all_of(source, split=None):
    splits = [split] if split else ["train", "validation"]
    return [story for s in splits for batch in source.batches(s) for story in batch]


def as_text(texts):
    return "<|endoftext|>\n".join(texts)


def as_lines(texts, column="text"):
    return "\n".join(json.dumps({"id": i, column: text}) for i, text in enumerate(texts)) + "\n\n"


@pytest.mark.parametrize(
    "text, documents",
    [
        (
            "one\n\nstill one<|endoftext|>\ntwo\n<|endoftext|>  <|endoftext|>",
            "one\n\nstill one|two",
        ),
        (
            "x" * (1 << 20) + "<|endoftext|>second\n\nparagraph",
            "x" * (1 << 20) + "|second\n\nparagraph",
        ),
        ("first\nparagraph\n\nsecond\n\n\n\nthird", "first\nparagraph|second|third"),
        (
            "\r\nfirst\r\nparagraph\r\n \t\r\nsecond\n   \nthird\n \n",
            "first\nparagraph|second|third",
        ),
        ("Anna\nBen\nMia\n", "Anna|Ben|Mia"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_lone_text_is_cut_at_marks_else_at_blank_lines_else_into_lines(
    nb, tmp_path, text, documents, encoding, capsys
):
    source = nb.file_source(write(tmp_path / "book.txt", text, encoding))
    assert sorted(all_of(source)) == sorted(documents.split("|"))
    assert ("each line is a document" in capsys.readouterr().out) == text.startswith("Anna")


def test_a_long_text_without_marks_is_read_in_linear_time(nb, tmp_path):
    path = write(tmp_path / "long.txt", "a word and \n" * 9_000_000)  # was read in 10 s and more
    start = nb.time.process_time()
    assert len(nb.documents_in(path, alone=False)) == 1
    assert nb.time.process_time() - start < 4


def test_several_texts_are_one_document_each(nb, tmp_path):
    for i in range(40):
        write(tmp_path / "mine" / f"{i}.txt", f"story {i}\n\nand its end\n")
    assert sorted(all_of(nb.file_source(tmp_path / "mine"))) == sorted(
        f"story {i}\n\nand its end" for i in range(40)
    )


TEXTS = [f'story {i} – naïve 🦊\nwith, "a" line' for i in range(50)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("column", ["text", "story"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "txt"])
def test_every_format_gives_the_same_documents_name_and_identity(
    nb, tmp_path, kind, column, packed, capsys
):
    """Stripped, cut at marks, and without the rows that hold no text."""
    rows = [{"id": i, column: f" {text}<|endoftext|>"} for i, text in enumerate(TEXTS)]
    rows += [{"id": 50, column: None}, {"id": 51, column: " "}]
    frame, path = pandas.DataFrame(rows), tmp_path / f"mine {'(1)' if packed else '[1]'}.{kind}"
    if kind == "parquet":
        frame.to_parquet(path)
    elif kind == "csv":
        frame.to_csv(path, index=False)
    elif kind == "txt":
        write(path, "".join(row[column] or "" for row in rows))
    else:
        write(
            path, json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)) + "\n\n"
        )
    if packed and kind != "parquet":
        packed_path = path.with_name(f"{path.name}.gz")
        packed_path.write_bytes(gzip.compress(path.read_bytes()))
        path = packed_path
    source = nb.file_source(path)
    assert sorted(all_of(source)) == sorted(TEXTS)
    reference = nb.file_source(write(tmp_path / "mine-1.txt", as_text(TEXTS)))
    assert source.identity == reference.identity
    assert source.name.rsplit("-", 1)[1] == reference.name.rsplit("-", 1)[1]
    assert ("2 rows without text" in capsys.readouterr().out) == (kind != "txt")


def test_a_table_whose_name_also_says_txt_is_a_table(nb, tmp_path):
    path = write(tmp_path / "stories.txt.jsonl", as_lines(["one\n\nstill one", "two"]))
    assert sorted(all_of(nb.file_source(path))) == ["one\n\nstill one", "two"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet"])
def test_texts_that_look_like_something_else_stay_texts(nb, tmp_path, kind):
    texts, path = ["NA", "null", "007", "1.50", "true", "2020-01-02"], tmp_path / f"x.{kind}"
    frame = pandas.DataFrame({"text": texts, "date": ["", "b"] * 3})
    {
        "csv": lambda: frame.to_csv(path, index=False),
        "jsonl": lambda: frame.to_json(path, orient="records", lines=True),
        "json": lambda: frame.to_json(path, orient="records", indent=1),
        "parquet": lambda: frame.to_parquet(path),
    }[kind]()
    assert sorted(all_of(nb.file_source(path))) == sorted(texts)


def test_an_array_of_strings_is_a_table_of_one_column(nb, tmp_path):
    assert sorted(all_of(nb.file_source(write(tmp_path / "a.json", '["one", "two"]')))) == [
        "one",
        "two",
    ]


# Splits.
def test_what_is_held_out_is_disjoint_complete_and_one_in_twenty(nb, tmp_path):
    texts = [f"story number {i}" for i in range(4_000)]
    source = nb.file_source(write(tmp_path / "mine.txt", nb.EOT.join(texts + texts[:100])))
    train, held_out = all_of(source, "train"), all_of(source, "validation")
    assert not set(train) & set(held_out)  # not even where a document comes twice
    assert set(train) | set(held_out) == set(texts) and len(set(held_out)) == 200
    assert source.totals == {"train": len(train), "validation": len(held_out)}


@pytest.mark.parametrize("n", [2, 3, 10, 19])
def test_a_few_documents_are_never_refused_by_chance(nb, tmp_path, n):
    for name in ("a", "b", "c"):
        source = nb.file_source(write(tmp_path / "x.txt", as_text(f"{name}{i}" for i in range(n))))
        assert source.totals == {"train": n - 1, "validation": 1}


@pytest.mark.parametrize("text", ["one two three four five six. seven", "一二三四五六七八九十"])
def test_a_single_document_is_cut_in_two(nb, tmp_path, text):
    (train,), (held_out,) = map(
        all_of, [nb.file_source(write(tmp_path / "x.txt", text))] * 2, ["train", "validation"]
    )
    assert f"{train} {held_out}" == text or train + held_out == text
    assert len(train) > len(held_out) > 0


SPLIT = [  # files of training, validation, and those left out
    ("train.txt", "val.txt", ""),
    ("train.jsonl", "valid.jsonl", "test.jsonl"),
    ("Train.txt", "TEST.txt", ""),
    ("train/a.txt train/b.txt", "validation/a.txt", "test/a.txt"),
    ("stories_train_01.csv stories_train_02.csv", "stories_dev_01.csv", ""),
    ("data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet", ""),
    ("x-train.txt.gz .train.txt.swp __MACOSX/._x-train.txt README.txt", "x-val.txt.gz", ""),
]


def put(path, text):
    """Write a file of whatever kind with one document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        write(path, {".csv": f"text\n{text}", ".jsonl": as_lines([text])}.get(path.suffix, text))


@pytest.mark.parametrize("files", SPLIT, ids=lambda files: files[0])
def test_names_that_people_give_to_splits_are_recognised(nb, tmp_path, files, capsys):
    for names in files:
        for name in names.split():
            put(tmp_path / "d" / name, f"text of {name}")
    source = nb.file_source(tmp_path / "d")
    mine = [
        [f"text of {n}" for n in names.split() if "README" not in n and "/." not in f"/{n}"]
        for names in files
    ]
    assert [all_of(source, "train"), all_of(source, "validation")] == mine[:2]
    said = capsys.readouterr().out
    assert f"train: {len(mine[0])} from" in said and f"validation: {len(mine[1])} from" in said
    assert (f"left out: {len(mine[2])} from" in said) == bool(mine[2])


@pytest.mark.parametrize(
    "names",
    [
        ["The last train.txt", "A valid point.txt", "Emma.txt"],  # titles of books
        ["trained.txt", "evaluation.txt"],
        ["train.txt"],
        ["train and valid.txt"],
        ["train/a.txt", "train/b.txt"],
    ],
)
def test_other_names_are_no_splits_and_nothing_is_lost(nb, tmp_path, names, capsys):
    for name in names:
        write(tmp_path / "d" / name, f"the text of {name}")
    source = nb.file_source(tmp_path / "d")
    assert " ".join(sorted(all_of(source))) == " ".join(
        sorted(f"the text of {name}" for name in names)
    )
    assert "No names say which split" in capsys.readouterr().out


@pytest.mark.parametrize("odd", ["notes.txt", "train_valid.txt", "train/valid.txt", "Test/dev.txt"])
def test_a_file_of_no_split_or_two_among_split_files_is_refused_by_name(nb, tmp_path, odd):
    for name in ("train.txt", "val.txt", odd):
        write(tmp_path / "d" / name, f"the text of {name}")
    with pytest.raises(nb.UserError, match=odd.split("/")[-1]):
        nb.file_source(tmp_path / "d")


def test_what_is_no_text_of_the_users_is_not_read(nb, tmp_path):
    """Hidden files, side files of archives, notes about a dataset, files of this notebook."""
    write(tmp_path / "a.txt", "mine")
    write(tmp_path / "b.txt", "also mine")
    for name in """.hidden.txt ._a.txt .ipynb_checkpoints/a-checkpoint.txt __MACOSX/._a.txt a.txt~ a.txt.swp
    README.txt LICENSE.txt dataset_infos.json data/a-123456-bpe400/train.json runs/tiny/history.json
    data/a-gpt2/train.bin notes.md .git/x.txt""".split():
        write(tmp_path / name, "not mine")
    assert sorted(all_of(nb.file_source(tmp_path))) == ["also mine", "mine"]


# Names and identities.
def test_identity_follows_the_text_and_not_the_clock_or_the_name(nb, tmp_path):
    path = write(tmp_path / "a.txt", "one\n\ntwo")
    before = nb.file_source(path)
    nb.os.utime(path, (1, 1))
    assert nb.file_source(path).identity == before.identity
    assert nb.file_source(path).name == before.name
    other = nb.file_source(write(tmp_path / "б.txt", "one\n\ntwo"))
    assert other.identity == before.identity
    assert nb.file_source(write(path, "one\n\ntwo!")).identity != before.identity


def test_moving_a_document_to_another_split_changes_the_identity(nb, tmp_path):
    def source(train, valid):
        write(tmp_path / "train.txt", train)
        write(tmp_path / "valid.txt", valid)
        return nb.file_source(tmp_path)

    assert source("a\n\nb", "c").identity != source("a", "b\n\nc").identity


def test_names_differ_wherever_texts_do_and_never_equal_those_of_the_notebook(nb, tmp_path):
    names = [
        "книга.txt",
        "本.txt",
        "corpus.v1/a.txt",
        "corpus.v2/a.txt",
        "TinyStories/a.txt",
        "practice.txt",
    ]
    paths = [write(tmp_path / name, f"one\n\ntwo {name}") for name in names]
    found = [nb.file_source(p if p.parent == tmp_path else p.parent).name for p in paths]
    assert len(set(found)) == len(names)
    assert all(nb.re.fullmatch(r"[a-z0-9-]+-[0-9a-f]{6}", name) for name in found)


def test_own_files_are_limited_only_where_nothing_is_trained(nb, tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", as_text(map(str, range(100))))
    assert nb.open_source(str(path), 10).totals == {"train": 95, "validation": 5}
    monkeypatch.setattr(nb, "TRAIN", False)
    limited = nb.open_source(str(path), 10)
    assert limited.totals == {"train": 10, "validation": 5}
    assert limited.name != nb.file_source(path).name


UNREADABLE = {
    "latin1.txt": "naïve caf\xe9".encode("latin-1"),
    "latin1.csv": "text\nnaïve caf\xe9".encode("latin-1"),
    "broken.jsonl": b'{"text": "a"}\n{"text": ',
    "list.jsonl": b"[1, 2]\n",
    "number.jsonl": b'{"text": 5}\n',
    "empty.json": b"",
    "two.csv": b"title,story\na,b\n",
    "broken.txt.gz": b"\x1f\x8b and then nothing",
    "broken.parquet": b"PAR1 and then nothing",
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_files_are_refused_by_name(nb, tmp_path, name, capfd):
    path = tmp_path / name
    path.write_bytes(UNREADABLE[name])
    with pytest.raises(nb.UserError, match=f"{name} cannot be read") as caught:
        nb.file_source(path)
    assert ("title, story" in str(caught.value)) == (name == "two.csv")
    assert not capfd.readouterr().err


@pytest.mark.parametrize(
    "columns", [{"text": [1, 2]}, {"text": [b"\xff\xff"]}, {"a": ["b"], "c": ["d"]}]
)
def test_parquet_without_a_text_column_is_refused(nb, tmp_path, columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    with pytest.raises(nb.UserError, match=f"x.parquet.*{', '.join(columns)}"):
        nb.file_source(tmp_path / "x.parquet")


@pytest.mark.parametrize("wish", ["", "nowhere/at/all"])
def test_a_missing_path_is_refused(nb, folder, wish):
    (folder / "empty").mkdir()
    with pytest.raises(nb.UserError, match="DATASET"):
        nb.open_source(wish or str(folder / "empty"), None)


# Whether the hub answers.
def test_without_the_hub_auto_practises_loudly_and_tinystories_is_refused(nb, monkeypatch, capsys):
    monkeypatch.setattr(nb, "hub_refusal", lambda: "HTTPError: 429 Too Many Requests")
    monkeypatch.setattr(nb, "practice_source", lambda: nb.Source("practice", "", "", None))
    assert nb.open_source("auto", None).name == "practice"
    said = capsys.readouterr().out
    assert "PRACTICE CORPUS" in said and "429 Too Many Requests" in said
    with pytest.raises(nb.UserError, match='429.*DATASET = "practice"'):
        nb.open_source("tinystories", None)


def test_the_hub_is_asked_for_seconds_only(nb, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: nb.time.sleep(20))
    start = nb.time.perf_counter()
    assert "TimeoutError" in nb.hub_refusal(seconds=0.2)
    assert nb.time.perf_counter() - start < 5


def test_offline_mode_is_respected_and_named(nb):
    assert "offline" in nb.hub_refusal().lower()  # conftest.py sets HF_HUB_OFFLINE


# The stream.
@pytest.fixture
def written(nb, tokenizer, stories, tmp_path):
    """(path, what write_tokens returned) of the practice stories, as a token stream on disk."""
    path = tmp_path / "train.bin"
    return path, nb.write_tokens(nb.in_batches(stories), tokenizer, path, None, "practice 1")


def test_the_token_file_is_every_story_and_end_of_text_in_uint16(nb, tokenizer, stories, written):
    path, meta = written
    expected = []
    for story in stories:
        expected += [*tokenizer.encode_ordinary(story), tokenizer.eot_token]
    assert np.fromfile(path, np.uint16).tolist() == expected
    assert (meta["stories"], meta["tokens"]) == (len(stories), len(expected))
    assert meta["bytes"] == sum(len(story.encode()) for story in stories)
    assert meta["sha256"] == nb.hashlib.sha256(path.read_bytes()).hexdigest()
    assert sorted(p.name for p in path.parent.iterdir()) == ["train.bin", "train.json"]


def test_batches_do_not_change_the_token_file(nb, tokenizer, stories, tmp_path, written):
    pieces = [stories[i : i + 7] for i in range(0, len(stories), 7)]
    other = nb.write_tokens(pieces, tokenizer, tmp_path / "other.bin", None, "practice 1")
    assert other == written[1]


def test_a_story_that_holds_the_mark_stays_one_story(nb, tokenizer, tmp_path):
    meta = nb.write_tokens([[f"a{nb.EOT}b", "c"]], tokenizer, tmp_path / "x.bin", None, "")
    ids = np.fromfile(tmp_path / "x.bin", np.uint16)
    assert meta["stories"] == np.count_nonzero(ids == tokenizer.eot_token) == 2
    assert len(tokenizer.decode_bytes(ids[ids != tokenizer.eot_token].tolist())) == meta["bytes"]


def test_a_whole_token_file_is_read_back(nb, tokenizer, written):
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
def test_a_damaged_token_file_is_refused_and_written_again(
    nb, tokenizer, stories, tmp_path, damage
):
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


def test_a_good_token_file_is_not_written_again(nb, tokenizer, stories, tmp_path, monkeypatch):
    source = nb.Source("x", "", "some text", lambda split: nb.in_batches(stories[:30]))
    nb.prepare(source, tokenizer, tmp_path)
    monkeypatch.setattr(nb, "write_tokens", None)
    assert nb.prepare(source, tokenizer, tmp_path)["train"][1]["stories"] == 30


def test_an_interrupted_preparation_leaves_no_file(nb, tokenizer, stories, tmp_path):
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


def test_two_notebooks_may_write_the_same_file_at_once(nb, tmp_path):
    path = tmp_path / "train.bin"
    with nb.atomic_write(path) as one, nb.atomic_write(path) as other:
        one.write(b"first")
        other.write(b"second")
    assert path.read_bytes() == b"first"  # renamed last
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells what is mapped")
def test_no_file_is_replaced_while_it_is_mapped(nb, tokenizer, stories, tmp_path, monkeypatch):
    """Windows would refuse that: `prepare` after a change, in a kernel that has run before."""
    names, replace = {}, nb.os.replace

    def careful(source, target):
        assert str(target) not in Path("/proc/self/maps").read_text()
        replace(source, target)

    monkeypatch.setattr(nb.os, "replace", careful)
    for identity in ("one", "two"):
        nb.unmap(names)
        source = nb.Source("x", "", identity, lambda split: nb.in_batches(stories[:30]))
        names["streams"] = nb.prepare(source, tokenizer, tmp_path)
        names["train_tokens"], _ = names["streams"]["train"]
        names["piece"] = names["train_tokens"][:5]
        assert str(tmp_path) in Path("/proc/self/maps").read_text()


def test_the_ends_of_stories_are_found_piece_by_piece(nb, stream, tokenizer):
    ends = np.flatnonzero(stream == tokenizer.eot_token)
    for piece in (1 << 22, 1_000, len(stream)):
        assert np.array_equal(nb.story_ends(stream, tokenizer.eot_token, piece), ends)
    big = np.zeros(40_000_000, np.uint16)
    tracemalloc.start()
    nb.story_ends(big, 1)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("size", [65_537, 100_000, 256])
def test_a_vocabulary_that_does_not_fit_is_refused(nb, size):
    with pytest.raises(nb.UserError, match="vocab_size"):
        nb.GPTConfig(vocab_size=size)


def test_the_largest_vocabulary_fits_into_uint16(nb):
    assert nb.GPTConfig(vocab_size=65_536).vocab_size - 1 <= np.iinfo(np.uint16).max


def test_the_sample_has_the_stories_and_bytes_that_it_says(nb, sample, gpt2, tmp_path):
    source, path = nb.file_source(sample), tmp_path / "validation.bin"
    texts, total = all_of(source, "validation"), source.totals["validation"]
    meta = nb.write_tokens(source.batches("validation"), gpt2, path, total, source.identity)
    assert meta["stories"] == len(texts) == total
    assert meta["bytes"] == sum(len(text.encode()) for text in texts)
    ids = np.fromfile(path, np.uint16)
    assert gpt2.decode(ids.tolist()) == nb.EOT.join(texts) + nb.EOT
    assert len(ids) == meta["tokens"] and ids[-1] == gpt2.eot_token == 50_256
    if SAMPLE and GPT2_VOCABULARY:
        assert source.totals == {"train": 13_972, "validation": 4_000}
        assert meta["bytes"] / meta["tokens"] == pytest.approx(4.043, abs=0.005)


# Batches.
def test_targets_are_inputs_shifted_by_one(nb, stream):
    x, y = nb.get_batch(stream, 6, 16, seed=3, step=4)
    assert x.shape == y.shape == (6, 16) and x.dtype == y.dtype == nb.torch.int64
    assert nb.torch.equal(x[:, 1:], y[:, :-1])
    text = stream.astype(np.int64)
    for window, last in zip(x.numpy(), y[:, -1].numpy()):
        whole = np.append(window, last)
        places = np.flatnonzero(text[:-16] == whole[0])
        assert any((text[p : p + 17] == whole).all() for p in places)


@pytest.mark.parametrize(
    "attempt, verdict",
    [
        (lambda window: None, "not tried yet"),
        (lambda window: window[1:], "right"),
        (lambda window: np.roll(window, -1)[:-1], "right"),
        (lambda window: window[:-1], "not yet. These are the inputs"),
        (lambda window: window, "not yet. 8 inputs need 8 targets"),
        (lambda window: window[2:], "not yet. 8 inputs need 8 targets"),
        (lambda window: window[:0:-1], "not yet. The target of input t"),
    ],
)
def test_the_exercise_says_what_is_wrong_with_an_attempt(nb, capsys, attempt, verdict):
    nb.judge_targets(attempt, np.arange(9, dtype=np.uint16))
    assert capsys.readouterr().out.startswith(f"exercise 1: {verdict}")


def test_a_batch_depends_on_seed_and_step_alone(nb, stream):
    first, _ = nb.get_batch(stream, 8, 16, 1, 700)
    random.seed(9)
    np.random.seed(9)
    nb.torch.manual_seed(9)
    nb.get_batch(stream, 8, 16, 1, 701)
    assert nb.torch.equal(nb.get_batch(stream, 8, 16, 1, 700)[0], first)
    assert not nb.torch.equal(nb.get_batch(stream, 8, 16, 1, 701)[0], first)
    assert not nb.torch.equal(nb.get_batch(stream, 8, 16, 2, 700)[0], first)


@pytest.mark.parametrize("block_size", [1, 3, 8, 20])
def test_windows_begin_with_a_story_or_follow_within_a_long_one(nb, block_size):
    lengths = [1, 3, 4, 8, 9, 17, 30, 40]
    stream = np.concatenate([[*range(1, n), 0] for n in lengths]).astype(np.uint16)
    expected, begin = [], 0
    for end in np.flatnonzero(stream == 0):
        expected += range(begin, end, block_size)
        begin = end
    last = len(stream) - block_size - 1
    starts = nb.find_starts(stream, 0, block_size)
    assert starts.tolist() == [min(start, last) for start in expected]
    covered = {i for start in starts for i in range(start + 1, start + block_size + 1)}
    assert covered == set(range(1, len(stream)))  # each token but the first is once a target


def test_batches_take_all_given_starts_and_no_others(nb, stream, tokenizer):
    starts = nb.find_starts(stream[:2_000], tokenizer.eot_token, 16)
    x, y = nb.get_batch(stream, 4_000, 16, 1, 2, starts)
    windows = stream[starts[:, None] + np.arange(17)].astype(np.int64)
    drawn = np.hstack([x.numpy(), y[:, -1:].numpy()])
    assert set(map(tuple, drawn)) == set(map(tuple, windows))


@pytest.mark.parametrize("n, batch_size", [(10, 4), (64, 16), (3, 8), (1, 2)])
def test_an_epoch_reads_each_window_once_in_an_order_of_its_own(nb, n, batch_size):
    steps = math.lcm(n, batch_size) // batch_size  # whole epochs
    read = np.concatenate([nb.shuffled(n, batch_size, 5, step) for step in range(2 * steps)])
    epochs = read.reshape(-1, n)
    assert (np.sort(epochs) == np.arange(n)).all()
    if n >= 10:
        assert (epochs[0] != epochs[1]).any() and (epochs[0] != np.arange(n)).any()
        assert (nb.shuffled(n, n, 6, 0) != epochs[0]).any()


def test_windows_reach_both_ends_of_the_stream(nb):
    stream = np.arange(20, dtype=np.uint16)
    x, y = nb.get_batch(stream, 2_000, 16, 0, 0)
    assert set(x[:, 0].tolist()) == {0, 1, 2, 3} and y.max() == 19


def test_a_csv_with_more_fields_than_its_header_is_refused(nb, tmp_path):
    """pandas takes the first field for an index, and the text would lose its beginning."""
    path = tmp_path / "unquoted.csv"
    for rows in ("0,Once, and she ran\n1,So, she ran\n", "0,One, two\n1,three\n", "1,a\n2,b,c\n"):
        path.write_text(f"id,text\n{rows}")
        with pytest.raises(nb.UserError, match="header|fields"):
            nb.documents_in(path, alone=True)


def test_what_the_notebook_writes_into_the_folder_of_a_dataset_is_not_read(nb, tmp_path):
    (tmp_path / "story.txt").write_text("One.\n\nTwo.\n\nThree.")
    left = ["runs/a-b/transformers/config.json", "data/x-1a-bpe500-30d84e/train.json"]
    for name in [*left, "transformers/tokenizer.json"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"some": "thing"}')
    assert sum(nb.file_source(tmp_path).totals.values()) == 3


def test_a_text_held_out_many_times_is_measured_once(nb):
    texts = [f"text {i}" for i in range(60)] + 50 * ["text 59"]
    train, validation = nb.hold_out(texts)
    assert "text 59" in validation and len(validation) == len(set(validation)) == 3
    assert not set(train) & set(validation)


def test_each_split_decides_alone_how_its_files_are_cut(nb, tmp_path):
    (tmp_path / "train.txt").write_text("\n\n".join(f"Story {i}." for i in range(9)))
    for i in (1, 2):
        (tmp_path / f"val_{i}.txt").write_text("One paragraph.\n\nAnother.")
    assert nb.file_source(tmp_path).totals == {"train": 9, "validation": 2}

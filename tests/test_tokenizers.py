"""The byte-pair encoding and its encoder."""

import random
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


def word_counts(nb, texts):
    return Counter(w.encode() for text in texts for w in nb.regex.findall(nb.SPLIT_PATTERN, text))


def recounted_merges(counts, n_merges):
    """BPE by the book, apart from the notebook: bytes strings, everything counted every time."""
    ranks = {bytes([i]): i for i in range(256)}
    words = [([bytes([b]) for b in word], n) for word, n in counts.items()]
    merges = []
    for _ in range(n_merges):
        pairs = Counter()
        for parts, n in words:
            for left, right in zip(parts, parts[1:]):
                pairs[ranks[left], ranks[right]] += n
        (a, b), _ = min(pairs.items(), key=lambda item: (-item[1], item[0]))
        merges.append((a, b))
        names = list(ranks)
        left, right = names[a], names[b]
        ranks[left + right] = len(ranks)
        for parts, _ in words:
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == (left, right):
                    parts[i : i + 2] = [left + right]
                i += 1
    return merges


def test_merges_equal_a_recount_after_each_merge(nb, stories):
    counts = word_counts(nb, stories[:60])
    expected = recounted_merges(counts, 150)
    assert nb.learn_merges(counts, 150) == expected
    assert nb.naive_merges(counts, 150) == expected


@pytest.mark.parametrize("text", ["aaaa", "aaaaa", "abababa", "aabaabaa", "zyzyx xyzyz"])
def test_merges_of_overlapping_pairs(nb, text):
    counts = {word.encode() * 2: 3 for word in text.split()}
    fast = nb.learn_merges(counts, 3)
    assert fast == recounted_merges(counts, 3)[: len(fast)] and fast


@given(st.dictionaries(st.binary(min_size=2, max_size=8), st.integers(2, 5), min_size=2))
@settings(max_examples=60, deadline=None)
def test_merges_of_any_words_equal_the_recount(nb, words):
    assert (fast := nb.learn_merges(words, 4)) == recounted_merges(words, len(fast))


def test_ties_go_to_the_smaller_ids_whatever_the_order_of_the_words(nb):
    words = {b"zz": 2, b"aa": 2, b"mm": 2}
    backwards = dict(reversed(words.items()))
    assert nb.learn_merges(words, 3) == nb.learn_merges(backwards, 3)
    assert nb.learn_merges(words, 1) == [(97, 97)]


def test_poor_texts_give_fewer_tokens(nb):
    assert nb.naive_merges({b"abc": 1, b"xaby": 1}, 5) == [(97, 98)]  # what occurs twice, no more
    assert nb.naive_merges({}, 5) == nb.learn_merges({}, 5) == []
    assert nb.train_bpe(["abc"], 1000).n_vocab == 257
    digits = nb.train_bpe(["0 1 2 1 0"], 4_096)  # no pair within a word: the bytes alone
    assert nb.GPTConfig(vocab_size=digits.n_vocab).vocab_size == 257


@pytest.mark.parametrize("text", ["letters", "Chinese"])
def test_text_without_spaces_is_learned_in_seconds_and_as_by_the_recount(nb, text):
    rng = random.Random(0)
    letters = [chr((97 if text == "letters" else 0x4E00) + i) for i in range(26)]
    lines = ["".join(rng.choices(letters, range(1, 27), k=200_000)) for _ in range(5)]
    counts = nb.count_words(lines, most=2_000)
    assert max(map(len, counts)) <= 32 and sum(map(len, counts)) <= 2_000
    assert nb.learn_merges(counts, 60) == recounted_merges(counts, 60)
    start = time.perf_counter()
    tokenizer = nb.encoding_from_merges(nb.learn_merges(nb.count_words(lines, 100_000), 500))
    assert tokenizer.decode(tokenizer.encode_ordinary(lines[0])) == lines[0]
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize("size", [256, 65_537, 0])
def test_impossible_vocabulary_is_refused(nb, size):
    with pytest.raises(nb.UserError, match="vocab_size"):
        nb.train_bpe(["a text"], size)


def test_pieces_do_not_cross_words(tokenizer):
    for i in range(256, tokenizer.n_vocab - 1):
        piece = tokenizer.decode_single_token_bytes(i).strip()
        assert not any(c.isspace() for c in piece.decode("utf-8", "replace"))


@given(st.text())
@settings(max_examples=150, deadline=None)
def test_any_text_survives_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text


@pytest.mark.parametrize(
    "text", ["👩‍👩‍👧 family 🦊🇨🇭", "naïve Ærøskøbing 東京", "\x00\t \r\n\n  ", ""]
)
def test_unusual_texts_survive_the_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode_ordinary(text)) == text


def test_end_of_text_is_the_last_token_and_never_comes_from_text(nb, tokenizer):
    assert tokenizer.eot_token == tokenizer.n_vocab - 1
    ids = tokenizer.encode_ordinary(f"one {nb.EOT} two")
    assert tokenizer.eot_token not in ids


def test_a_described_tokenizer_is_restored(nb, tokenizer, stories):
    description = nb.json.loads(nb.json.dumps(nb.describe_tokenizer(tokenizer)))
    restored = nb.restore_tokenizer(description)
    assert restored.encode_ordinary(stories[0]) == tokenizer.encode_ordinary(stories[0])
    assert nb.describe_tokenizer(restored) == description
    assert (restored.n_vocab, restored.eot_token) == (tokenizer.n_vocab, tokenizer.eot_token)


def test_gpt2_is_described_by_its_name(nb, gpt2):
    assert nb.describe_tokenizer(gpt2) == {"name": "gpt2"}
    assert (gpt2.n_vocab, gpt2.eot_token) == (50_257, 50_256)


def test_missing_gpt2_vocabulary_is_a_plain_sentence(nb, monkeypatch):
    def unreachable(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(nb.tiktoken, "get_encoding", unreachable)
    with pytest.raises(nb.UserError, match='TOKENIZER = "bpe"'):
        nb.restore_tokenizer({"name": "gpt2"})


@pytest.fixture
def source(nb, stories, monkeypatch):
    """A source and sample in the notebook's namespace, as Step 2 leaves them."""
    made = nb.Source("mine", "test", "first text", None)
    monkeypatch.setattr(nb, "source", made, raising=False)
    monkeypatch.setattr(nb, "sample", stories[:50], raising=False)
    return made


def test_gpt2_falls_back_to_bpe_with_a_notice(nb, folder, source, monkeypatch, capsys):
    def unreachable(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(nb.tiktoken, "get_encoding", unreachable)
    chosen, where = nb.choose_tokenizer("gpt2", {}, nb.GPTConfig(vocab_size=300))
    assert chosen.n_vocab == 300 and where == folder / "data" / "mine-bpe300"
    assert "own BPE instead" in capsys.readouterr().out


def test_gpt2_with_another_vocabulary_size_is_refused(nb, gpt2, folder, source):
    with pytest.raises(nb.UserError, match="50,257"):
        nb.choose_tokenizer("gpt2", {"vocab_size": 1_000}, nb.GPTConfig())


def test_own_tokenizer_is_reused_for_the_same_text_alone(nb, folder, source, capsys):
    config = nb.GPTConfig(vocab_size=300)
    first, where = nb.choose_tokenizer("bpe", {}, config)
    again, _ = nb.choose_tokenizer("bpe", {}, config)
    assert "reusing" in capsys.readouterr().out and again.merges == first.merges
    source.identity = "second text"
    nb.choose_tokenizer("bpe", {}, config)
    assert "reusing" not in capsys.readouterr().out
    (where / "tokenizer.json").write_text("{half a fi")
    assert nb.choose_tokenizer("bpe", {}, config)[0].merges == first.merges


def test_as_short_as_the_reference_trainer_on_stories(nb, sample):
    """4,096 tokens at most: our token count is that of Hugging Face's trainer."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    source = nb.file_source(sample)
    texts = nb.first_stories(source, "train", 4_000_000)
    unseen = nb.first_stories(source, "validation", 500_000)
    reference = Tokenizer(models.BPE())
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # The Rust regex of `tokenizers` has no possessive quantifiers; these match alike.
            pre_tokenizers.Split(Regex(nb.SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=4_095,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    reference.train_from_iterator(texts, trainer)
    ours = nb.train_bpe(texts, 4_096)
    assert ours.n_vocab == reference.get_vocab_size() + 1
    n_ours = sum(map(len, ours.encode_ordinary_batch(unseen)))
    n_reference = sum(len(encoding.ids) for encoding in reference.encode_batch(unseen))
    assert n_ours == pytest.approx(n_reference, rel=0.002)


@pytest.mark.parametrize("kind", ["tokenizer", "gpt2"])
def test_the_exported_tokenizer_gives_the_same_ids(nb, request, stories, kind):
    pytest.importorskip("transformers")
    given = request.getfixturevalue(kind)
    exported = nb.export_tokenizer(given, 64)
    assert exported.convert_tokens_to_ids(nb.EOT) == given.eot_token
    for text in [*stories[:20], "naïve 🦊  \n\n 12345 it's", "  \ttabs\r\n", "DON'T"]:
        assert exported.encode(text) == given.encode_ordinary(text)
        assert exported.decode(given.encode_ordinary(text)) == text

"""How the model picks tokens, the cache, and text that is written piece by piece."""

import contextlib
import io
import math
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

PROMPT = torch.tensor([[7, 3, 250]])


def reference(logits, temperature=1.0, top_k=None, top_p=None):
    """The rules in plain Python, for one row without equal logits."""
    if temperature == 0:
        return [float(i == logits.index(max(logits))) for i in range(len(logits))]
    weights = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k]
    total = sum(weights[i] for i in order)
    kept, reached = [], 0.0
    for i in order:
        kept.append(i)
        reached += weights[i] / total
        if top_p is not None and reached >= top_p:
            break
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


@given(
    st.lists(st.integers(-60, 60), min_size=2, max_size=12, unique=True),
    st.sampled_from([0.0, 0.3, 0.8, 1.0, 1.7]),
    st.sampled_from([None, 1, 2, 5, 100]),
    st.sampled_from([None, 0.013, 0.5, 0.913, 1.0]),
)
@settings(max_examples=200, deadline=None)
def test_probabilities_equal_the_plain_rules(nb, tenths, temperature, top_k, top_p):
    logits = [i / 10 for i in tenths]
    probs = nb.sampling_probabilities(torch.tensor([logits]), temperature, top_k, top_p)
    expected = torch.tensor(reference(logits, temperature, top_k, top_p))
    torch.testing.assert_close(probs[0], expected, rtol=1e-3, atol=1e-5)


def test_rows_are_independent_and_the_logits_stay_as_they_were(nb):
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    together = nb.sampling_probabilities(logits, 0.7, 9, 0.8)
    alone = [nb.sampling_probabilities(row[None], 0.7, 9, 0.8) for row in logits]
    torch.testing.assert_close(together, torch.cat(alone))
    assert torch.equal(logits, before)


def test_a_tiny_temperature_and_extreme_logits_stay_finite(nb):
    logits = torch.tensor([[1e4, -1e4, 0.0]])
    for temperature in (1e-9, 1.0, 1e6):
        probs = nb.sampling_probabilities(logits, temperature, top_p=0.95)
        assert probs.isfinite().all() and probs.sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": 0},
        {"top_k": 2.5},
        {"top_k": True},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_p": math.nan},
    ],
    ids=str,
)
def test_senseless_sampling_parameters_are_refused_by_name(nb, wrong):
    with pytest.raises(nb.UserError, match=next(iter(wrong))):
        nb.sampling_probabilities(torch.zeros(1, 5), **wrong)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.6, "top_k": 20}, {"top_p": 0.9}], ids=str
)
def test_ten_thousand_draws_follow_the_probabilities(nb, small_model, options):
    model = small_model().eval()
    with torch.no_grad():
        probs = nb.sampling_probabilities(model(PROMPT)[0][:, -1], **options)[0]
    generator = torch.Generator().manual_seed(1)
    out = model.generate(PROMPT.expand(10_000, 3), 1, generator=generator, **options)
    counts = torch.bincount(out[:, -1], minlength=400)
    assert not counts[probs == 0].any()
    expected = probs * 10_000
    often = expected >= 5
    seen = torch.cat([counts[often], counts[~often].sum()[None]])
    wanted = torch.cat([expected[often], expected[~often].sum()[None].clamp(min=1e-9)])
    chi_square, freedom = ((seen - wanted) ** 2 / wanted).sum().item(), int(often.sum())
    # Wilson and Hilferty's approximation: about a standard normal number.
    z = ((chi_square / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom))
    assert freedom > 10 and abs(z) < 4


def test_greedy_takes_the_likeliest_token_each_time(small_model):
    model = small_model().eval()
    out = model.generate(PROMPT, 10, temperature=0.0)
    for n in range(3, 13):
        assert out[0, n] == model(out[:, :n])[0][0, -1].argmax()


def test_one_seed_one_story(small_model):
    model = small_model().eval()
    first, again, other = (
        model.generate(PROMPT, 30, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


# The cache.
@pytest.mark.parametrize("rope", [False, True])
def test_cached_logits_equal_the_uncached(small_model, rope):
    model, ids = small_model(rope=rope).eval(), torch.arange(32).view(2, 16) * 11
    caches = model.empty_caches(2, 16)
    with torch.no_grad():
        whole = model(ids)[0]
        parts = [model.hidden(ids[:, :5], caches)]
        parts += [model.hidden(ids[:, t : t + 1], caches, t) for t in range(5, 16)]
        cached = model.lm_head(torch.cat(parts, dim=1))
    torch.testing.assert_close(cached, whole, rtol=1e-4, atol=1e-4)
    with pytest.raises(AssertionError, match="one at a time"):  # the first would see the second
        model.hidden(ids[:, 5:7], caches, 5)


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("block_size", [1, 2, 7, 16])
def test_cached_stories_equal_the_uncached_across_the_limit(small_model, rope, block_size):
    model = small_model(rope=rope, block_size=block_size)
    prompt = torch.arange(40).view(2, 20) * 9
    for n in (3, 20):  # a prompt within the context, and one that is longer
        ways = [
            model.generate(prompt[:, :n], 50, temperature=0.0, use_cache=use_cache)
            for use_cache in (True, False)
        ]
        assert ways[0].shape == (2, n + 50) and torch.equal(*ways)


def test_beyond_the_limit_the_newest_tokens_are_the_context(small_model):
    """Only tokens within the last `block_size` places decide on the next."""
    model = small_model()
    out = model.generate(PROMPT, 60, temperature=0.0)
    again = model.generate(out[:, :40][:, -16:], 1, temperature=0.0)
    assert again[0, -1] == model(out[:, 24:40])[0][0, -1].argmax()
    assert out[:, 3:].unique().numel() > 3


# Stopping and modes.
def test_a_story_stops_at_the_stop_token(small_model):
    model = small_model()
    free = model.generate(PROMPT, 20, temperature=0.0)[0].tolist()
    stop = free[8]
    stopped = model.generate(PROMPT, 20, temperature=0.0, stop_token=stop)[0].tolist()
    assert stopped == free[: free.index(stop, 3) + 1]


def test_a_batch_waits_for_all_and_pads_those_that_are_done(small_model):
    model, prompts = small_model(), torch.tensor([[7, 3], [90, 200]])
    free = model.generate(prompts, 25, temperature=0.0)
    stop = next(t for t in free[0, 4:].tolist() if t not in free[1])
    out = model.generate(prompts, 25, temperature=0.0, stop_token=stop)
    first = free[0].tolist().index(stop, 2)
    assert out[0, : first + 1].tolist() == free[0, : first + 1].tolist()
    assert (out[0, first:] == stop).all() and out.shape[1] > first + 1
    assert out[1].tolist()[:-1] == free[1, : out.shape[1] - 1].tolist()


@pytest.mark.parametrize("training", [True, False])
def test_writing_is_without_dropout_and_puts_the_mode_back(small_model, training):
    model = small_model(dropout=0.5).train(training)
    once, twice = (model.generate(PROMPT, 12, temperature=0.0) for _ in range(2))
    assert torch.equal(once, twice) and model.training == training
    story = model.generate_stream(PROMPT, 12)
    next(story)
    story.close()  # a reader who stops listening
    assert model.training == training


def test_a_prompt_of_any_length_works(small_model):
    model = small_model()
    for n in (1, 15, 16, 17, 50):
        assert model.generate(torch.ones(1, n, dtype=torch.long), 4).shape == (1, n + 4)


# Text.
def parrot(tokens, block_size=99):
    """In place of a model: writes these tokens, whatever the prompt."""
    return types.SimpleNamespace(
        config=types.SimpleNamespace(block_size=block_size),
        parameters=lambda: iter([torch.zeros(1)]),
        generate_stream=lambda *_, **__: iter(torch.tensor(tokens).view(-1, 1, 1)),
    )


def test_characters_that_are_split_between_tokens_come_out_whole(nb, tokenizer):
    text = "“Hi 🦊”, naïve"
    tokens = list(text.encode())  # a token for each byte
    pieces = list(nb.stream_text(parrot(tokens), tokenizer, "Once"))
    assert "".join(pieces) == text and len(pieces) >= len(tokens)
    ended = nb.generate_text(parrot([*tokens, tokenizer.eot_token, 65]), tokenizer, "Once")
    assert ended == f"Once{text}"


def test_half_a_character_at_the_end_is_shown_as_such(nb, tokenizer):
    assert nb.generate_text(parrot(list("🦊".encode())[:2]), tokenizer, "") == "\ufffd"


def test_the_model_is_asked_from_end_of_text_without_a_last_space(nb, tokenizer):
    asked = []
    model = parrot([65])
    model.generate_stream = lambda idx, *_, **options: (
        asked.append((idx.tolist(), options)) or iter(())
    )
    assert nb.generate_text(model, tokenizer, "Once upon  \n") == "Once upon"
    ids, options = asked[0]
    assert ids == [[tokenizer.eot_token, *tokenizer.encode_ordinary("Once upon")]]
    assert options["stop_token"] == tokenizer.eot_token


@pytest.mark.parametrize("prompt", ["", " ", "🦊 naïve", "<|endoftext|>", "word " * 200])
def test_any_prompt_is_continued(nb, tokenizer, small_model, prompt):
    text = nb.generate_text(small_model(), tokenizer, prompt, 10, seed=1)
    assert text.startswith(prompt.rstrip()) and len(text) > len(prompt.rstrip())
    assert text == nb.generate_text(small_model(), tokenizer, prompt, 10, seed=1)


@pytest.mark.parametrize("n", [0, -5, 2.5, None, True])
def test_a_senseless_length_is_refused(nb, tokenizer, small_model, n):
    with pytest.raises(nb.UserError, match="max_new_tokens"):
        nb.generate_text(small_model(), tokenizer, "Once", n)


@pytest.mark.parametrize("ends, expected", [(True, "The end."), (False, "(limit of 4 tokens")])
def test_the_last_cell_says_how_the_story_ended(nb, tokenizer, monkeypatch, capsys, ends, expected):
    tokens = [*b" all"] + [tokenizer.eot_token] * ends
    monkeypatch.setattr(nb, "model", parrot(tokens), raising=False)
    monkeypatch.setattr(nb, "tokenizer", tokenizer, raising=False)
    assert nb.tell("That is ", 4) == "That is all"
    shown = capsys.readouterr().out
    assert shown.startswith("That is all\n\n") and expected in shown.splitlines()[-1]


@given(st.lists(st.sampled_from("a bc. \n-é") | st.text("abc ", max_size=150), max_size=40))
@settings(max_examples=200, deadline=None)
def test_what_is_printed_while_writing_is_the_wrapped_story(nb, pieces):
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(nb, "stream_text", lambda *_, **__: iter([*pieces, nb.EOT]))
        for name in ("model", "tokenizer"):
            patch.setattr(nb, name, None, raising=False)
        story = nb.tell("Once ", 300, temperature=0.5)
    assert story == "Once" + "".join(pieces)
    assert printed.getvalue() == f"{nb.wrapped(story)}\n\nThe end.\n"


def test_a_story_is_printed_line_by_line(nb, monkeypatch):
    printed, seen = io.StringIO(), []

    def pieces(*_, **__):
        for piece in (" upon", " a time", "\n", "there", " was", " a" * 50):
            yield piece
            seen.append(printed.getvalue())

    monkeypatch.setattr(nb, "stream_text", pieces)
    for name in ("model", "tokenizer"):
        monkeypatch.setattr(nb, name, None, raising=False)
    with contextlib.redirect_stdout(printed):
        nb.tell("Once", 5)
    first = "Once upon a time\n"
    assert seen == [*4 * [""], first, f"{first}there was{' a' * 45}\n"]


def test_repeated_runs_are_counted_from_the_second_on(nb):
    assert nb.repeated([1, 2, 3]) == 0 == nb.repeated([1, 2, 3, 4, 5])
    assert nb.repeated([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


def test_many_stories_are_cut_at_their_ends(nb, tokenizer, small_model, monkeypatch):
    for name, value in {"tokenizer": tokenizer, "device": "cpu", "SEED": 1}.items():
        monkeypatch.setattr(nb, name, value, raising=False)
    tokens = torch.tensor([[7, 5, tokenizer.eot_token, tokenizer.eot_token], [8, 5, 6, 9]])
    stand_in = types.SimpleNamespace(generate=lambda *_, **__: tokens)
    monkeypatch.setattr(nb, "model", stand_in, raising=False)
    assert nb.write_many(tokens[:, :1], 3) == [[5], [5, 6, 9]]

"""Text from tokens as they come: with every kind of tokenizer, whatever a model says."""

import random
from functools import cache

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from matvlm.generation.text import CONTEXT, Pieces, StopStrings, cut
from matvlm.models.locate import locate

TEXTS = [
    "The circle is red, isn't it? Yes.\n\n  - two  spaces,\ttab; x = f(a[0]) # 100%",
    "图像里有一个红色的圆形。你好,世界!",
    "Emojis 😀😀 👩‍👩‍👧‍👦 🏳️‍🌈 in 1️⃣ row 🇧🇪",
    "Combining: e\u0301a\u0308 n\u0303, Việt Nam, हिन्दी, ภาษาไทย, العربية",
    " leading and trailing space ",
]
KINDS = ["package", "byte-level", "metaspace", "metaspace bytes", "llama", "word pieces", "bytes in python"]
WHOLE = ["byte-level", "metaspace bytes", "llama", "bytes in python"]
"""Those that can say every text."""
SPECIAL = ["<unk>", "<eos>", "<image>"]


def trained(model, trainer, pre_tokenizer, decoder) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def byte_level() -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, special_tokens=SPECIAL)
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return trained(models.BPE(), trainer, split, decoders.ByteLevel())


def metaspace(byte_fallback: bool) -> Tokenizer:
    """Unigram, as SentencePiece makes it; a few characters are in its vocabulary only with ``byte_fallback``."""
    trainer = trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIAL, unk_token="<unk>")
    tokenizer = trained(models.Unigram(), trainer, pre_tokenizers.Metaspace(), decoders.Metaspace())
    if byte_fallback:
        vocabulary = [(word, 0.0) for word in (*SPECIAL, *byte_names())]
        vocabulary += [(word, -float(rank)) for rank, word in enumerate(["▁", "a", "e", "▁the", "s", "!", "你", "▁你"])]
        tokenizer.model = models.Unigram(vocabulary, unk_id=0, byte_fallback=True)
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


def llama() -> Tokenizer:
    """BPE with bytes for what it does not know, and the space of the first word taken away."""
    words = [*SPECIAL, *byte_names(), "▁", "a", "e", "t", "h", "�", "▁t", "he", "▁the", "好"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def word_pieces() -> Tokenizer:
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL)
    split = pre_tokenizers.BertPreTokenizer()
    return trained(models.WordPiece(unk_token="<unk>"), trainer, split, decoders.WordPiece())


def byte_names() -> list[str]:
    return [f"<0x{byte:02X}>" for byte in range(256)]


@cache
def tokenizer_of(kind: str):
    if kind == "package":
        return AutoTokenizer.from_pretrained(locate("package://easyvqa-teacher"))
    if kind == "bytes in python":
        return ByT5Tokenizer()
    made = {
        "byte-level": byte_level,
        "metaspace": lambda: metaspace(False),
        "metaspace bytes": lambda: metaspace(True),
        "llama": llama,
        "word pieces": word_pieces,
    }[kind]()
    made.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    made.add_tokens(["<|user|>"])
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="<eos>")


@pytest.fixture(params=KINDS)
def tokenizer(request):
    return tokenizer_of(request.param)


def decode(tokenizer, tokens):
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def random_tokens(tokenizer, rng, length):
    """Any tokens, special ones and some beyond the vocabulary included; now and then those of a text."""
    size = len(tokenizer) + 3 * tokenizer.is_fast
    tokens: list[int] = []
    while len(tokens) < length:
        some = tokenizer(rng.choice(TEXTS), add_special_tokens=False)["input_ids"]
        start = rng.randrange(len(some))
        tokens += rng.choice([some, some[start : start + 4], [rng.randrange(size) for _ in range(5)]])
    return tokens[:length]


def test_pieces_and_rest_are_the_decoded_text_after_every_token(tokenizer):
    rng = random.Random(0)
    for _ in range(40):
        tokens = random_tokens(tokenizer, rng, rng.randrange(1, 120))
        pieces, text = Pieces(tokenizer), ""
        for count, token in enumerate(tokens, 1):
            text += pieces.push(token)
            assert text + pieces.rest() == decode(tokenizer, tokens[:count]), tokens[:count]
        assert pieces.rest() == pieces.rest()


def test_the_whole_is_what_generate_would_decode(tokenizer):
    """With transformers' own default, where the tokenizer does not clean up."""
    assert not tokenizer.clean_up_tokenization_spaces
    tokens = random_tokens(tokenizer, random.Random(1), 300)
    pieces = Pieces(tokenizer)
    assert "".join(map(pieces.push, tokens)) + pieces.rest() == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("kind", WHOLE)
@pytest.mark.parametrize("text", TEXTS)
def test_no_piece_ends_in_the_middle_of_a_character(kind, text):
    tokenizer = tokenizer_of(kind)
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(tokens) > len(text) / 3
    pieces = Pieces(tokenizer)
    given = [pieces.push(token) for token in tokens]
    assert not any("�" in piece for piece in given)
    assert "".join(given) + pieces.rest() == decode(tokenizer, tokens)
    assert decode(tokenizer, tokens).strip() == text.strip()


def test_an_emoji_comes_with_its_last_byte():
    tokenizer = tokenizer_of("byte-level")
    tokens = tokenizer("a🦜b", add_special_tokens=False)["input_ids"]
    pieces = Pieces(tokenizer)
    given = [pieces.push(token) for token in tokens]
    assert given == ["a", "", "", "🦜", "b"]  # its first two bytes are a token, as in 😀
    assert pieces.rest() == ""


def test_bytes_in_a_row_come_together_because_one_can_spoil_all():
    tokenizer = tokenizer_of("llama")
    bytes_of = lambda *values: [tokenizer.convert_tokens_to_ids(f"<0x{value:02X}>") for value in values]  # noqa: E731
    good, bad = bytes_of(0xE2, 0x82, 0xAC), bytes_of(0xFF)
    (a,) = tokenizer.convert_tokens_to_ids(["a"])
    assert [decode(tokenizer, [*good, a]), decode(tokenizer, [*good, *bad, a])] == ["€a", "����a"]
    pieces = Pieces(tokenizer)
    given = [pieces.push(token) for token in (a, *good)]
    assert given == ["a", "", "", ""]
    assert pieces.rest() == "€"
    assert pieces.push(a) == "€a"


def test_a_word_has_its_space_and_the_first_has_none():
    for kind in ("llama", "metaspace", "package", "word pieces"):
        tokenizer = tokenizer_of(kind)
        words = {"llama": "the the the", "package": "red red red"}.get(kind, "is is is")
        pieces = Pieces(tokenizer)
        given = list(filter(None, map(pieces.push, tokenizer(words, add_special_tokens=False)["input_ids"])))
        assert "".join(given) == words
        assert not given[0].startswith(" ")


class Counting(PreTrainedTokenizerFast):
    """Notes how many tokens it decodes at a time."""

    longest = 0

    def decode(self, token_ids, **options):
        self.longest = max(self.longest, len(token_ids))
        return super().decode(token_ids, **options)


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "llama"])
def test_a_token_costs_the_same_however_long_the_answer(kind):
    tokenizer = Counting(tokenizer_object=tokenizer_of(kind).backend_tokenizer)
    rng = random.Random(0)
    tokens = [token for _ in range(300) for token in [*random_tokens(tokenizer, rng, 10), tokenizer.vocab["a"]]]
    text = StopStrings(tokenizer, ["this text is never said"])
    for token in tokens:
        text.push(token)
    assert CONTEXT < tokenizer.longest <= 2 * CONTEXT + 10


def first_stop(tokenizer, tokens, stop):
    """Written out: after how many tokens the text has one of ``stop`` (None: never), and the text before it."""
    for count in range(1, len(tokens) + 1):
        text = decode(tokenizer, tokens[:count])
        if any(word in text for word in stop):
            return count, min((text.partition(word)[0] for word in stop), key=len)
    return None, decode(tokenizer, tokens)


def test_an_answer_ends_before_the_first_stop_string(tokenizer):
    rng = random.Random(2)
    ended = 0
    for _ in range(150):
        tokens = random_tokens(tokenizer, rng, rng.randrange(1, 60))
        text = decode(tokenizer, tokens)
        starts = [rng.randrange(len(text) + 1) for _ in range(rng.randrange(4))]
        words = [text[start : start + rng.randrange(1, 7)] for start in starts] + ["#" + text[:3]]
        stop = [word for word in words if word]
        count, expected = first_stop(tokenizer, tokens, stop)
        stream = StopStrings(tokenizer, stop)
        given = ""
        for at, token in enumerate(tokens, 1):
            given += stream.push(token)
            assert stream.found == (at == count)
            assert expected.startswith(given)
            if stream.found:
                assert stream.rest() == ""
                ended += 1
                break
            assert given + stream.rest() == decode(tokenizer, tokens[:at])
        assert given + stream.rest() == expected
    assert 50 < ended < 150


def test_only_what_may_be_a_stop_string_is_held_back():
    tokenizer = tokenizer_of("bytes in python")  # a token is a character
    stream = StopStrings(tokenizer, ["--end", "ab", "bbc"])
    given = [stream.push(token) for token in tokenizer("x--y a---ebbbc", add_special_tokens=False)["input_ids"]]
    assert given == ["x", "", "", "--y", " ", "", "a", "", "-", "", "--e", "", "b", ""]
    assert stream.found


def test_a_stop_string_that_is_a_byte_ends_the_answer_at_once():
    """A newline is a byte of its own in Llama's vocabulary, and waits for the next token where it is only text."""
    tokenizer = tokenizer_of("llama")
    tokens = tokenizer("the\n", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(tokens) == ["▁the", "<0x0A>"]
    stream = StopStrings(tokenizer, ["\n"])
    assert [stream.push(token) for token in tokens] == ["the", ""]
    assert stream.found


def test_without_stop_strings_the_text_is_that_of_the_pieces(tokenizer):
    tokens = random_tokens(tokenizer, random.Random(3), 80)
    pieces, stream = Pieces(tokenizer), StopStrings(tokenizer, ())
    assert [stream.push(token) for token in tokens] == [pieces.push(token) for token in tokens]
    assert stream.rest() == pieces.rest()
    assert not stream.found


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [("abc", (), "abc"), ("abc", ("c", "b"), "a"), ("abc", ("abcd",), "abc"), ("", ("a",), ""), ("aab", ("ab",), "a")],
)
def test_cut(text, stop, expected):
    assert cut(text, stop) == expected

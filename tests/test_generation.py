"""The engine against transformers' ``generate`` and against recomputed logits: every family, hybrid and plain."""

from __future__ import annotations

import gc
import math
import re
import weakref

import pytest
import torch
from family_table import TOLERANCE, Case, hybrid_case, largest, teacher_case
from tiny_families import FAMILIES, IMAGE_TOKEN, VOCABULARY, batch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from matvlm.costs import cache_parts
from matvlm.generation import Engine, Sampling
from matvlm.generation.cache import APART, CROWDED, KeyValues
from matvlm.generation.engine import ROUND
from matvlm.generation.text import cut
from matvlm.models.hybrid import decoder_layers, mixers

PROMPTS = {"one": (9,), "padded": (4, 13, 8)}
"""Tokens of text in each; the longest is longer than a sliding window, the shortest is not."""
NEW_TOKENS = 9
PART = 3
"""Tokens of a prompt at a time: fewer than its padding, its image and a sliding window."""


def made(name: str, kind: str) -> Case:
    """The model of a family that never says an image's tokens, which are no text."""
    case = {"plain": teacher_case, "hybrid": hybrid_case}[kind](name)
    for parameter in case.model.get_output_embeddings().parameters():
        parameter.data[IMAGE_TOKEN:] = parameter.data[IMAGE_TOKEN - 1] / 2
    if getattr(case.model.config, "attn_logit_softcapping", None):
        case.model.set_attn_implementation("eager")  # the only one with the cap; transformers 5.17 takes another
    return case


@pytest.fixture(scope="module", params=[f"{name} {kind}" for name in FAMILIES for kind in ("plain", "hybrid")])
def case(request):
    return made(*request.param.split())


@pytest.fixture(scope="module")
def llava():
    return made("llava", "hybrid")


@pytest.fixture(scope="module")
def llama():
    return made("llama", "hybrid")


def by_transformers(model, inputs, **options):
    """The answers of ``generate``, each up to its end token."""
    ids = model.generate(**inputs, do_sample=False, **{"max_new_tokens": NEW_TOKENS, **options})
    answers = ids[:, inputs["input_ids"].shape[1] :].tolist()
    ends = options.get("eos_token_id", [])
    return [row[: next((at + 1 for at, token in enumerate(row) if token in ends), len(row))] for row in answers]


def greedy(model, inputs, **options):
    return Engine(model, **options).generate(inputs, Sampling(max_new_tokens=NEW_TOKENS))


def words():
    """A tokenizer whose every token is a word."""
    names = {f"w{index}": index for index in range(VOCABULARY)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(names, unk_token="w0")))


def bytes_of_characters():
    """A tokenizer whose every token is a byte: most characters take several, and many rows of bytes are none."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:: 256 // VOCABULARY]
    tokenizer = Tokenizer(models.BPE({byte: number for number, byte in enumerate(alphabet)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("part", [None, PART], ids=["whole", "in parts"])
@pytest.mark.parametrize("lengths", PROMPTS.values(), ids=PROMPTS)
def test_greedy_tokens_are_those_of_transformers(case, lengths, part):
    inputs = batch(case.prompts(*lengths))
    options = {} if part is None else {"chunk": part}
    assert greedy(case.model, inputs, **options) == by_transformers(case.model, inputs)


def test_a_prompt_of_one_token_is_answered(case):
    ids = torch.tensor([[7], [9]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **case.family.token_types(ids, 0)}
    assert greedy(case.model, inputs) == by_transformers(case.model, inputs)


def test_logits_of_every_step_are_those_of_a_recompute(case):
    """Of tokens that the model would not have chosen, too."""
    prompts = case.prompts(*PROMPTS["padded"])
    inputs = batch(prompts)
    answers = torch.randint(3, IMAGE_TOKEN, (len(prompts), 6), generator=torch.Generator().manual_seed(0))
    session = Engine(case.model, chunk=PART).open(len(prompts), inputs["input_ids"].shape[1] + answers.shape[1])
    session.prefill(inputs)
    steps = [session.step().clone(), *(session.step(ids).clone() for ids in answers.T[:-1])]
    for prompt, answer, logits in zip(prompts, answers, torch.stack(steps, dim=1), strict=True):
        assert largest(logits, case.recompute(prompt, answer)) < TOLERANCE


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
@pytest.mark.parametrize("name", ["phi", "gemma2", "qwen2_vl"])
def test_each_answer_ends_at_its_own_end_token(name, kind):
    case = made(name, kind)
    inputs = batch(case.prompts(*PROMPTS["padded"]))
    whole = by_transformers(case.model, inputs)
    ends = [whole[0][2], whole[1][5]]
    case.model.generation_config.eos_token_id = ends
    answers = greedy(case.model, inputs)
    assert answers == by_transformers(case.model, inputs, eos_token_id=ends, pad_token_id=0)
    assert len(answers[0]) <= 3
    assert len({len(answer) for answer in answers}) > 1
    on = Engine(case.model).generate(inputs, Sampling(max_new_tokens=NEW_TOKENS, ignore_eos=True))
    assert on == whole
    case.model.generation_config.eos_token_id = ends[0]  # one, not a list
    assert greedy(case.model, inputs) == by_transformers(case.model, inputs, eos_token_id=ends[:1], pad_token_id=0)


def test_a_prompt_without_image_may_stand_beside_one_with(llava):
    with_image, _ = prompts = llava.prompts(6, 6)
    text = {"input_ids": torch.arange(3, 12)[None], "attention_mask": torch.ones(1, 9, dtype=torch.long)}
    texts = [{name: prompt[name] for name in text} for prompt in (text, with_image)]
    inputs = {**batch(texts), "pixel_values": with_image["pixel_values"]}
    answers = greedy(llava.model, inputs, chunk=PART)
    assert answers == by_transformers(llava.model, inputs)
    assert answers[1:] == greedy(llava.model, prompts[0])
    assert answers[:1] == greedy(llava.model, text)


def test_an_answer_longer_than_a_multiple_of_the_cache_and_than_the_trained_positions(llama):
    inputs = batch(llama.prompts(9, 5))
    count = ROUND + 10
    answers = Engine(llama.model).generate(inputs, Sampling(max_new_tokens=count))
    assert answers == by_transformers(llama.model, inputs, max_new_tokens=count)


def test_an_engine_forgets_what_it_was_asked_before(llava):
    """Also where the same memory serves again, after a longer prompt."""
    engine, sampling = Engine(llava.model, chunk=PART), Sampling(max_new_tokens=NEW_TOKENS)
    for lengths in ((14, 9), (4, 11), (9,), (14, 9), (3, 3)):
        inputs = batch(llava.prompts(*lengths))
        assert engine.generate(inputs, sampling) == by_transformers(llava.model, inputs), lengths


def test_the_model_is_left_as_it_was(llava):
    inputs = batch(llava.prompts(9, 4))
    state = {name: value.clone() for name, value in llava.model.state_dict().items()}
    config, before = llava.model.config.to_dict(), by_transformers(llava.model, inputs)
    attention = llava.model.get_decoder().config._attn_implementation
    greedy(llava.model, inputs)
    assert by_transformers(llava.model, inputs) == before
    assert llava.model.config.to_dict() == config
    assert llava.model.get_decoder().config._attn_implementation == attention
    assert state.keys() == llava.model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in llava.model.state_dict().items())
    llava.model(**inputs).logits.sum().backward()
    llava.model.zero_grad()


@pytest.mark.parametrize("kind", ["plain", "hybrid"])
@pytest.mark.parametrize("name", ["phi", "qwen3", "llava"])
def test_the_memory_is_as_large_as_stated(name, kind):
    """Written out: keys and values of the attention layers for the whole capacity; states of any length of text."""
    case = made(name, kind)
    inputs = batch(case.prompts(9, 4))
    session = Engine(case.model, chunk=PART).open(2, 2 * ROUND)
    session.prefill(inputs)
    session.step()
    config = case.model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    replaced = mixers(case.model)
    attentions = len(decoder_layers(case.model)) - len(replaced)
    stated = cache_parts(session.cache)
    assert stated[0] == attentions * 2 * 2 * (2 * ROUND) * config.num_key_value_heads * head_dim * 4
    channels = (2 * config.num_key_value_heads + config.num_attention_heads) * head_dim
    held = [channels * (mixer.options.conv_kernel - 1) for mixer in replaced.values()]
    held += [config.num_attention_heads * head_dim**2] * len(replaced)
    assert stated[1] == 2 * sum(held) * 4
    for _ in range(20):
        session.step(torch.tensor([5, 6]))
    assert cache_parts(session.cache) == stated


def test_heads_do_not_lie_a_power_of_two_apart(llama):
    inputs, logits = batch(llama.prompts(9, 4)), []
    for capacity in (2 * CROWDED - ROUND, 2 * CROWDED):
        session = Engine(llama.model).open(2, capacity)
        session.prefill(inputs)
        logits.append(session.step())
        keys = next(layer.keys for layer in session.cache.layers if isinstance(layer, KeyValues))
        assert session.cache.capacity == capacity <= keys.shape[2] <= capacity + APART
        assert keys.shape[2] % CROWDED
    assert torch.equal(*logits)


def test_a_session_has_room_for_what_was_asked(llama):
    inputs = batch(llama.prompts(9, 4))
    session = Engine(llama.model).open(2, ROUND)
    session.prefill(inputs)
    session.step()
    for _ in range(ROUND - 9):
        session.step(torch.tensor([5, 6]))
    with pytest.raises(ValueError, match=f"room for {ROUND} tokens"):
        session.step(torch.tensor([5, 6]))


def test_stop_strings_end_answers(llama):
    tokenizer = words()
    inputs = batch(llama.prompts(*PROMPTS["padded"]))
    whole = greedy(llama.model, inputs)
    stop = (f"w{whole[0][3]} w{whole[0][4]}", f" w{whole[1][1]}")
    engine = Engine(llama.model, tokenizer)
    answers = engine.generate(inputs, Sampling(max_new_tokens=NEW_TOKENS, stop=stop))
    for answer, row in zip(answers, whole, strict=True):
        counts = range(1, len(row) + 1)
        ended = [count for count in counts if any(text in tokenizer.decode(row[:count]) for text in stop)]
        assert answer == row[: min(ended, default=len(row))]
    assert len(answers[0]) <= 5
    assert len(answers[1]) == 2


@pytest.mark.parametrize("make", [words, bytes_of_characters])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_stream_says_what_generate_says(llava, make, temperature):
    tokenizer = make()
    engine = Engine(llava.model, tokenizer)
    for seed in range(6):
        (inputs,) = llava.prompts(5 + seed)
        sampling = Sampling(max_new_tokens=25, temperature=temperature, seed=seed)
        (expected,) = engine.generate(inputs, sampling)
        text = tokenizer.decode(expected, skip_special_tokens=True)
        for stop in ((), (text[9:12],), (text[4:6], text[-2:])):
            stream = engine.stream(inputs, Sampling(max_new_tokens=25, temperature=temperature, seed=seed, stop=stop))
            assert "".join(stream) == cut(text, stop)
            assert stream.tokens == expected[: len(stream.tokens)]
            assert (len(stream.tokens) == 25) or stop


def test_a_stream_comes_while_it_is_made_and_knows_its_speed(llava):
    engine = Engine(llava.model, words())
    (inputs,) = llava.prompts(9)
    stream = engine.stream(inputs, Sampling(max_new_tokens=12))
    known = [(len(stream.tokens), stream.decode_tokens_per_second) for _ in stream]
    assert [tokens for tokens, _ in known] == list(range(1, 13))
    assert known[0][1] == 0.0
    assert all(0 < speed < math.inf for _, speed in known[1:])
    assert stream.prompt_tokens == inputs["input_ids"].shape[1]
    assert 0 < stream.first_token_seconds < 60


def test_sampling_is_a_function_of_the_seed(llava):
    engine = Engine(llava.model)
    inputs = batch(llava.prompts(9, 4, 6))

    def answers(seed, **values):
        return engine.generate(inputs, Sampling(max_new_tokens=20, temperature=1.5, seed=seed, **values))

    assert answers(1) == answers(1)
    assert answers(1) != answers(2)
    torch.manual_seed(0)
    first = torch.rand(1)
    torch.manual_seed(0)
    answers(1)
    assert torch.rand(1) == first, "torch's own generator is left alone"
    assert answers(1, top_k=1) == engine.generate(inputs, Sampling(max_new_tokens=20))


def test_what_cannot_be_is_refused(llama):
    engine = Engine(llama.model)
    inputs = batch(llama.prompts(9, 4))
    right = {name: value.flip(1) for name, value in inputs.items()}
    for attempt, complaint in (
        (lambda: engine.generate(right), "padding must be on the left"),
        (lambda: engine.open(1, 5).prefill(inputs), "do not fit"),
        (lambda: engine.open(2, ROUND).prefill(batch(llama.prompts(ROUND + 1, 2))), "do not fit"),
        (lambda: engine.generate(inputs, Sampling(stop=("w1",))), "tokenizer"),
        (lambda: engine.stream(llama.prompts(4)[0], Sampling()), "tokenizer"),
        (lambda: Engine(llama.model, words()).stream(inputs, Sampling()), "one prompt"),
    ):
        with pytest.raises(ValueError, match=re.escape(complaint)):
            attempt()


def test_the_memory_of_a_session_is_free_when_it_is_given_up(llava):
    engine = Engine(llava.model)
    session = engine.open(1, ROUND)
    session.prefill(batch(llava.prompts(5)))
    session.step()
    cache = weakref.ref(session.cache)
    gc.disable()  # which would find cycles too, but late
    try:
        engine.session = session = None
        assert cache() is None
    finally:
        gc.enable()


def test_streams_of_one_engine_do_not_mix(llava):
    engine = Engine(llava.model, words())
    sampling = Sampling(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    alone = ["".join(engine.stream(prompt, sampling)) for prompt in llava.prompts(7, 6)]
    first, other = (engine.stream(prompt, sampling) for prompt in llava.prompts(7, 6))
    pieces = [next(first), next(other)]
    assert [pieces[0] + "".join(first), pieces[1] + "".join(other)] == alone


def test_what_the_engine_cannot_hand_over_is_refused(llama):
    (prompt,) = llama.prompts(5)
    session = Engine(llama.model).open(1, ROUND)
    with pytest.raises(ValueError, match=r"Llama.*given visual_pos_masks too.*use generate\(\)"):
        session.prefill({**prompt, "visual_pos_masks": torch.ones(1, 5)})

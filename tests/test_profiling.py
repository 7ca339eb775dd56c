"""Profiling: what it counts and says is true of the models; the loop it times is greedy generation."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from matvlm import profiling
from matvlm.artifacts import Checkpoint, ProfilePoint, ProfileResult
from matvlm.config import Profile
from matvlm.init import convert_
from matvlm.models import hybrid
from matvlm.models.small import SmallVLM, build_model, build_tokenizer
from matvlm.reporting import Reporter

SIZES = SmallVLM(vision_hidden=32, vision_layers=1, vision_mlp=32, hidden=32, layers=4, mlp=64, max_positions=128)
HEAD_WIDTH = SIZES.hidden // SIZES.heads
KV_BYTES = 2 * SIZES.hidden * 4
"""Of one layer and token: keys and values in float32."""
STATE_BYTES = SIZES.heads * HEAD_WIDTH * HEAD_WIDTH * 4 + 3 * SIZES.hidden * 3 * 4
"""Of one mixer: the recurrent state, and the last 3 inputs of x, B and C to the convolution."""


class Recorder(Reporter):
    def __init__(self):
        self.seen, self.last_progress = {}, None

    def metrics(self, values, step=0):
        self.seen |= {(name, step): value for name, value in values.items()}

    def progress(self, done, total):
        self.last_progress = (done, total)


def small_model(layers=(), **text_overrides):
    model = build_model(SIZES, build_tokenizer(["what shape is in the image"]), **text_overrides)
    if layers:
        convert_(model, layers, "aligned", seed=0)
    return model.eval()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    hybrid.save(small_model(), None, folder / "teacher", {})
    hybrid.save(small_model([0, 2]), None, folder / "student", {})
    return [Checkpoint(uri=str(folder / label), label=label) for label in ("teacher", "student")]


def result_of(*points):
    return ProfileResult(points=list(points), machine={}, repeats=1, new_tokens=1)


def point(label, context=64, prefill=1.0, decode=10.0, cache=1000, peak=None):
    return ProfilePoint(
        label=label,
        context=context,
        batch_size=1,
        prefill_seconds=prefill,
        decode_tokens_per_second=decode,
        cache_bytes=cache,
        peak_bytes=peak,
        prefill_seconds_each=[prefill],
        decode_tokens_per_second_each=[decode],
    )


def test_profile_measures_every_model_at_every_context(checkpoints):
    recorder = Recorder()
    settings = Profile(contexts=[16, 96], new_tokens=3, batch_size=2, repeats=2)
    result = profiling.profile(checkpoints, settings, recorder)
    assert [(p.label, p.context) for p in result.points] == [
        ("teacher", 16),
        ("teacher", 96),
        ("student", 16),
        ("student", 96),
    ]
    for p in result.points:
        replaced = 2 if p.label == "student" else 0
        kept = SIZES.layers - replaced
        assert p.cache_bytes == 2 * (kept * KV_BYTES * p.context + replaced * STATE_BYTES)
        assert p.prefill_seconds > 0
        assert p.decode_tokens_per_second > 0
        assert p.peak_bytes is None
        assert recorder.seen[f"profile/{p.label}/cache_bytes", p.context] == p.cache_bytes
        assert recorder.seen[f"profile/{p.label}/decode_tokens_per_second", p.context] == p.decode_tokens_per_second
    assert recorder.last_progress == (12, 12)
    assert (result.repeats, result.new_tokens) == (2, 3)
    assert {"cpu", "cores", "threads", "torch", "transformers", "kernels", "input"} <= result.machine.keys()
    assert result.machine["threads"] == str(torch.get_num_threads())
    assert ProfileResult.model_validate(result.model_dump(mode="json")) == result


@pytest.mark.parametrize("layers", [[], [0, 2]], ids=["teacher", "hybrid"])
def test_the_timed_loop_is_greedy_generation(layers):
    model = small_model(layers)
    subject = profiling._Subject("model", model)
    ids = profiling._random_ids(subject, 2, 20, torch.device("cpu"))
    cache, tokens = DynamicCache(config=subject.config), []
    with torch.inference_mode():
        token = subject.next_token(ids, cache)
        for _ in range(6):
            tokens.append(token)
            token = subject.next_token(token, cache)
    model.generation_config.eos_token_id = None
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert torch.equal(torch.cat(tokens, 1), expected[:, 20:])


def test_a_text_only_model_is_measured_too(tmp_path):
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    hybrid.save(LlamaForCausalLM(config), None, tmp_path / "llama", {})
    settings = Profile(contexts=[10], new_tokens=2, repeats=1)
    (only,) = profiling.profile([Checkpoint(uri=str(tmp_path / "llama"), label="x")], settings, Reporter()).points
    assert only.cache_bytes == 2 * 2 * (2 * 8) * 10 * 4  # 2 layers, keys and values, 2 heads of 8, 10 tokens, float32


def test_models_take_turns_in_alternating_order():
    settings = Profile(contexts=[8, 16], repeats=2)
    turns = list(profiling._turns(["a", "b"], settings))
    assert "".join(subject for subject, context, _ in turns if context == 8) == "baabba"
    assert [repeat for subject, context, repeat in turns if (subject, context) == ("a", 16)] == [0, 1, 2]


def test_points_are_medians():
    samples = [profiling._Sample(p, d, 500, m) for p, d, m in ((1.0, 4.0, 7), (9.0, 2.0, 9), (3.0, 1.0, 8))]
    median = profiling._median_point("x", 32, samples, Profile(new_tokens=10, batch_size=3))
    assert (median.label, median.context, median.batch_size) == ("x", 32, 3)
    assert (median.prefill_seconds, median.prefill_seconds_each) == (3.0, [1.0, 9.0, 3.0])
    assert (median.decode_tokens_per_second, median.decode_tokens_per_second_each) == (15.0, [7.5, 15.0, 30.0])
    assert (median.cache_bytes, median.peak_bytes) == (500, 9)


def test_compare_pairs_the_repeats():
    slow_moments = {"prefill_seconds_each": [1.0, 8.0, 2.0], "decode_tokens_per_second_each": [4.0, 1.0, 2.0]}
    teacher = point("teacher").model_copy(update=slow_moments)
    student = point("student").model_copy(
        update={"prefill_seconds_each": [0.5, 2.0, 2.0], "decode_tokens_per_second_each": [8.0, 2.0, 2.0]}
    )
    (row,) = profiling.compare(result_of(teacher, student))
    assert (row.prefill_speed, row.decode_speed) == (2.0, 2.0)


def test_compare_gives_ratios_to_the_baseline_of_the_same_context():
    rows = profiling.compare(
        result_of(
            point("teacher", 64, prefill=2.0, decode=10.0, cache=1000, peak=400),
            point("teacher", 128, prefill=8.0, decode=5.0, cache=2000),
            point("student", 64, prefill=4.0, decode=12.0, cache=750, peak=300),
            point("student", 128, prefill=2.0, decode=10.0, cache=1500),
        )
    )
    assert rows == [
        profiling.Comparison("student", 64, prefill_speed=0.5, decode_speed=1.2, cache_bytes=0.75, peak_bytes=0.75),
        profiling.Comparison("student", 128, prefill_speed=4.0, decode_speed=2.0, cache_bytes=0.75, peak_bytes=None),
    ]


def test_compare_without_the_baseline_says_what_there_is():
    with pytest.raises(ValueError, match=r"'teacher'.*\['student'\]"):
        profiling.compare(result_of(point("student")))


def test_rotary_positions_are_measured_beyond_the_models_with_one_warning(checkpoints, caplog):
    settings = Profile(contexts=[16, 120], new_tokens=9, repeats=1)
    result = profiling.profile(checkpoints, settings, Reporter())
    assert {p.context for p in result.points} == {16, 120}
    (warning,) = [record.getMessage() for record in caplog.records if "beyond" in record.getMessage()]
    assert "129 positions" in warning
    assert "teacher (128), student (128)" in warning


def test_no_warning_within_the_positions(checkpoints, caplog):
    profiling.profile(checkpoints, Profile(contexts=[120], new_tokens=8, repeats=1), Reporter())
    assert "beyond" not in caplog.text


def test_learnt_positions_are_not_exceeded(tmp_path):
    sizes = {"vocab_size": 50, "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16, max_position_embeddings=32))
    hybrid.save(model, None, tmp_path / "opt", {})
    settings = Profile(contexts=[8, 30], new_tokens=3)
    with pytest.raises(ValueError, match=r"profile\.contexts: .* need 33 positions, but x has learnt 32"):
        profiling.profile([Checkpoint(uri=str(tmp_path / "opt"), label="x")], settings, Reporter())


def test_all_models_are_measured_in_the_first_ones_dtype(tmp_path, checkpoints):
    hybrid.save(small_model().bfloat16(), None, tmp_path / "half", {})
    half = Checkpoint(uri=str(tmp_path / "half"), label="half")
    result = profiling.profile([half, checkpoints[0]], Profile(contexts=[8], repeats=1), Reporter())
    assert {p.cache_bytes for p in result.points} == {8 * SIZES.layers * KV_BYTES}
    assert result.machine["dtype"] == "float32"  # a CPU computes in float32, whatever the files hold
    subjects = profiling._open([half, checkpoints[0]], torch.device("meta"))
    assert {subject.model.dtype for subject in subjects} == {torch.bfloat16}


def test_labels_must_differ(checkpoints):
    with pytest.raises(ValueError, match="label of its own"):
        profiling.profile([checkpoints[0], checkpoints[0]], Profile(), Reporter())

"""Profiling: what it times is what it says, and what it counts is true of the models."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM, PreTrainedModel

from matvlm import profiling
from matvlm.artifacts import Checkpoint, Measurement, ProfileResult
from matvlm.config import Profile
from matvlm.costs import decode_cost
from matvlm.generation.engine import ROUND
from matvlm.init import convert_
from matvlm.models import hybrid
from matvlm.models.small import SmallVLM, build_model, build_tokenizer
from matvlm.profiling import ProfileError, measuring, profile_models, stacks
from matvlm.reporting import Reporter

SIZES = SmallVLM(vision_hidden=32, vision_layers=1, vision_mlp=32, hidden=32, layers=4, mlp=64, max_positions=128)
HEAD_WIDTH = SIZES.hidden // SIZES.heads
KV_BYTES = 2 * SIZES.hidden * 4
"""Of one layer and token: keys and values in float32."""
STATE_BYTES = SIZES.heads * HEAD_WIDTH * HEAD_WIDTH * 4 + 3 * SIZES.hidden * 3 * 4
"""Of one mixer: the recurrent state, and the last 3 inputs of x, B and C to the convolution."""
STACKS = ["engine", "hf", "hf_static"]
FAR_TOO_MUCH = 2**50
"""Bytes that no machine has addresses for."""


class Recorder(Reporter):
    def __init__(self) -> None:
        self.seen: dict[tuple[str, int], float] = {}
        self.last_progress = (0, 0)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        self.seen |= {(name, step): value for name, value in values.items()}

    def progress(self, done: int, total: int) -> None:
        self.last_progress = (done, total)


def small_model(layers: tuple[int, ...] = ()) -> Any:
    model = build_model(SIZES, build_tokenizer(["what shape is in the image"]))
    if layers:
        convert_(model, layers, "aligned", seed=0)
    return model.eval()


@pytest.fixture(scope="module")
def models() -> list[tuple[str, PreTrainedModel]]:
    return [("teacher", small_model()), ("student", small_model((0, 2)))]


@pytest.fixture(scope="module")
def checkpoints(models: list[tuple[str, PreTrainedModel]], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("models")
    for label, model in models:
        hybrid.save(model, None, folder / label, {})
    return [Checkpoint(uri=str(folder / label), label=label) for label, _ in models]


def measured(result: ProfileResult, label: str, stack: str, place: tuple[int, int, int]) -> Measurement:
    (found,) = [p.measured for p in result.points if (p.label, p.stack, p.place) == (label, stack, place)]
    assert found is not None
    return found


def test_every_model_is_measured_on_every_stack_at_every_place(checkpoints: list[Checkpoint]) -> None:
    recorder = Recorder()
    settings = Profile(stacks=STACKS, prompts=[16, 96], new_tokens=[3], batch_sizes=[1, 2], repeats=2)
    result = profiling.profile(checkpoints, settings, recorder)
    assert [(p.label, p.stack, p.prompt, p.batch_size) for p in result.points] == [
        (label, stack, prompt, batch)
        for label in ("teacher", "student")
        for stack in STACKS
        for prompt in (16, 96)
        for batch in (1, 2)
    ]
    for p in result.points:
        replaced = 2 if p.label == "student" else 0
        kept, found = SIZES.layers - replaced, p.measured
        assert found is not None
        tokens = ROUND if p.stack == "engine" else p.prompt + 2  # nobody needs the last token's keys
        counters = 8 * kept if p.stack == "hf_static" else 0
        assert found.memory.kv == p.batch_size * kept * KV_BYTES * tokens + counters
        assert found.memory.state == p.batch_size * replaced * STATE_BYTES
        assert (found.memory.peak_allocated, found.memory.peak_reserved, found.memory.rest) == (None, None, None)
        for first, speed, total in zip(
            found.first_token_seconds.each,
            found.decode_tokens_per_second.each,
            found.total_seconds.each,
            strict=True,
        ):
            assert total == pytest.approx(first + 2 * p.batch_size / speed)
        assert len(found.prefill_seconds.each) == 2
        name = f"profile/{p.label}/{p.stack}" + ("" if p.batch_size == 1 else "/batch_2")
        assert recorder.seen[f"{name}/cache_bytes", p.prompt + 3] == found.memory.cache
        speed = recorder.seen[f"{name}/decode_tokens_per_second", p.prompt + 3]
        assert speed == found.decode_tokens_per_second.median
    assert recorder.last_progress == (72, 72)
    assert (result.repeats, result.baseline, result.stack) == (2, "teacher", "engine")
    assert {"cpu", "cores", "threads", "torch", "transformers", "kernels", "input", "copy"} <= result.machine.keys()
    assert result.machine["threads"] == str(torch.get_num_threads())
    assert ProfileResult.model_validate_json(result.model_dump_json()) == result


def test_the_floor_is_the_bytes_of_a_step_over_the_bandwidth(models: list[tuple[str, PreTrainedModel]]) -> None:
    settings = Profile(stacks=["hf"], prompts=[16], new_tokens=[8], batch_sizes=[1, 4], repeats=1)
    result = profile_models(models, settings, Reporter())
    for p in result.points:
        cost = decode_cost(dict(models)[p.label])
        assert p.step_bytes == cost.weights + p.batch_size * (21 * cost.per_token + 2 * cost.per_sequence)
        assert p.floor_tokens_per_second * p.step_bytes == pytest.approx(p.batch_size * result.bandwidth)
        assert p.measured is not None
        reached = p.measured.decode_tokens_per_second.median / p.floor_tokens_per_second
        assert p.share_of_floor == pytest.approx(reached)


def test_bandwidth_counts_what_is_read_and_what_is_written() -> None:
    size = 64 << 20
    source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - started)
    ours = profiling.copy_bandwidth(torch.device("cpu"), size)
    assert 0.3 < ours / (2 * size / min(seconds)) < 3


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("layers", [(), (0, 2)], ids=["teacher", "hybrid"])
def test_a_run_is_one_prompt_and_as_many_steps_as_asked_for(name: Any, layers: tuple[int, ...]) -> None:
    """Though every token would end the answer."""
    model = small_model(layers)
    ends = GenerationConfig(eos_token_id=list(range(model.config.text_config.vocab_size)), num_beams=2)
    model.generation_config = ends
    passes: list[int] = []
    model.get_decoder().layers[1].register_forward_hook(lambda _m, _a, made: passes.append(made.shape[1]))
    ids = measuring._random_ids(model, measuring._Place(prompt=20, new_tokens=6, batch_size=2))
    run = stacks.make(name, model).run(ids, new_tokens=6, end_after=6)
    prompt = [1, 19, 1] if name == "engine" else [20, 20]  # the engine's first is of another prompt, of one token
    assert passes == [*prompt, *[1] * 5]
    assert model.generation_config is ends
    passes.clear()
    short = stacks.make(name, model).run(ids, new_tokens=6, end_after=2)
    assert passes == [*prompt, 1]
    if name != "hf":
        assert short.kv_bytes == run.kv_bytes  # in a cache as large


class Slow:
    """Makes a model sleep: for a prompt, for a step, and for its first prompt of all."""

    PROMPT, STEP, ONCE = 0.25, 0.02, 0.6

    def __init__(self, model: Any) -> None:
        self.fresh = True
        model.get_decoder().layers[0].register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        time.sleep(self.PROMPT if hidden.shape[1] > 1 else self.STEP)
        if self.fresh and hidden.shape[1] > 1:
            self.fresh = False
            time.sleep(self.ONCE)


@pytest.mark.parametrize("name", STACKS)
def test_times_are_of_what_they_are_called(name: Any) -> None:
    model = small_model()
    Slow(model)
    settings = Profile(stacks=[name], prompts=[16], new_tokens=[5], repeats=1)
    (p,) = profile_models([("slow", model)], settings, Reporter()).points
    found = p.measured
    assert found is not None
    first = Slow.PROMPT + (Slow.STEP if name == "engine" else 0)
    assert Slow.PROMPT <= found.prefill_seconds.median < 3 * Slow.PROMPT
    assert first <= found.first_token_seconds.median < 3 * first
    decode = 4 / found.decode_tokens_per_second.median
    assert 4 * Slow.STEP <= decode < Slow.PROMPT
    assert found.total_seconds.median == pytest.approx(found.first_token_seconds.median + decode)
    assert Slow.ONCE / 2 < found.setup_seconds < 3 * Slow.ONCE


class Greedy:
    """Asks for more memory than there is, as a pass over ``length`` tokens begins."""

    def __init__(self, model: Any, length: int, wrapped: bool = False) -> None:
        self.length, self.wrapped = length, wrapped
        model.get_decoder().layers[0].register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: Any, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[1] != self.length:
            return
        try:
            torch.empty(FAR_TOO_MUCH, dtype=torch.uint8)
        except RuntimeError:
            if self.wrapped:
                raise RuntimeError("recording failed because of an earlier error")  # noqa: B904
            raise


@pytest.mark.parametrize("wrapped", [False, True], ids=["as it is", "wrapped"])
def test_out_of_memory_is_a_row_and_everything_else_goes_on(
    models: list[tuple[str, PreTrainedModel]], wrapped: bool, caplog: pytest.LogCaptureFixture
) -> None:
    hungry = small_model()
    Greedy(hungry, 24, wrapped)
    recorder = Recorder()
    settings = Profile(stacks=["engine", "hf"], prompts=[16, 24, 32], new_tokens=[2], repeats=1)
    result = profile_models([("hungry", hungry), models[1]], settings, recorder)
    missing = [(p.label, p.stack, p.prompt) for p in result.points if p.measured is None]
    assert missing == [("hungry", "hf", 24)]  # the engine reads 23 tokens, then one
    assert len(result.points) == 12
    assert "hungry on hf: out of memory (prompt 24, 2 new tokens, batch 1); the others go on" in caplog.text
    assert not [name for name, step in recorder.seen if step == 26 and name.startswith("profile/hungry/hf/")]
    assert recorder.last_progress == (24, 24)
    assert ProfileResult.model_validate_json(result.model_dump_json()) == result
    both = {(row.stack, row.prompt): row.decode_speed for row in profiling.compare(result)}
    assert [key for key, ratio in both.items() if ratio is None] == [("hf", 24)]


def test_other_errors_are_no_want_of_memory() -> None:
    model = small_model()

    def fail(*_: Any) -> None:
        raise RuntimeError("shapes do not fit")

    model.get_decoder().layers[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        profile_models([("x", model)], Profile(stacks=["hf"], prompts=[8], repeats=1), Reporter())


def test_a_text_only_model_is_measured_too(tmp_path: Path) -> None:
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
    settings = Profile(stacks=["hf"], prompts=[10], new_tokens=[2], repeats=1)
    (only,) = profiling.profile([Checkpoint(uri=str(tmp_path / "llama"), label="x")], settings, Reporter()).points
    assert only.measured is not None
    # 2 layers, keys and values, 2 heads of 8, 11 tokens, float32
    assert only.measured.memory.kv == 2 * 2 * (2 * 8) * 11 * 4


def test_prompts_hold_no_token_that_means_an_image_or_an_end() -> None:
    model = small_model()
    config = model.config
    place = measuring._Place(prompt=500, new_tokens=2, batch_size=4)
    ids = measuring._random_ids(model, place)
    assert ids.shape == (4, 500)
    special = {config.image_token_id, config.text_config.eos_token_id, config.text_config.pad_token_id} - {None}
    assert special
    assert not special & set(ids.flatten().tolist())
    assert len(ids.unique()) > config.text_config.vocab_size / 2
    assert torch.equal(ids, measuring._random_ids(small_model((0,)), place))


def test_subjects_take_turns_in_alternating_order() -> None:
    places = [measuring._Place(prompt, 4, 1) for prompt in (8, 16)]
    turns = list(measuring._turns(["a", "b", "c"], places, repeats=2))
    assert "".join(subject for _, _, subject in turns) == "cbacba" + "abcabc" + "cbacba"
    assert [repeat for repeat, _, _ in turns] == [0] * 6 + [1] * 6 + [2] * 6
    assert [place.prompt for _, place, subject in turns if subject == "a"] == [8, 16] * 3


def test_rotary_positions_are_measured_beyond_the_models_with_one_warning(
    models: list[tuple[str, PreTrainedModel]], caplog: pytest.LogCaptureFixture
) -> None:
    settings = Profile(stacks=["hf"], prompts=[16, 120], new_tokens=[9], repeats=1)
    result = profile_models(models, settings, Reporter())
    assert {p.prompt for p in result.points if p.measured} == {16, 120}
    (warning,) = [record.getMessage() for record in caplog.records if "beyond" in record.getMessage()]
    assert "129 positions" in warning
    assert "teacher (128), student (128)" in warning
    caplog.clear()
    profile_models(models[:1], Profile(stacks=["hf"], prompts=[120], new_tokens=[8], repeats=1), Reporter())
    assert "beyond" not in caplog.text


def test_learnt_positions_are_not_exceeded() -> None:
    sizes = {"vocab_size": 50, "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16, max_position_embeddings=32))
    settings = Profile(prompts=[8, 30], new_tokens=[3])
    with pytest.raises(ProfileError, match=r"profile\.prompts, .* need 33 positions together, but x has learnt 32"):
        profile_models([("x", model)], settings, Reporter())


def test_all_models_are_measured_in_the_first_ones_dtype(tmp_path: Path, checkpoints: list[Checkpoint]) -> None:
    hybrid.save(small_model().bfloat16(), None, tmp_path / "half", {})
    half = Checkpoint(uri=str(tmp_path / "half"), label="half")
    settings = Profile(stacks=["hf"], prompts=[8], new_tokens=[2], repeats=1)
    result = profiling.profile([half, checkpoints[0]], settings, Reporter())
    assert {p.measured.memory.kv for p in result.points if p.measured} == {9 * SIZES.layers * KV_BYTES}
    assert result.machine["dtype"] == "float32"  # a CPU computes in float32, whatever the files hold
    mixed = [("one", small_model()), ("two", small_model().bfloat16())]
    with pytest.raises(ProfileError, match=r"one device and in one dtype, got .*bfloat16.*float32"):
        profile_models(mixed, settings, Reporter())


def test_labels_must_differ(checkpoints: list[Checkpoint]) -> None:
    with pytest.raises(ProfileError, match="label of its own"):
        profiling.profile([checkpoints[0], checkpoints[0]], Profile(), Reporter())

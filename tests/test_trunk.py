"""The shared trunk is exactly the teacher when it should be, and the layer losses are what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_distill import REPLACED, Stage, batch_of, is_mixers, make_stage
from tiny_families import FAMILIES
from torch import Tensor

from matvlm.data.encoding import Batch
from matvlm.distill.trunk import SharedTrunk, StudentForced, TeacherForced
from matvlm.init import convert_
from matvlm.models import hybrid, locate
from matvlm.teacher import fingerprint, head, kept_hidden, kept_logits


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return make_stage(tmp_path_factory.mktemp("stage"))


def shaken_trunk(stage: Stage) -> tuple[SharedTrunk, Any]:
    """Student and teacher as one, what is trained moved away from where it started; and the teacher by itself."""
    student, _ = locate.load(stage.student.uri)
    teacher, _ = locate.load(stage.teacher.uri)
    trunk = SharedTrunk(student, locate.load(stage.teacher.uri)[0])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in hybrid.trained_parameters(student, train_connector=True).values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return trunk, teacher


@torch.no_grad()
def test_the_trunk_is_exactly_the_teacher_and_then_the_student_again(stage: Stage) -> None:
    trunk, teacher = shaken_trunk(stage)
    batch = batch_of(stage, [0, 2, 4])
    before, state = trunk.student(**batch.inputs).logits, dict(trunk.student.state_dict())
    with trunk.as_teacher() as model:
        assert torch.equal(model(**batch.inputs).logits, teacher(**batch.inputs).logits)
        assert fingerprint(model) == fingerprint(teacher)
    with pytest.raises(ZeroDivisionError), trunk.as_teacher():
        raise ZeroDivisionError
    assert torch.equal(trunk.student(**batch.inputs).logits, before)
    assert not torch.equal(before, teacher(**batch.inputs).logits)
    after = trunk.student.state_dict()
    assert list(after) == list(state)
    assert all(after[name] is state[name] or torch.equal(after[name], state[name]) for name in state)


def attention_calls(model: Any, batch: Batch) -> dict[int, tuple[dict[str, Any], Tensor]]:
    """By layer, what its attention was called with and what it answered."""
    seen: dict[int, tuple[dict[str, Any], Tensor]] = {}
    layers: Any = hybrid.decoder_layers(model)
    hooks = [
        layer.self_attn.register_forward_hook(
            lambda _module, _args, kwargs, output, index=index: seen.update({index: (kwargs, output[0])}),
            with_kwargs=True,
        )
        for index, layer in enumerate(layers)
    ]
    model(**batch.inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def hand_made_layer_loss(outputs: list[tuple[Tensor, Tensor]], batch: Batch) -> Tensor:
    total = torch.zeros(())
    for mine, wanted in outputs:
        for row, length in enumerate(batch.inputs["attention_mask"].sum(1).tolist()):
            total = total + ((mine[row, :length] - wanted[row, :length]) ** 2).sum() / mine.shape[-1]
    return total / len(outputs)


def test_teacher_forced_layer_loss_by_hand(stage: Stage) -> None:
    trunk, teacher = shaken_trunk(stage)
    batch = batch_of(stage, [0, 1, 2])
    found = TeacherForced(trunk, batch, "l2").value()
    with torch.no_grad():
        calls = attention_calls(teacher, batch)
        mixers = hybrid.mixers(trunk.student)
        expected = hand_made_layer_loss([(mixers[i](**calls[i][0])[0], calls[i][1]) for i in REPLACED], batch)
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-5)  # measured: 2e-7
    assert float(expected) > 0.1
    found.backward()
    names = {name for name, parameter in trunk.student.named_parameters() if parameter.grad is not None}
    assert names == {name for name, _ in trunk.student.named_parameters() if is_mixers(name)}


def test_student_forced_layer_loss_by_hand(stage: Stage) -> None:
    trunk, teacher = shaken_trunk(stage)
    batch = batch_of(stage, [0, 1, 2])
    layer_loss = StudentForced(trunk, batch.real, "l2")
    with layer_loss:
        logits = kept_logits(trunk.student, batch)
    found = layer_loss.value()
    with torch.no_grad():
        calls = attention_calls(trunk.student, batch)
        attentions: Any = [layer.self_attn for layer in hybrid.decoder_layers(teacher)]
        expected = hand_made_layer_loss([(calls[i][1], attentions[i](**calls[i][0])[0]) for i in REPLACED], batch)
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-5)  # measured: 5e-8 and less
    assert torch.equal(logits, kept_logits(trunk.student, batch)), "watching changes nothing, nor goes on"
    assert len(layer_loss.sums) == len(REPLACED)
    found.backward()
    trained = hybrid.trained_parameters(trunk.student, train_connector=True)
    assert all(parameter.grad is not None for parameter in trained.values()), "layer 0 sees what the connector makes"
    assert all(parameter.grad is None for parameter in trunk.attentions[0].parameters())


def test_cosine_layer_loss_by_hand(stage: Stage) -> None:
    trunk, teacher = shaken_trunk(stage)
    batch = batch_of(stage, [0, 1, 2])
    real = batch.inputs["attention_mask"].bool()
    with torch.no_grad():
        found = float(TeacherForced(trunk, batch, "cosine").value())
        calls, mixers = attention_calls(teacher, batch), hybrid.mixers(trunk.student)
        expected = 0.0
        for index in REPLACED:
            mine, wanted = mixers[index](**calls[index][0])[0][real], calls[index][1][real]
            expected += float((1 - (mine * wanted).sum(-1) / mine.norm(dim=-1) / wanted.norm(dim=-1)).sum())
    assert found == pytest.approx(expected / len(REPLACED), rel=1e-5)
    assert expected > 0.1


@torch.no_grad()
def test_one_pass_of_the_teacher_serves_logits_and_layers(stage: Stage) -> None:
    trunk, teacher = shaken_trunk(stage)
    batch = batch_of(stage, [0, 1, 2])
    hidden, seen = trunk.run_teacher(batch, watched=True)
    assert torch.equal(head(trunk.student, hidden), kept_logits(teacher, batch))
    expected = attention_calls(teacher, batch)
    assert seen is not None
    assert sorted(seen) == REPLACED
    for index, shown in seen.items():
        assert torch.equal(shown.hidden, expected[index][0]["hidden_states"])
        assert torch.equal(shown.output, expected[index][1])
    calls: list[int] = []
    trunk.student.base_model.register_forward_pre_hook(lambda *_args: calls.append(0))
    by_itself = TeacherForced(trunk, batch, "l2").value()
    assert len(calls) == 1
    assert torch.equal(TeacherForced(trunk, batch, "l2", seen).value(), by_itself)
    assert len(calls) == 1, "the teacher does not run again"
    assert torch.equal(trunk.run_teacher(batch, watched=False)[0], hidden)
    assert trunk.run_teacher(batch, watched=False)[1] is None


def test_the_vision_tower_runs_once_for_both(stage: Stage) -> None:
    trunk, _ = shaken_trunk(stage)
    batch, other = batch_of(stage, [0, 1]), batch_of(stage, [2, 3])
    apart = [trunk.run_teacher(batch, watched=False)[0], kept_hidden(trunk.student, batch)]
    tower: Any = trunk.tower
    calls: list[int] = []
    own = tower.forward
    tower.encoder.register_forward_pre_hook(lambda *_args: calls.append(0))
    vision = trunk.look(batch)
    assert len(calls) == 1
    with vision.shared():
        shared = [trunk.run_teacher(batch, watched=False)[0], kept_hidden(trunk.student, batch)]
        parts = torch.cat([kept_hidden(trunk.student, batch_of(stage, [row])) for row in (0, 1)])
    assert len(calls) == 1
    assert all(torch.equal(one, two) for one, two in zip(apart, shared, strict=True))
    torch.testing.assert_close(parts, shared[1], atol=1e-5, rtol=0)  # padded otherwise; measured: 5e-7
    assert shared[1].requires_grad, "the student's connector is trained"
    kept_hidden(trunk.student, batch)
    assert len(calls) == 2, "nothing is remembered"
    with trunk.look(other).shared():
        kept_hidden(trunk.student, other)
    assert len(calls) == 3, "other images are looked at"
    assert tower.forward == own


def test_a_tower_that_holds_the_connector_is_not_shared() -> None:
    teacher, student = (FAMILIES["qwen2_vl"].build() for _ in range(2))
    convert_(student, [0, 2], "paper", seed=0)
    trunk = SharedTrunk(student, teacher)
    assert trunk.connector is not None
    assert trunk.tower is None
    vision = trunk.look(Batch([], {}, torch.zeros(0)))
    with vision.shared():
        pass


def test_the_teacher_runs_no_further_than_needed(stage: Stage) -> None:
    trunk, _ = shaken_trunk(stage)
    calls: list[int] = []
    for index, layer in enumerate(hybrid.decoder_layers(trunk.student)):
        layer.register_forward_pre_hook(lambda *_args, index=index: calls.append(index))
    trunk.student.lm_head.register_forward_pre_hook(lambda *_args: calls.append(-1))
    TeacherForced(trunk, batch_of(stage, [0, 1]), "l2").value()
    assert calls == [0, 1, 2], "not the layers behind the last replaced one, and no head"
    assert sorted(hybrid.mixers(trunk.student)) == REPLACED, "stopping leaves the student in place"


@torch.no_grad()
@pytest.mark.parametrize("layer_inputs", ["teacher_forced", "student_forced"])
def test_padding_changes_no_loss(stage: Stage, layer_inputs: str) -> None:
    trunk, _ = shaken_trunk(stage)

    def loss(batch: Batch) -> float:
        if layer_inputs == "teacher_forced":
            return float(TeacherForced(trunk, batch, "l2").value())
        with StudentForced(trunk, batch.real, "l2") as layer_loss:
            trunk.student(**batch.inputs, use_cache=False)
        return float(layer_loss.value())

    together, alone = batch_of(stage, [0, 2]), [batch_of(stage, [row]) for row in (0, 2)]
    mask = together.inputs["attention_mask"]
    assert mask.sum(1).tolist() == [batch.inputs["input_ids"].shape[1] for batch in alone]
    assert len(set(mask.sum(1).tolist())) == 2, "one of the two is padded"
    # Measured: 3e-8 apart.
    assert loss(together) == pytest.approx(sum(map(loss, alone)), rel=1e-5)
    rubbish = together.inputs["input_ids"].masked_fill(mask == 0, 7)
    assert loss(Batch(together.ids, {**together.inputs, "input_ids": rubbish}, together.labels)) == loss(together)


def test_a_student_of_another_teacher_is_refused(stage: Stage, tmp_path: Path) -> None:
    student, _ = locate.load(stage.student.uri)
    other, _ = locate.load(stage.teacher.uri)
    layers: Any = hybrid.decoder_layers(other)
    with torch.no_grad():
        layers[1].mlp.fc1.bias[0] += 0.5
    with pytest.raises(ValueError, match=r"not made from this teacher: .*layers\.1\.mlp\.fc1\.bias differs"):
        SharedTrunk(student, other)
    with pytest.raises(ValueError, match="must be a hybrid of the teacher"):
        SharedTrunk(other, student)
    assert sorted(hybrid.mixers(student)) == REPLACED

"""Teacher and student in one model: they share every frozen weight, and only what was replaced exists twice.

The student is the hybrid. The teacher is the same module with its original attentions and its original connector put
back for the length of a ``with`` block; so one copy of the frozen weights serves both.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from matvlm.data.encoding import Batch
from matvlm.losses import layer_l2
from matvlm.models.hybrid import decoder_layers, find_connector, mixers
from matvlm.models.watch import watch


class SharedTrunk:
    """The hybrid ``student`` together with the ``attentions`` it replaced and the teacher's ``connector``."""

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel):
        """Take what the student lacks from ``teacher``, which is not needed afterwards.

        Raises:
            ValueError: ``student`` is not a hybrid of ``teacher``, or differs from it where nothing was replaced.
        """
        self.student = student
        layers: Any = decoder_layers(student)
        originals: Any = decoder_layers(teacher)
        if not mixers(student) or len(layers) != len(originals) or mixers(teacher):
            raise ValueError("the student must be a hybrid of the teacher: same number of layers, some replaced")
        self.attentions: dict[int, nn.Module] = {
            index: originals[index].self_attn.requires_grad_(False) for index in mixers(student)
        }
        connector = find_connector(teacher)
        self.connector = None if connector is None else copy.deepcopy(connector).requires_grad_(False)
        self._check_shared(teacher.state_dict())

    def _check_shared(self, expected: dict[str, Tensor]) -> None:
        with self.as_teacher() as whole:
            found = whole.state_dict()
        for name in sorted(found.keys() | expected.keys()):
            if name not in found or name not in expected or not torch.equal(found[name], expected[name]):
                raise ValueError(f"the student was not made from this teacher: {name} differs, which is never trained")

    def layer_loss(self, batch: Batch, layer_inputs: str) -> LayerLoss:
        """The layer loss of ``batch``, taken as ``recipe.distill.loss.layer_inputs`` says; see ``LayerLoss``."""
        return TeacherForced(self, batch) if layer_inputs == "teacher_forced" else StudentForced(self, batch)

    @contextmanager
    def as_teacher(self) -> Iterator[PreTrainedModel]:
        """The model with the teacher's weights in every place; the student's come back at the end."""
        layers: Any = decoder_layers(self.student)
        replaced = mixers(self.student)
        theirs = find_connector(self.student)
        try:
            for index, attention in self.attentions.items():
                layers[index].self_attn = attention
            _swap_connector(self.student, theirs, self.connector)
            yield self.student
        finally:
            for index, mixer in replaced.items():
                layers[index].self_attn = mixer
            _swap_connector(self.student, self.connector, theirs)


class LayerLoss:
    """``sum over replaced layers and real positions of mean_H (mixer - attention)^2``, divided by the layers.

    Use it around the student's forward pass; afterwards ``value()`` is the sum, a float32 scalar with gradient.
    """

    def __init__(self, trunk: SharedTrunk, batch: Batch):
        self.trunk, self.batch = trunk, batch
        self.mask = batch.inputs["attention_mask"].bool()

    def __enter__(self) -> LayerLoss:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def value(self) -> Tensor:
        raise NotImplementedError

    def _mean(self, sums: list[Tensor]) -> Tensor:
        return torch.stack(sums).mean()


class TeacherForced(LayerLoss):
    """The paper's: each mixer is fed the hidden state that the teacher's attention saw.

    The teacher runs once, without gradient, and stops behind its last replaced attention; it has no head.
    """

    def value(self) -> Tensor:
        with self.trunk.as_teacher() as teacher:
            seen = watch(teacher, self.trunk.attentions, self.batch.inputs)
        sums = []
        for index, shown in seen.items():
            output, _ = mixers(self.trunk.student)[index](hidden_states=shown.hidden, **shown.kwargs)
            sums.append(layer_l2(output, shown.output, self.mask))
        return self._mean(sums)


class StudentForced(LayerLoss):
    """Each mixer is compared with the original attention on the student's own hidden state: no teacher pass at all."""

    def __enter__(self) -> LayerLoss:
        self.sums: list[Tensor] = []
        self.hooks = [_watch(mixer, index, self._compare) for index, mixer in mixers(self.trunk.student).items()]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def value(self) -> Tensor:
        return self._mean(self.sums)

    def _compare(self, index: int, kwargs: dict[str, Any], output: Any) -> None:
        with torch.no_grad():
            expected = self.trunk.attentions[index](**kwargs)[0]
        self.sums.append(layer_l2(output[0], expected, self.mask))


def _watch(module: nn.Module, index: int, call: Any) -> Any:
    """Call ``call(index, keyword arguments, output)`` after each forward of ``module``."""

    def hook(_module: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
        call(index, dict(kwargs), output)

    return module.register_forward_hook(hook, with_kwargs=True)


def _swap_connector(model: PreTrainedModel, present: nn.Module | None, wanted: nn.Module | None) -> None:
    if present is None or wanted is None:
        return
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is present:
                setattr(parent, name, wanted)
                return

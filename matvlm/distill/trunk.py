"""Teacher and student in one model: they share every frozen weight, and only what was replaced exists twice.

The student is the hybrid. The teacher is the same module with its original attentions and its original connector put
back for the length of a ``with`` block; so one copy of the frozen weights serves both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from matvlm.data.encoding import Batch
from matvlm.distill.known import known
from matvlm.distill.vision import Vision
from matvlm.losses import layer_cosine, layer_l2
from matvlm.models.fusing import compile_
from matvlm.models.hybrid import decoder_layers, find_connector, mixers, vision_tower
from matvlm.models.patch import forward_as
from matvlm.models.watch import Seen, watch, watching
from matvlm.teacher import kept_hidden

DISTANCES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"l2": layer_l2, "cosine": layer_cosine}


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
        self.tower = vision_tower(student)
        self.compiled = False
        self._check_shared(teacher.state_dict())

    def _check_shared(self, expected: dict[str, Tensor]) -> None:
        with self.as_teacher() as whole:
            found = whole.state_dict()
        for name in sorted(found.keys() | expected.keys()):
            if name not in found or name not in expected or not torch.equal(found[name], expected[name]):
                raise ValueError(f"the student was not made from this teacher: {name} differs, which is never trained")

    def compile(self) -> None:
        """Let torch.compile fuse what decoder layers and layer losses do between their matrix products."""
        compile_([*mixers(self.student).values(), *decoder_layers(self.student)])
        self.compiled = True

    @torch.no_grad()
    def run_teacher(self, batch: Batch, watched: bool) -> tuple[Tensor, dict[int, Seen] | None]:
        """The whole teacher, once and without its head.

        Returns:
            Its last hidden states at the kept positions, [P, H]; and what its replaced attentions were given and gave,
            if they are ``watched``.
        """
        with self.as_teacher() as teacher, watching(self.attentions if watched else {}) as seen:
            hidden = kept_hidden(teacher, batch)
        return hidden, seen if watched else None

    def look(self, batch: Batch) -> Vision:
        """The vision tower's answers to ``batch``, for teacher and student."""
        return Vision(self.student, self.tower, batch)

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
    """The sum of ``layer_l2`` or ``layer_cosine`` over real positions, mean over replaced layers: mixer to attention.

    ``value()`` is the sum, a float32 scalar with gradient.
    """

    def __init__(self, trunk: SharedTrunk, real: Tensor, form: str):
        """``real``: bool [B, L], the positions that count; ``form``: as ``recipe.distill.loss.layer_form`` has it."""
        self.trunk, self.real = trunk, real
        self.distance = DISTANCES[form]
        if trunk.compiled:
            self.distance = torch.compile(self.distance)


class TeacherForced(LayerLoss):
    """The paper's: each mixer is fed the hidden state that the teacher's attention saw.

    Unless it has been ``seen`` already (``run_teacher``), the teacher runs once, without gradient, and stops behind its
    last replaced attention; it has no head.
    """

    def __init__(self, trunk: SharedTrunk, batch: Batch, form: str, seen: Mapping[int, Seen] | None = None):
        super().__init__(trunk, batch.real, form)
        self.inputs, self.seen = batch.inputs, seen

    def value(self) -> Tensor:
        seen = self.seen
        if seen is None:
            with self.trunk.as_teacher() as teacher:
                seen = watch(teacher, self.trunk.attentions, self.inputs)
        return torch.stack([self._of_one(index, shown) for index, shown in seen.items()]).mean()

    def _of_one(self, index: int, shown: Seen) -> Tensor:
        """One mixer's sum. Its gradient is taken at once, so that no two mixers' inner tensors are held together."""
        mixer = mixers(self.trunk.student)[index]
        output, _ = mixer(hidden_states=shown.hidden, **shown.kwargs)
        value = self.distance(output, shown.output, self.real)
        trained = [parameter for parameter in mixer.parameters() if parameter.requires_grad]
        if not value.requires_grad:
            return value
        return known(value.detach(), trained, torch.autograd.grad(value, trained))


class StudentForced(LayerLoss):
    """Each mixer is compared with the original attention on the student's own hidden state: no teacher pass at all.

    Use it around the student's forward pass.
    """

    def __enter__(self) -> StudentForced:
        self.sums: list[Tensor] = []
        self.stack = ExitStack()
        for index, mixer in mixers(self.trunk.student).items():
            self.stack.enter_context(forward_as(mixer, self._comparing(index, mixer.forward)))
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    def value(self) -> Tensor:
        return torch.stack(self.sums).mean()

    def _comparing(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        @torch.compiler.disable(recursive=False)
        def run(**kwargs: Any) -> Any:
            output = forward(**kwargs)
            with torch.no_grad():
                expected = self.trunk.attentions[index](**kwargs)[0]
            self.sums.append(self.distance(output[0], expected, self.real))
            return output

        return run


def _swap_connector(model: PreTrainedModel, present: nn.Module | None, wanted: nn.Module | None) -> None:
    if present is None or wanted is None:
        return
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is present:
                setattr(parent, name, wanted)
                return

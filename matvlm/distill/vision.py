"""The vision tower's answers, found once and given to teacher and student, for a whole batch and for its parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from matvlm.data.encoding import Batch
from matvlm.models.patch import forward_as


class Vision:
    """What ``tower`` makes of the images of ``whole``.

    Exact, as the tower is frozen and the same for teacher and student. One that has the connector inside (None), or
    whose answers are not one row an image, is left to run whenever it is called.
    """

    def __init__(self, model: PreTrainedModel, tower: nn.Module | None, whole: Batch):
        """Run ``model`` as far as its ``tower``."""
        self.tower = tower
        self.rows = self.told = 0
        self.output: Any = None
        if tower is not None:
            self._look(model, tower, whole)

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Inside, the tower answers with what is known.

        The model may be given the whole batch, any number of times, or parts of it in their order, the last repeatedly.
        """
        if self.tower is None or self.output is None:
            yield
            return
        with forward_as(self.tower, self._answer):
            yield

    def forget(self) -> None:
        """Free what is known."""
        self.output = None

    @torch.no_grad()
    def _look(self, model: PreTrainedModel, tower: nn.Module, whole: Batch) -> None:
        compute: Any = tower.forward

        def looking(*args: Any, **kwargs: Any) -> Any:
            images, output = _images(args, kwargs), compute(*args, **kwargs)
            if all(len(tensor) == len(images) for tensor in _tensors(output)):
                self.rows, self.output = len(images), output
            raise _Seen

        with forward_as(tower, looking), suppress(_Seen):
            model.base_model(**whole.inputs, use_cache=False)

    def _answer(self, *args: Any, **kwargs: Any) -> Any:
        rows = len(_images(args, kwargs))
        if rows == self.rows:
            return self.output
        first = min(self.told, self.rows - rows)
        self.told = first + rows
        return _cut(self.output, slice(first, self.told))


class _Seen(Exception):
    """The tower has run."""


def _images(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return next(value for value in [*args, *kwargs.values()] if isinstance(value, Tensor))


def _tensors(output: Any) -> Iterator[Tensor]:
    """All that are in a model's output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | tuple | list):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)


def _cut(output: Any, rows: slice) -> Any:
    """``output`` with only those ``rows`` of each tensor."""
    if isinstance(output, Tensor):
        return output[rows]
    if isinstance(output, Mapping):
        return type(output)(**{name: _cut(value, rows) for name, value in output.items()})
    if isinstance(output, tuple | list):
        return type(output)(_cut(value, rows) for value in output)
    return output

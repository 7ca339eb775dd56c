"""The file of a sweep: a base recipe, and the points of a study, which differ from it in a few fields.

``matvlm.recipes.parse_recipe(text, source, kind=Sweep)`` reads one. All that its points run with is worked out and
checked then, and what comes out holds the base recipe itself, so that it needs no other file.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, Field, ValidationError, ValidationInfo, model_validator
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from matvlm.config import Count, Recipe, Resources, Section, Tracking
from matvlm.models.layers import num_replaced
from matvlm.recipes import load_recipe

TEACHER = "teacher"
RESERVED = (TEACHER, "teacher_targets")
"""Names of other runs in MLflow."""
FREE = ("hybrid", "distill", "targets")
"""Sections of the recipe that points may differ in."""

Changes = dict[str, Any]
"""Fields by their dotted names, and their values. A mapping for a section changes what it names and nothing else."""


def _distinct(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"every seed once, got {seeds}")
    return seeds


Seeds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1), AfterValidator(_distinct)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]


class Point(Section):
    """One set of changes to the base recipe, run with each of its seeds."""

    set: Changes = Field(default={})
    seeds: Seeds | None = None
    """Null: those of the sweep."""


class Trial(NamedTuple):
    """A point with one of its seeds."""

    name: str
    seed: int
    overrides: Changes
    """What differs from the base recipe, but for the seed."""
    recipe: Recipe

    @property
    def key(self) -> str:
        """Names its files."""
        return f"{self.name}-{self.seed}"

    @property
    def label(self) -> str:
        """Names its run in MLflow."""
        return f"{self.name}[{self.seed}]"


class Sweep(Section):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    description: str = ""
    recipe: Recipe
    """The base of all points. In a file: the recipe's path, relative to this file, or the recipe itself."""
    set: Changes = Field(default={})
    """What all points have otherwise than the base; empty once it is read, as ``recipe`` has it then."""
    seeds: Seeds = Field(default=[0])
    """Of every point that has none of its own. The data are prepared with the base recipe's."""
    max_parallel: Count = 1
    """Tasks at the same time, where ``--max-workers`` does not say otherwise."""
    reference: str | None = None
    """The point whose final divergence the others are to reach."""
    keep_models: bool = True
    """If not, they go when a point is evaluated; but of the first point with so many mixers the student stays, to be
    profiled."""
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default={})
    """Field -> values. Every combination is a point, named by its values."""
    points: dict[Name, Point] = Field(default={})

    @model_validator(mode="before")
    @classmethod
    def _base_is_read(cls, given: Any, info: ValidationInfo) -> Any:
        if not isinstance(given, dict) or not isinstance(given.get("recipe"), str | dict):
            return given
        base, changes = given["recipe"], given.get("set") or {}
        where = "recipe"
        if isinstance(base, str):
            place = Path((info.context or {}).get("source", "")).parent / base
            base, where = load_recipe(place).model_dump(mode="json", exclude_unset=True), str(place)
        if not isinstance(changes, dict):
            return given
        raw = json.loads(json.dumps(base, default=str))
        try:
            _apply(raw, changes)
            raw.setdefault("hybrid", {}).pop("compare_inits", None)  # the points are what is compared
            return given | {"recipe": Recipe.model_validate(raw), "set": {}}
        except ValidationError as error:
            raise _located(f"{where}, with set" if changes else where, error.errors()) from None

    @model_validator(mode="after")
    def _every_point_is_sound(self) -> Sweep:
        if self.recipe.resources.nodes > 1:
            raise _error("recipe.resources.nodes", f"a point runs on one node, not on {self.recipe.resources.nodes}")
        names = list(dict.fromkeys(trial.name for trial in self.trials))
        if not names:
            raise _error("points", "a sweep needs points, a grid or both")
        if self.reference is not None and self.reference not in names:
            raise _error("reference", f"{self.reference!r} is no point; there are {', '.join(names)}")
        return self

    @cached_property
    def trials(self) -> list[Trial]:
        """Every point with each of its seeds: those of the grid first.

        Raises:
            ValidationError: a point cannot be run; it is named.
        """
        found: dict[str, list[Trial]] = {}
        for name, point in self._named():
            if name in found or name in RESERVED:
                what = (
                    "there are two of that name" if name in found else "that name means something else: choose another"
                )
                raise _error(f"point {name}", what)
            overrides, recipe = self._resolved(f"point {name}", point.set)
            found[name] = [
                Trial(name, seed, overrides, recipe.model_copy(update={"seed": seed}))
                for seed in point.seeds or self.seeds
            ]
        return [trial for trials in found.values() for trial in trials]

    @property
    def tracking(self) -> Tracking:
        return self.recipe.tracking

    @property
    def resources(self) -> Resources:
        return self.recipe.resources

    def trial(self, key: str) -> Trial:
        """The one whose files have this name."""
        return next(trial for trial in self.trials if trial.key == key)

    def first_of_each_size(self, num_layers: int) -> list[str]:
        """The keys of the first trial with each number of mixers, in a teacher of ``num_layers`` layers.

        Raises:
            ValueError: the layers of one cannot be chosen.
        """
        first: dict[int, str] = {}
        for trial in self.trials:
            hybrid = trial.recipe.hybrid
            first.setdefault(num_replaced(num_layers, hybrid.ratio, hybrid.layers), trial.key)
        return list(first.values())

    def _named(self) -> Iterator[tuple[str, Point]]:
        for values in itertools.product(*self.grid.values()) if self.grid else ():
            name = "-".join(word for value in values for word in _words(value))
            yield name, Point(set=dict(zip(self.grid, values, strict=True)))
        yield from self.points.items()

    def _resolved(self, where: str, changes: Changes) -> tuple[Changes, Recipe]:
        raw = self.recipe.model_dump(mode="json")
        try:
            for field in changes:
                _refuse_shared(field)
            overrides = _apply(raw, changes)
            recipe = Recipe.model_validate(raw)
            _refuse_incomparable(recipe, self.recipe)
        except ValidationError as error:
            raise _located(where, error.errors()) from None
        except ValueError as error:
            raise _error(where, str(error)) from None
        return overrides, recipe


def _apply(raw: dict[str, Any], changes: Mapping[str, Any], above: str = "") -> Changes:
    """Make ``changes`` in ``raw``; returns them with the full name of each field that was set."""
    made: Changes = {}
    for path, value in changes.items():
        *parents, leaf = str(path).split(".")
        section: Any = raw
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ValueError(f"{above}{path}: {parent!r} is not a section")
        if isinstance(value, dict) and isinstance(section.get(leaf), dict):
            made |= _apply(section[leaf], value, f"{above}{path}.")
        else:
            section[leaf] = value
            made[f"{above}{path}"] = value
    return made


def _refuse_shared(field: str) -> None:
    section = field.partition(".")[0]
    if section == "seed":
        raise ValueError("seed: give seeds, of the point or of the sweep")
    if section not in FREE:
        raise ValueError(
            f"{field}: points differ in {', '.join(FREE)} alone; what they share, as {section}, goes under set"
        )


def _refuse_incomparable(recipe: Recipe, base: Recipe) -> None:
    if recipe.distill.validation != base.distill.validation:
        raise ValueError("distill.validation: points are compared on the same samples; it goes under set")
    if recipe.hybrid.compare_inits:
        raise ValueError("hybrid.compare_inits: a point has one initialisation; make a point of each")


def _words(value: Any) -> list[str]:
    """Of a value in a grid, for the name of the point: ``[0, 4]`` -> 0, 4; ``true`` -> true."""
    return re.findall(r"[\w.]+", value if isinstance(value, str) else json.dumps(value, default=str))


def _error(where: str, message: str) -> ValidationError:
    details = InitErrorDetails(
        type=PydanticCustomError("value_error", "{message}", {"message": message}), loc=(where,), input=None
    )
    return ValidationError.from_exception_data("Sweep", [details])


def _located(where: str, errors: Iterable[ErrorDetails]) -> ValidationError:
    """The same errors, of what is at ``where``."""
    lines = []
    for error in errors:
        first, *rest = error["loc"] or ("recipe",)
        details = InitErrorDetails(
            type=error["type"], loc=(f"{where}: {first}", *rest), input=error["input"], ctx=error.get("ctx", {})
        )
        lines.append(details)
    return ValidationError.from_exception_data("Sweep", lines)

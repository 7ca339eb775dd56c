"""Reading recipes: YAML text with ``field.path=value`` overrides becomes a checked value of ``matvlm.config``.

A recipe is a YAML file under ``flows/recipes``; whatever is wrong with it comes back as one ``RecipeError``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, overload

import yaml
from pydantic import ValidationError

from matvlm.config import Recipe, Section

Kind = TypeVar("Kind", bound=Section)


class RecipeError(ValueError):
    """A recipe that cannot be run: the message names the file, each wrong field and what is expected there."""


@overload
def parse_recipe(text: str, source: str = ..., overrides: Iterable[str] = ...) -> Recipe: ...
@overload
def parse_recipe(text: str, source: str = ..., overrides: Iterable[str] = ..., *, kind: type[Kind]) -> Kind: ...
def parse_recipe(
    text: str, source: str = "recipe", overrides: Iterable[str] = (), *, kind: type[Section] = Recipe
) -> Section:
    """Parse the YAML (or JSON) ``text`` of a recipe.

    Args:
        text: the recipe file's content.
        source: the name used in error messages, normally the file's path.
        overrides: ``"distill.optimizer.lr=1e-4"`` strings, applied before checking; values are read as YAML.
        kind: the model to check against; another flow may have its own.

    Raises:
        RecipeError: not YAML, not a mapping, an unknown key, a wrong type or an impossible combination.
    """
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{source}: expected a mapping of recipe sections at the top, got {type(raw).__name__}")
    for override in overrides:
        _apply_override(raw, override, source)
    try:
        return kind.model_validate(raw, context={"source": source})
    except ValidationError as error:
        raise RecipeError(_describe(error, source)) from None


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read and check the recipe file at ``path``; see ``parse_recipe``.

    Raises:
        RecipeError: the file cannot be read, or ``parse_recipe`` refuses it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot read the recipe: {error.strerror}") from None
    return parse_recipe(text, source=str(path), overrides=overrides)


def split_overrides(text: str) -> list[str]:
    """``"a.b=1 c=[2, 3]"`` as ``["a.b=1", "c=[2, 3]"]``: a new override starts at every word followed by ``=``."""
    return re.split(r"\s+(?=[\w.]+=)", text.strip()) if text.strip() else []


def _apply_override(raw: dict[str, Any], override: str, source: str) -> None:
    name, separator, value = override.partition("=")
    if not separator or not name.strip():
        raise RecipeError(f"{source}: override {override!r} is not of the form field.path=value")
    *parents, leaf = name.strip().split(".")
    section = raw
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise RecipeError(f"{source}: override {override!r}: {parent!r} is not a section")
    try:
        section[leaf] = _yaml_value(value)
    except yaml.YAMLError:
        raise RecipeError(f"{source}: override {override!r}: the value is not valid YAML") from None


def _yaml_value(text: str) -> Any:
    """A YAML scalar or flow value; also reads ``1e-4``, which YAML 1.1 takes for a string."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    return value


def _describe(error: ValidationError, source: str) -> str:
    lines = []
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"] if not str(part).startswith("("))
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "unknown key"
        elif problem["type"] not in ("value_error", "missing"):
            message += f" (got {problem['input']!r})"
        lines.append(f"{source}: {field or 'recipe'}: {message}")
    return "\n".join(lines)

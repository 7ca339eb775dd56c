"""How transformers' Auto classes come to open hybrid models: with configs of their own, made when they are needed.

A hybrid's config.json has ``"model_type": "matvlm"``; its ``matvlm`` section names the family that was converted. So
the Auto classes open it after ``import matvlm`` and refuse it without, where they would else put attention with random
weights in the place of every mixer. In memory the config is an instance of its family's class, ``model_type`` included.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any

SECTION = "matvlm"
MODEL_TYPE = "matvlm"
TINYLLAVA = "matvlm_tinyllava"
"""TinyLLaVA as a family of matvlm's own; ``tinyllava`` is the released layout, which transformers cannot read."""
_MODULE = "transformers.models.auto.configuration_auto"


def register_with_transformers() -> None:
    """Make the Auto classes know hybrids; where transformers is not imported yet, as soon as that happens."""
    if _MODULE in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Calls ``_register`` after the import of transformers' Auto configs: importing transformers here takes seconds."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != _MODULE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: Any) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    class HybridConfig(PreTrainedConfig):
        """Stands for every hybrid until its family has been read from its ``matvlm`` section."""

        model_type = MODEL_TYPE

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> PreTrainedConfig:
            family = (config_dict.get(SECTION) or {}).get("model_type")
            if family not in CONFIG_MAPPING:
                raise ValueError(f"{SECTION}.model_type is {family!r}, which transformers does not know")
            base = _tinyllava_config() if family == TINYLLAVA else CONFIG_MAPPING[family]
            _register_models(base)
            return hybrid_config(base).from_dict(config_dict, **kwargs)

    class TinyLlavaConfig(PreTrainedConfig):
        """Stands for the real one, whose module takes seconds to import, until the first model of that family."""

        model_type = TINYLLAVA

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> PreTrainedConfig:
            config: PreTrainedConfig = _tinyllava_config().from_dict(config_dict, **kwargs)
            return config

    for stand_in in (HybridConfig, TinyLlavaConfig):
        stand_in.__module__ = __name__  # transformers takes classes without a module of their own for its own
        CONFIG_MAPPING.register(stand_in.model_type, stand_in, exist_ok=True)


def _tinyllava_config() -> Any:
    """The real config class; from now on transformers' Auto classes know it, and its model."""
    from matvlm.models.tinyllava import TinyLlavaConfig

    return TinyLlavaConfig


@cache
def hybrid_config(base: Any) -> Any:
    """The config class of hybrids of ``base``'s family: ``base``, but for what it says of itself in config.json."""

    def to_dict(self: Any) -> dict[str, Any]:
        return {**base.to_dict(self), "model_type": MODEL_TYPE}

    def from_dict(cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return super(made, cls).from_dict({**config_dict, "model_type": base.model_type}, **kwargs)

    names = {"__module__": __name__, "to_dict": to_dict, "from_dict": classmethod(from_dict)}
    made: Any = type(f"Hybrid{base.__name__}", (base,), names)
    return made


def _register_models(base: Any) -> None:
    """Tell the Auto classes which model class belongs to the hybrids of ``base``'s family."""
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    from matvlm.models.hybrid import hybrid_class

    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if base in mapping:
            mapping.register(hybrid_config(base), hybrid_class(mapping[base]))

"""The hybrid model: a transformers model of which some decoder layers hold a Mamba-2 mixer for ``self_attn``.

It stays an instance of its own class, or rather of a subclass that only differs in how it is built and loaded, with the
layers, forward and ``generate`` that class has. On disk it is an ordinary transformers folder whose config.json has one
more section, ``matvlm``: the family, the replaced layers, their initialisation, the mixers' options and where the model
came from. ``load`` opens such folders and plain ones alike; for the Auto classes see ``matvlm.models.auto``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from matvlm.models.auto import SECTION, hybrid_config
from matvlm.models.card import write_card
from matvlm.models.folder import FORMAT, ModelFolderError, check_section, weight_files
from matvlm.models.mixer import Mamba2Mixer, MixerOptions
from matvlm.storage import atomic_folder

CONNECTORS = ("multi_modal_projector", "mm_projector", "connector", "aligner", "merger")
"""What model families call the module between vision tower and decoder."""


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The text decoder's layers, for a VLM and for a text-only model."""
    layers: nn.ModuleList = model.get_decoder().layers
    return layers


def mixers(model: PreTrainedModel) -> dict[int, Mamba2Mixer]:
    """The mixers by layer number; empty for a plain model."""
    attentions = ((index, layer.self_attn) for index, layer in enumerate(decoder_layers(model)))
    return {index: attention for index, attention in attentions if isinstance(attention, Mamba2Mixer)}


def replace_(
    model: PreTrainedModel,
    layers: Iterable[int],
    make: Callable[[nn.Module, int], Mamba2Mixer],
    init: str,
    prepare: Callable[[dict[int, Mamba2Mixer]], object] = lambda _mixers: None,
) -> dict[int, nn.Module]:
    """Put ``make(attention, layer number)`` in the place of the attention of each of ``layers``, in place.

    ``init`` is the initialisation's name, for the record in ``model.config``. ``prepare`` is called with the mixers
    while the attentions are still in their places.

    Returns:
        The attentions taken out, by layer number.

    Raises:
        ValueError: the model is a hybrid already, or ``layers`` is not a proper part of its layers.
    """
    decoder: Any = decoder_layers(model)
    layers = sorted(layers)
    if mixers(model):
        raise ValueError(f"layers {sorted(mixers(model))} are Mamba-2 already: start from the original model")
    if not layers or len(set(layers)) < len(layers) or not set(layers) < set(range(len(decoder))):
        raise ValueError(f"cannot replace layers {layers} of {len(decoder)}: name some of them, not all, each once")
    made = {index: make(decoder[index].self_attn, index) for index in layers}
    prepare(made)
    originals = {index: decoder[index].self_attn for index in layers}
    for index, mixer in made.items():
        decoder[index].self_attn = mixer
    options = {str(index): asdict(mixer.options) for index, mixer in made.items()}
    section = {
        "format": FORMAT,
        "model_type": model.config.model_type,
        "layers": layers,
        "init": init,
        "mixers": options,
    }
    setattr(model.config, SECTION, section)
    config_class: Any = type(model.config)
    model_class: Any = type(model)
    model.config.__class__ = hybrid_config(config_class)
    model.__class__ = hybrid_class(model_class)
    return originals


@cache
def hybrid_class(base: Any) -> Any:
    """``base``, built with the mixers that its config lists, so that ``from_pretrained`` fills them like all else.

    Its ``from_pretrained`` is strict: a missing, unexpected or wrongly shaped tensor is a ``ModelFolderError``.
    A ``base`` that is such a class already is returned as it is.
    """
    if getattr(base, "is_hybrid", False):
        return base

    def build(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        decoder = decoder_layers(self)
        for index, values in getattr(config, SECTION)["mixers"].items():
            if int(index) >= len(decoder):
                raise RuntimeError(f"layer {index} of {SECTION}.layers does not exist in {len(decoder)} layers")
            decoder[int(index)].self_attn = Mamba2Mixer(MixerOptions(**values), int(index))

    def from_pretrained(cls: Any, name: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        model, report = _load_strictly(super(made, cls).from_pretrained, name, *args, **kwargs)
        return (model, report) if output_loading_info else model

    attributes = {
        "__init__": build,
        "__module__": base.__module__,  # transformers looks into this module to see what the class supports
        "config_class": hybrid_config(base.config_class) if base.config_class else None,
        "from_pretrained": classmethod(from_pretrained),
        "is_hybrid": True,
        "_is_stateful": True,  # generate() then refuses assisted decoding: a state cannot be rolled back
    }
    made: Any = type(base.__name__, (base,), attributes)
    return made


def trained_parameters(model: PreTrainedModel, train_connector: bool) -> dict[str, nn.Parameter]:
    """The parameters that distillation trains, by name: those of the mixers and, if asked for, of the connector.

    Their ``requires_grad`` is switched on and that of every other parameter off.

    Raises:
        ValueError: the model has no mixers, or no connector where one is to be trained.
    """
    chosen: list[nn.Module] = list(mixers(model).values())
    if not chosen:
        raise ValueError("the model has no Mamba-2 layers to train: convert it first")
    if train_connector:
        connector = find_connector(model)
        if connector is None:
            names = ", ".join(CONNECTORS)
            raise ValueError(f"{type(model).__name__} has no connector ({names}): set train_connector off")
        chosen.append(connector)
    wanted = {id(parameter) for module in chosen for parameter in module.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def find_connector(model: PreTrainedModel) -> nn.Module | None:
    """The module between vision tower and decoder, or None in a text-only model."""
    return next((part for name, part in model.named_modules() if name.rpartition(".")[2] in CONNECTORS), None)


def vision_tower(model: PreTrainedModel) -> nn.Module | None:
    """What turns images into features before the connector; None for a text model or where both are one module."""
    tower: nn.Module = model.get_encoder(modality="image")
    connector = find_connector(model)
    if tower in (model, model.base_model) or any(module is connector for module in tower.modules()):
        return None
    return tower


def save(
    model: PreTrainedModel,
    processor: Any,
    folder: str | Path,
    provenance: Mapping[str, Any],
    max_shard_size: str = "5GB",
) -> None:
    """Write model, config, processor (or tokenizer, or None) and, for a hybrid, a model card as a folder for ``load``.

    The folder is written whole or not at all. The weights keep their dtype and are split into files of at most
    ``max_shard_size``. ``provenance`` (JSON-able) says where the model came from. It goes into config.json: into the
    ``matvlm`` section of a hybrid, and for a plain model as ``matvlm_provenance``, which ``load`` does not read.

    Raises:
        StorageError: the disk is full or not writable; what was there before is still there.
    """
    with atomic_folder(folder) as unfinished:
        model.save_pretrained(unfinished, max_shard_size=max_shard_size)
        if processor is not None:
            processor.save_pretrained(unfinished)
        path = unfinished / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        if SECTION in config:
            config[SECTION]["provenance"] = dict(provenance)
            write_card(unfinished / "README.md", config[SECTION], Path(folder).name, model)
        else:
            config[f"{SECTION}_provenance"] = dict(provenance)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def load(
    folder: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, Any]:
    """Open a hybrid or a plain transformers folder.

    Args:
        folder: local folder with config.json and safetensors.
        dtype: of the weights; None keeps that of the file.
        device: where to put them.

    Returns:
        The model in evaluation mode, and its processor (VLM), tokenizer (text only) or None if the folder has neither.

    Raises:
        ModelFolderError: a file is missing or damaged, a tensor is missing, unexpected or of another shape, or the
            ``matvlm`` section does not match the tensors.
    """
    folder = Path(folder)
    config = _read_config(folder)
    base: Any = _model_class(folder, config)
    weight_files(folder)  # transformers would also read pickles, if the index names them
    section = getattr(config, SECTION, None)
    if section is not None:
        check_section(folder, section)
        base = hybrid_class(base)
    try:
        model, _ = _load_strictly(
            base.from_pretrained,
            folder,
            config=config,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
        )
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ModelFolderError(f"{folder}: cannot load the weights: {error}") from error
    return model.to(device).eval(), _load_processor(folder)


def _load_strictly(from_pretrained: Any, name: Any, *args: Any, **kwargs: Any) -> tuple[PreTrainedModel, Any]:
    """Model and loading report of ``from_pretrained(name, ...)``; raises unless every tensor had its place."""
    options = {**kwargs, "ignore_mismatched_sizes": True, "output_loading_info": True}
    model, report = from_pretrained(name, *args, **options)
    problems = [
        f"{kind} tensors {sorted(map(str, names))}"
        for kind, names in (
            ("missing", report["missing_keys"]),
            ("unexpected", report["unexpected_keys"]),
            ("wrongly shaped", report["mismatched_keys"]),
        )
        if names
    ]
    if problems:
        raise ModelFolderError(f"{name}: the weights do not fit config.json: {'; '.join(problems)}")
    return model, report


def _read_config(folder: Path) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise ModelFolderError(f"{folder}: no config.json there: not a model folder")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelFolderError(f"{folder / 'config.json'}: {error}") from error


def _model_class(folder: Path, config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that config.json's ``architectures`` names: one of transformers', or one registered with it."""
    name = (getattr(config, "architectures", None) or ["(none)"])[0]
    mappings = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
    candidates = [getattr(transformers, name, None), *(mapping.get(type(config), None) for mapping in mappings)]
    for found in candidates:
        if isinstance(found, type) and issubclass(found, PreTrainedModel) and found.__name__ == name:
            return found
    raise ModelFolderError(f"{folder / 'config.json'}: architectures: {name} is no model class of transformers")


def _load_processor(folder: Path) -> Any:
    if (folder / "processor_config.json").exists() or (folder / "preprocessor_config.json").exists():
        return AutoProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    if (folder / "tokenizer_config.json").exists():
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return None

"""The hybrid model: a transformers model of which some decoder layers hold a Mamba-2 mixer for ``self_attn``.

It stays an instance of its own class, with the layers, forward and ``generate`` that class has. On disk it is an
ordinary transformers folder whose config.json has one more section, ``matvlm``: the replaced layers, their
initialisation, the mixers' options and where the model came from. ``load`` opens such folders and plain ones alike.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from matvlm.models.mixer import Mamba2Mixer, MixerOptions
from matvlm.storage import atomic_folder

SECTION = "matvlm"
FORMAT = 1
CONNECTORS = ("multi_modal_projector", "mm_projector", "connector", "aligner", "merger")
"""What model families call the module between vision tower and decoder."""


class ModelFolderError(ValueError):
    """A model folder that cannot be used; the message names it, what is wrong there and what to do."""


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The text decoder's layers, for a VLM and for a text-only model."""
    layers: nn.ModuleList = model.get_decoder().layers
    return layers


def mixers(model: PreTrainedModel) -> dict[int, Mamba2Mixer]:
    """The mixers by layer number; empty for a plain model."""
    attentions = ((index, layer.self_attn) for index, layer in enumerate(decoder_layers(model)))
    return {index: attention for index, attention in attentions if isinstance(attention, Mamba2Mixer)}


def replace_(
    model: PreTrainedModel, layers: Iterable[int], make: Callable[[nn.Module, int], Mamba2Mixer], init: str
) -> dict[int, nn.Module]:
    """Put ``make(attention, layer number)`` in the place of the attention of each of ``layers``, in place.

    ``init`` is the initialisation's name, for the record in ``model.config``.

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
    originals = {index: decoder[index].self_attn for index in layers}
    for index, mixer in made.items():
        decoder[index].self_attn = mixer
    options = {str(index): asdict(mixer.options) for index, mixer in made.items()}
    setattr(model.config, SECTION, {"format": FORMAT, "layers": layers, "init": init, "mixers": options})
    model._is_stateful = True  # generate() then refuses assisted decoding: a state cannot be rolled back
    return originals


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


def save(model: PreTrainedModel, processor: Any, folder: str | Path, provenance: Mapping[str, Any]) -> None:
    """Write model, config and processor (or tokenizer, or None) as a folder that ``load`` opens; whole or not at all.

    ``provenance`` (JSON-able) says where the model came from. It goes into config.json: into the ``matvlm`` section of
    a hybrid, and for a plain model as ``matvlm_provenance``, which ``load`` does not read.

    Raises:
        StorageError: the disk is full or not writable; what was there before is still there.
    """
    with atomic_folder(folder) as unfinished:
        model.save_pretrained(unfinished)
        if processor is not None:
            processor.save_pretrained(unfinished)
        path = unfinished / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        if SECTION in config:
            config[SECTION]["provenance"] = dict(provenance)
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
    base = _model_class(folder, config)
    section = getattr(config, SECTION, None)
    if section is not None:
        _check_section(folder, section)
    try:
        build: Any = _with_mixers(base, section).from_pretrained
        model, report = build(
            folder,
            config=config,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ModelFolderError(f"{folder}: cannot load the weights: {error}") from error
    _check_report(folder, report)
    model.__class__ = base
    model._is_stateful = base._is_stateful or section is not None
    return model.to(device).eval(), _load_processor(folder)


def _read_config(folder: Path) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise ModelFolderError(f"{folder}: no config.json there: not a model folder")
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ModelFolderError(f"{folder / 'config.json'}: {error}") from error


def _model_class(folder: Path, config: PreTrainedConfig) -> type[PreTrainedModel]:
    names = getattr(config, "architectures", None) or ["(none)"]
    found = getattr(transformers, names[0], None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise ModelFolderError(f"{folder / 'config.json'}: architectures: {names[0]} is no model class of transformers")
    return found


def _check_section(folder: Path, section: Any) -> None:
    """Raise unless ``section`` is readable and names the layers that the tensors hold mixers for."""
    where = f"{folder / 'config.json'}: {SECTION}"
    if not isinstance(section, dict) or section.get("format") != FORMAT:
        found = section.get("format") if isinstance(section, dict) else section
        raise ModelFolderError(f"{where}.format is {found!r}, expected {FORMAT}: written by another version of matvlm")
    layers, options = section.get("layers"), section.get("mixers")
    if not isinstance(layers, list) or not isinstance(options, dict) or {str(i) for i in layers} != options.keys():
        raise ModelFolderError(f"{where}: layers and mixers must name the same layers, got {layers!r} and {options!r}")
    names = {field.name for field in fields(MixerOptions)}
    for index, values in options.items():
        if names ^ values.keys():
            odd = sorted(names ^ values.keys())
            raise ModelFolderError(f"{where}.mixers.{index}: missing or unknown options {odd}")
    found = _layers_with_mixers(folder)
    if found != sorted(layers):
        raise ModelFolderError(f"{where}.layers is {layers}, but the tensors hold mixers for the layers {found}")


def _layers_with_mixers(folder: Path) -> list[int]:
    found = set()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as tensors:
                matches = [re.search(r"layers\.(\d+)\.self_attn\.A_log$", name) for name in tensors.keys()]  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ModelFolderError(f"{path}: damaged: {error}") from error
        found |= {int(match.group(1)) for match in matches if match}
    return sorted(found)


def _with_mixers(base: type[PreTrainedModel], section: dict[str, Any] | None) -> type[PreTrainedModel]:
    """``base``, built with the mixers that ``section`` lists, so that ``from_pretrained`` fills them like all else."""
    if section is None:
        return base

    def build(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        decoder = decoder_layers(self)
        for index, values in section["mixers"].items():
            if int(index) >= len(decoder):
                raise RuntimeError(f"layer {index} of {SECTION}.layers does not exist in {len(decoder)} layers")
            decoder[int(index)].self_attn = Mamba2Mixer(MixerOptions(**values), int(index))

    return type(base.__name__, (base,), {"__init__": build, "__module__": base.__module__})


def _check_report(folder: Path, report: Mapping[str, Any]) -> None:
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
        raise ModelFolderError(f"{folder}: the weights do not fit config.json: {'; '.join(problems)}")


def _load_processor(folder: Path) -> Any:
    if (folder / "processor_config.json").exists() or (folder / "preprocessor_config.json").exists():
        return AutoProcessor.from_pretrained(folder, backend="pil")
    if (folder / "tokenizer_config.json").exists():
        return AutoTokenizer.from_pretrained(folder)
    return None

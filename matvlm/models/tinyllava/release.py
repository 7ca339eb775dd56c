"""What the JSON files of a released checkpoint say: its config, and a student's layers and mixers.

Facts of the released layout, taken from TinyLLaVA_Factory and from MaTVLM's code (arXiv 2503.13440):

- config.json has ``"model_type": "tinyllava"``, a ``text_config`` and a ``vision_config`` as transformers 4 wrote them,
  that is without the values that were its defaults, and the connector's name.
- ``"vision_feature_select_strategy": "patch"`` drops the first token of the tower's output. SigLIP has no class token,
  so a patch is lost: 728 of 729 tokens are left. LLaVA in transformers calls that ``default``.
- ``"image_aspect_ratio": "square"`` resizes images without keeping their proportions and without padding.
- A student has mamba_config.json too. Its replaced layers keep LayerNorm, MLP and Phi's parallel residual; the mixer
  stands for ``self_attn`` as a whole and sees no rotary embedding. It is ``Mamba2Mixer`` with its default options: one
  head per attention head, ``in_proj -> [z, x, B, C, dt]``, x and B with the key/value heads, SiLU after the
  convolution over (x, B, C), RMS norm (eps 1e-5) of each head after the gate, ``D`` per head, dt without limits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from matvlm.models.folder import CONFIG, RELEASED_TYPE, ModelFolderError, read_object
from matvlm.models.mixer import MixerOptions
from matvlm.models.tinyllava.model import TinyLlavaConfig

MIXERS = "mamba_config.json"
STRATEGIES = {"patch": "default", "cls_patch": "full"}
"""TinyLLaVA's names for what becomes of the vision tower's first token -> transformers' names."""
NOT_FIELDS = ("_name_or_path", "architectures", "auto_map", "torch_dtype", "transformers_version", "model_name_or_path")
"""Of the inner configs: what does not describe the model (``model_name_or_path2`` included)."""
SSM_SIZES = {"ngroups", "d_state", "d_conv"}
SSM_WITHOUT_EFFECT = {"expand", "headdim", "chunk_size"}
"""Of the mixer's settings: the released mixer ignores the first two, the third changes speed only."""


def read_config(folder: Path) -> TinyLlavaConfig:
    """The model's config. The image token is not in it yet: the released code used -200, outside of the vocabulary.

    Raises:
        ModelFolderError: config.json cannot be read, or describes a model of other parts than Phi, SigLIP and the
            two-layer connector.
    """
    return parse_config(read_object(folder / CONFIG), folder / CONFIG)


def parse_config(raw: Mapping[str, Any], path: Path | str) -> TinyLlavaConfig:
    """``read_config`` for the JSON object ``raw`` of the file ``path``, which error messages name."""
    if raw.get("model_type") != RELEASED_TYPE:
        expected = f"{RELEASED_TYPE!r}: this is no checkpoint in the layout of the released ones"
        _refuse(path, "model_type", raw.get("model_type"), expected)
    for field, value, known in (
        ("text_config.model_type", _section(raw, "text_config").get("model_type"), ["phi"]),
        ("vision_config.model_type", _section(raw, "vision_config").get("model_type"), ["siglip_vision_model"]),
        ("connector_type", raw.get("connector_type"), ["mlp2x_gelu"]),
        ("image_aspect_ratio", raw.get("image_aspect_ratio", "square"), ["square"]),
        ("vision_feature_select_strategy", raw.get("vision_feature_select_strategy"), list(STRATEGIES)),
    ):
        if value not in known:
            _refuse(path, field, value, f"one of {', '.join(known)}, which is what the released models have")
    layer = raw.get("vision_feature_layer")
    if not isinstance(layer, int):
        _refuse(path, "vision_feature_layer", layer, "a whole number")
    strategy = STRATEGIES[raw["vision_feature_select_strategy"]]
    try:
        config = TinyLlavaConfig(
            text_config=_section(raw, "text_config"),
            vision_config={**_section(raw, "vision_config"), "vision_use_head": False},
            vision_feature_layer=layer,
            vision_feature_select_strategy=strategy,
            dtype=raw.get("torch_dtype"),
        )
    except Exception as error:  # transformers checks types with a library of its own
        raise ModelFolderError(f"{path}: not a usable config: {error}") from error
    vision = config.vision_config
    config.image_seq_length = (vision.image_size // vision.patch_size) ** 2 - (strategy == "default")
    return config


def read_mixers(folder: Path, config: TinyLlavaConfig) -> dict[int, MixerOptions]:
    """The mixers of a student by layer number; none for a teacher, which has no mamba_config.json.

    Raises:
        ModelFolderError: the file cannot be read, does not fit the model, or asks for a mixer of another form.
    """
    path = folder / MIXERS
    return parse_mixers(read_object(path), path, config) if path.exists() else {}


def parse_mixers(raw: Mapping[str, Any], path: Path | str, config: TinyLlavaConfig) -> dict[int, MixerOptions]:
    """``read_mixers`` for the JSON object ``raw`` of the file ``path``, which error messages name."""
    text, ssm = config.text_config, _section(raw, "ssm_cfg")
    heads, width = text.num_attention_heads, text.hidden_size // text.num_attention_heads
    kv_heads = text.num_key_value_heads
    other = sorted(ssm.keys() - SSM_SIZES - SSM_WITHOUT_EFFECT - {"repeat_kv_before_conv"})
    if other:
        _refuse(path, f"ssm_cfg.{other[0]}", ssm[other[0]], "no such setting")
    for field, value, expected in (
        ("n_layer", raw.get("n_layer"), text.num_hidden_layers),
        ("d_model", raw.get("d_model"), text.hidden_size),
        ("d_inner", raw.get("d_inner"), heads * width),
        ("d_xb", raw.get("d_xb"), kv_heads * width),
        ("ssm_cfg.ngroups", ssm.get("ngroups"), heads),
        ("ssm_cfg.d_state", ssm.get("d_state"), width),
        ("bidirectional", raw.get("bidirectional", False), False),
        # before or after is the same where nothing is repeated
        ("ssm_cfg.repeat_kv_before_conv", ssm.get("repeat_kv_before_conv", False) and kv_heads < heads, False),
    ):
        if value != expected:
            _refuse(path, field, value, f"{expected!r}, to fit {CONFIG}")
    options = MixerOptions(
        hidden_size=text.hidden_size,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width,
        in_bias=bool(raw.get("is_bias", False)),
        out_bias=bool(raw.get("is_bias", False)),
        conv_kernel=ssm.get("d_conv", 4),
    )
    return dict.fromkeys(_replaced(path, raw.get("attn_layers"), text.num_hidden_layers), options)


def _replaced(path: Path | str, attention_layers: Any, count: int) -> list[int]:
    every = set(range(count))
    if not isinstance(attention_layers, list) or not set(attention_layers) < every or not attention_layers:
        _refuse(path, "attn_layers", attention_layers, f"some, not all, of the layers 0 to {count - 1}")
    return sorted(every - set(attention_layers))


def _section(raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = raw.get(name)
    return {k: v for k, v in section.items() if not k.startswith(NOT_FIELDS)} if isinstance(section, dict) else {}


def _refuse(path: Path | str, field: str, value: Any, expected: str) -> NoReturn:
    raise ModelFolderError(f"{path}: {field} is {value!r}, expected {expected}")

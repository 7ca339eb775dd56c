"""Writers of random checkpoints in the layouts of the paper's released models, at a size for tests.

Names, shapes and JSON fields are spelled out here, not taken from the code under test. A teacher is laid out like
TinyLLaVA-Phi-2-SigLIP-3.1B, a student like MaTVLM_0_25_Mamba2; tokenizer files are like phi-2's, with a byte-level
vocabulary. Letters of shapes: W hidden, H heads, D channels of the convolution.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import Tensor

VISION = {"hidden": 24, "heads": 2, "layers": 3, "mlp": 40, "image": 56, "patch": 14}
TEXT = {"hidden": 40, "heads": 4, "layers": 4, "mlp": 56, "rows": 288}
ROTARY_SHARE = 0.4
MAMBA_LAYERS = (0, 2)
CONV_KERNEL = 4
END = "<|endoftext|>"
MERGES = ["Ġ a", "h e", "U S", "US E", "USE R"]
SPACES = ["  ", "\t\t"]
"""Added tokens behind the vocabulary, as phi-2 has for runs of spaces and tabs."""
IMAGE_TOKEN = 256 + len(MERGES) + 1 + len(SPACES)
IMAGE_TOKENS = (VISION["image"] // VISION["patch"]) ** 2 - 1
SHARD = "model-{:05d}-of-{:05d}.safetensors"


def config_json() -> dict[str, Any]:
    """As transformers 4.40 saved it: inner configs without the values that are their defaults."""
    return {
        "architectures": ["TinyLlavaForConditionalGeneration"],
        "cache_dir": None,
        "connector_type": "mlp2x_gelu",
        "hidden_size": TEXT["hidden"],
        "ignore_index": -100,
        "image_aspect_ratio": "square",
        "image_token_index": -200,
        "llm_model_name_or_path": "microsoft/phi-2",
        "model_type": "tinyllava",
        "num_queries": 128,
        "num_resampler_layers": 3,
        "pad_token": END,
        "pad_token_id": 256 + len(MERGES),
        "resampler_hidden_size": 768,
        "text_config": {
            "_name_or_path": "microsoft/phi-2",
            "architectures": ["PhiForCausalLM"],
            "bos_token_id": 256 + len(MERGES),
            "eos_token_id": 256 + len(MERGES),
            "hidden_size": TEXT["hidden"],
            "intermediate_size": TEXT["mlp"],
            "model_type": "phi",
            "num_attention_heads": TEXT["heads"],
            "num_hidden_layers": TEXT["layers"],
            "num_key_value_heads": TEXT["heads"],
            "partial_rotary_factor": ROTARY_SHARE,
            "resid_pdrop": 0.1,
            "torch_dtype": "float16",
            "vocab_size": TEXT["rows"],
        },
        "tokenizer_model_max_length": 3072,
        "tokenizer_name_or_path": "microsoft/phi-2",
        "tokenizer_padding_side": "right",
        "tokenizer_use_fast": False,
        "torch_dtype": "float16",
        "transformers_version": "4.40.1",
        "tune_type_connector": "full",
        "tune_type_llm": "full",
        "tune_type_vision_tower": "frozen",
        "tune_vision_tower_from_layer": 0,
        "use_cache": True,
        "vision_config": {
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": VISION["hidden"],
            "image_size": VISION["image"],
            "intermediate_size": VISION["mlp"],
            "layer_norm_eps": 1e-06,
            "model_name_or_path": "google/siglip-so400m-patch14-384",
            "model_name_or_path2": "",
            "model_type": "siglip_vision_model",
            "num_attention_heads": VISION["heads"],
            "num_hidden_layers": VISION["layers"],
            "patch_size": VISION["patch"],
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "patch",
        "vision_hidden_size": VISION["hidden"],
        "vision_model_name_or_path": "google/siglip-so400m-patch14-384",
        "vision_model_name_or_path2": "",
        "vocab_size": TEXT["rows"],
    }


def mamba_json(kv_heads: int = TEXT["heads"], bias: bool = False) -> dict[str, Any]:
    width = TEXT["hidden"] // TEXT["heads"]
    return {
        "d_model": TEXT["hidden"],
        "ssm_cfg": {"expand": 1, "ngroups": TEXT["heads"], "d_state": width},
        "layer_norm_eps": 1e-05,
        "vocab_size": None,
        "d_inner": TEXT["hidden"],
        "d_xb": kv_heads * width,
        "intermediate_size": TEXT["mlp"],
        "hidden_act": "gelu_new",
        "n_layer": TEXT["layers"],
        "attn_layers": [layer for layer in range(TEXT["layers"]) if layer not in MAMBA_LAYERS],
        "resid_pdrop": 0.1,
        "bidirectional": False,
        "is_bias": bias,
    }


def tensors(
    student: bool = False, kv_heads: int = TEXT["heads"], bias: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    """Every tensor of the release, fp32, of such a size that each of them matters."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * (0.3 if len(shape) == 1 else shape[-1] ** -0.5)

    def linear(name: str, rows: int, columns: int, has_bias: bool = True) -> dict[str, Tensor]:
        found = {f"{name}.weight": random(rows, columns)}
        return {**found, f"{name}.bias": random(rows)} if has_bias else found

    def norm(name: str, size: int) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + random(size), f"{name}.bias": random(size)}

    made: dict[str, Tensor] = {}
    width, heads, mlp = TEXT["hidden"], TEXT["heads"], TEXT["mlp"]
    kv = kv_heads * width // heads
    made["language_model.model.embed_tokens.weight"] = random(TEXT["rows"], width) * 6
    for layer in range(TEXT["layers"]):
        at = f"language_model.model.layers.{layer}"
        if student and layer in MAMBA_LAYERS:
            channels = 2 * kv + width
            made |= linear(f"{at}.mamba.in_proj", width + channels + heads, width, bias)
            made[f"{at}.mamba.conv1d.weight"] = random(channels, 1, CONV_KERNEL)
            made[f"{at}.mamba.conv1d.bias"] = random(channels)
            made[f"{at}.mamba.dt_bias"] = random(heads)
            made[f"{at}.mamba.A_log"] = random(heads)
            made[f"{at}.mamba.D"] = 1 + random(heads)
            made[f"{at}.mamba.norm.weight"] = 1 + random(width)
            made |= linear(f"{at}.mamba.out_proj", width, width, bias)
        else:
            made |= linear(f"{at}.self_attn.q_proj", width, width)
            made |= linear(f"{at}.self_attn.k_proj", kv, width)
            made |= linear(f"{at}.self_attn.v_proj", kv, width)
            made |= linear(f"{at}.self_attn.dense", width, width)
        made |= linear(f"{at}.mlp.fc1", mlp, width)
        made |= linear(f"{at}.mlp.fc2", width, mlp)
        made |= norm(f"{at}.input_layernorm", width)
    made |= norm("language_model.model.final_layernorm", width)
    made |= linear("language_model.lm_head", TEXT["rows"], width)

    size, mlp, patch = VISION["hidden"], VISION["mlp"], VISION["patch"]
    tower = "vision_tower._vision_tower.vision_model"
    made[f"{tower}.embeddings.patch_embedding.weight"] = random(size, 3, patch, patch) * 0.5
    made[f"{tower}.embeddings.patch_embedding.bias"] = random(size)
    made[f"{tower}.embeddings.position_embedding.weight"] = random(IMAGE_TOKENS + 1, size)
    for layer in range(VISION["layers"]):
        at = f"{tower}.encoder.layers.{layer}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            made |= linear(f"{at}.self_attn.{projection}", size, size)
        made |= linear(f"{at}.mlp.fc1", mlp, size)
        made |= linear(f"{at}.mlp.fc2", size, mlp)
        made |= norm(f"{at}.layer_norm1", size) | norm(f"{at}.layer_norm2", size)
    made |= norm(f"{tower}.post_layernorm", size)
    head = f"{tower}.head"
    made[f"{head}.probe"] = random(1, 1, size)
    made[f"{head}.attention.in_proj_weight"] = random(3 * size, size)
    made[f"{head}.attention.in_proj_bias"] = random(3 * size)
    made |= linear(f"{head}.attention.out_proj", size, size) | norm(f"{head}.layernorm", size)
    made |= linear(f"{head}.mlp.fc1", mlp, size) | linear(f"{head}.mlp.fc2", size, mlp)

    made |= linear("connector._connector.0", width, size)
    made |= linear("connector._connector.2", width, width)
    return made


def write_release(
    folder: Path,
    weights: dict[str, Tensor],
    mamba: dict[str, Any] | None = None,
    shards: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A folder with ``weights`` in ``dtype``, config and tokenizer, and mamba_config.json for a student."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config_json()
    if mamba is not None:
        (folder / "mamba_config.json").write_text(json.dumps(mamba, indent=4))
        config["text_config"]["num_key_value_heads"] = mamba["d_xb"] // mamba["ssm_cfg"]["d_state"]
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(folder)
    weights = {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = list(weights)
    where = {name: SHARD.format(1 + index * shards // len(names), shards) for index, name in enumerate(names)}
    for file in sorted(set(where.values())):
        part = {name: weights[name] for name in names if where[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_tokenizer(folder: Path, filler: int = 0) -> None:
    """vocab.json, merges.txt and the rest of a slow tokenizer's files; ``filler`` words make the vocabulary longer."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
    words += [f"<filler{number}>" for number in range(filler)]
    vocabulary = {word: number for number, word in enumerate([*words, END])}
    added = {word: len(vocabulary) + number for number, word in enumerate(SPACES)}
    decoder = {str(vocabulary[END]): _added_token(END, special=True)}
    decoder |= {str(number): _added_token(word, special=False) for word, number in added.items()}
    files = {
        "vocab.json": vocabulary,
        "added_tokens.json": added,
        "special_tokens_map.json": dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END),
        "tokenizer_config.json": {
            "add_prefix_space": False,
            "added_tokens_decoder": decoder,
            **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END),
            "clean_up_tokenization_spaces": True,
            "model_max_length": 3072,
            "padding_side": "right",
            "tokenizer_class": "CodeGenTokenizer",
        },
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n", encoding="utf-8")


def _added_token(word: str, special: bool) -> dict[str, Any]:
    stripped = {"lstrip": False, "rstrip": False, "single_word": False}
    return {"content": word, "normalized": not special, "special": special, **stripped}

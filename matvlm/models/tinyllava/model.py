"""TinyLLaVA as a transformers model: LLaVA with a SigLIP tower and a Phi decoder whose head has a bias.

Importing this module makes transformers' Auto classes know it.
"""

from __future__ import annotations

from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration

from matvlm.models.auto import TINYLLAVA


class TinyLlavaConfig(LlavaConfig):
    """The config of ``TinyLlavaForConditionalGeneration``; the fields are LLaVA's."""

    model_type = TINYLLAVA


class TinyLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA, but for ``lm_head``, which has Phi's bias; inputs and outputs are LLaVA's."""

    config_class = TinyLlavaConfig

    def __init__(self, config: TinyLlavaConfig):
        super().__init__(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=True)
        self.post_init()


AutoConfig.register(TINYLLAVA, TinyLlavaConfig, exist_ok=True)
AutoModelForImageTextToText.register(TinyLlavaConfig, TinyLlavaForConditionalGeneration, exist_ok=True)

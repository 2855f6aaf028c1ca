"""Models and tokenizers from a folder, a run directory, the hub, or the package itself."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from ..config import ModelConfig

EMBEDDED = {"tiny": Path(__file__).parent.parent / "assets" / "tiny"}


def resolve(path: str) -> str:
    """Folder or hub name of a model: the embedded ones by name, a run directory by its exported final model."""
    if path in EMBEDDED:
        return str(EMBEDDED[path])
    for folder in (Path(path) / "final", Path(path)):
        if (folder / "config.json").is_file() and "model_type" in json.loads((folder / "config.json").read_text()):
            return str(folder)
    if Path(path).exists():
        raise ValueError(
            f"model.path {path} holds no model (no config.json with a model_type): give a folder that does."
        )
    return path


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises ValueError if it cannot be had, or has no chat template."""
    path = resolve(config.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as e:
        reason = str(e).strip().split("\n")[0]
        raise ValueError(
            f"No tokenizer for model.path {config.path}: give a local folder or a hub name ({reason})"
        ) from e
    if not tokenizer.chat_template:
        raise ValueError(f"The tokenizer of {config.path} has no chat template: add chat_template.jinja to its folder.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_shape(config: ModelConfig) -> PretrainedConfig:
    """The model's configuration, without its weights. Raises ValueError if it cannot be had."""
    try:
        return AutoConfig.from_pretrained(resolve(config.path), trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as e:
        reason = str(e).strip().split("\n")[0]
        raise ValueError(
            f"model.path {config.path} has no configuration that can be read: give a local folder or a hub name "
            f"({reason})"
        ) from e


def head_dim(shape: PretrainedConfig) -> int:
    """Dimension of an attention head."""
    return getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads


def load_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The causal language model in `dtype` on the CPU, from safetensors only."""
    path = resolve(config.path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, use_safetensors=True, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as e:
        reason = str(e).strip().split("\n")[0]
        raise ValueError(
            f"model.path {config.path} cannot be loaded: give a local folder or a hub name ({reason})"
        ) from e
    require_blocks_and_head(model, config)
    return model


def require_blocks_and_head(model: Any, config: ModelConfig) -> None:
    """Raise ValueError for a model whose parts have other names than Llama's."""
    if not (hasattr(model, "lm_head") and hasattr(getattr(model, "model", None), "layers")):
        raise ValueError(
            f"model.path {config.path} is of type {model.config.model_type}, whose blocks and head are not where the "
            "trainer looks: give a model of the Llama kind (Llama, Qwen2, Qwen3, Mistral, ...)."
        )

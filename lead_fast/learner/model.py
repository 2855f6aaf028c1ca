"""Load models and tokenizers from a folder, a run directory, the hub, or the package itself."""

import json
import os
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

EMBEDDED = {name: Path(__file__).parent.parent / "assets" / name for name in ("tiny", "levels")}


def resolve(path: str) -> str:
    """Find a model's folder or hub name: embedded models by name, a run directory by the model that it exported."""
    if path in EMBEDDED:
        return str(EMBEDDED[path])
    for folder in (Path(path) / "final", Path(path)):
        if (folder / "config.json").is_file() and "model_type" in json.loads((folder / "config.json").read_text()):
            return str(folder)
    if Path(path).exists():
        raise ValueError(f"model.path {path} has no config.json with a model_type: give a folder that has one.")
    return path


def load_tokenizer(config: ModelConfig, shape: PretrainedConfig | None = None) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, with a padding token.

    Args:
        config: uses path and trust_remote_code.
        shape: the model's configuration, if it has been read already.
    Raises:
        ValueError: it cannot be loaded, has no chat template or no end-of-sequence token, or has ids for which the
            model's embedding has no row.
    """
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
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer of {config.path} has no end-of-sequence token, so no response could end: set eos_token "
            "in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id is None:
        if os.environ.get("RANK", "0") == "0":
            print(
                f"The tokenizer of {config.path} has no padding token: its end-of-sequence token is used instead, and "
                "padding is masked.",
                flush=True,
            )
        tokenizer.pad_token = tokenizer.eos_token
    rows = getattr((shape or load_shape(config)).get_text_config(), "vocab_size", None)
    last = max(tokenizer.get_vocab().values())
    if rows is not None and last >= rows:
        raise ValueError(
            f"The tokenizer of {config.path} has the token {tokenizer.convert_ids_to_tokens(last)} with id {last}, but "
            f"the model's embedding has only {rows} rows: resize the embedding, or remove the added tokens."
        )
    return tokenizer


def load_shape(config: ModelConfig) -> PretrainedConfig:
    """Load the model's configuration, without its weights. Raises ValueError if it cannot be read."""
    try:
        return AutoConfig.from_pretrained(resolve(config.path), trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as e:
        reason = str(e).strip().split("\n")[0]
        raise ValueError(
            f"model.path {config.path} has no readable configuration: give a local folder or a hub name ({reason})"
        ) from e


def head_dim(shape: PretrainedConfig) -> int:
    """Dimension of an attention head's queries and keys."""
    if rope := getattr(shape, "qk_rope_head_dim", None):  # multi-head latent attention
        return rope + getattr(shape, "qk_nope_head_dim", 0)
    return getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads


def load_model(config: ModelConfig, dtype: torch.dtype = torch.float32, **more: Any) -> nn.Module:
    """Load the causal language model in `dtype` on the CPU, from safetensors only; `more` is passed to transformers.

    Raises:
        ValueError: it cannot be loaded, or its blocks and head are not where the trainer expects them.
    """
    path = resolve(config.path)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, use_safetensors=True, trust_remote_code=config.trust_remote_code, **more
        )
    except (OSError, ValueError) as e:
        reason = str(e).strip().split("\n")[0]
        raise ValueError(
            f"model.path {config.path} cannot be loaded: give a local folder or a hub name ({reason})"
        ) from e
    require_layout(model, config)
    return model


def require_layout(model: Any, config: ModelConfig) -> None:
    """Raise ValueError, naming model.path, if blocks and head are not where the trainer expects them."""
    try:
        check_layout(model)
    except LayoutError as e:
        raise ValueError(f"model.path {config.path} ({model.config.model_type}) cannot be used: {e}.") from e


class LayoutError(ValueError):
    """A model whose blocks or head are not where the trainer expects them."""


def check_layout(model: Any) -> None:
    """Raise LayoutError if blocks and head are not where the trainer expects them."""
    if not (
        hasattr(getattr(model, "model", None), "layers") and isinstance(getattr(model, "lm_head", None), nn.Linear)
    ):
        raise LayoutError(
            "its blocks or its head are not in model.layers and lm_head, where the trainer expects them; give a "
            "model of the Llama family (Llama, Qwen2, Qwen3, Mistral, ...)"
        )

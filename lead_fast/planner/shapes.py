"""Shapes of models: configurations that need no hub, and what generation reads of a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from ..config import ModelConfig
from ..learner.model import head_dim, resolve

# From the config.json in their repositories. R1's distillations have the shapes of Qwen2.5-14B and Qwen2.5-Math-7B.
QWEN_14B = {"model_type": "qwen2", "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48,
            "num_attention_heads": 40, "num_key_value_heads": 8, "vocab_size": 152064, "tie_word_embeddings": False,
            "max_position_embeddings": 131072}  # fmt: skip
QWEN_7B = QWEN_14B | {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                      "num_attention_heads": 28, "num_key_value_heads": 4}  # fmt: skip
SMOLLM2 = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
           "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
           "max_position_embeddings": 8192}  # fmt: skip
SHAPES = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": QWEN_14B,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": QWEN_7B,
    "Qwen/Qwen2.5-14B": QWEN_14B,
    "Qwen/Qwen2.5-Math-7B": QWEN_7B,
    "HuggingFaceTB/SmolLM2-135M-Instruct": SMOLLM2,
}


def shape_of(model: ModelConfig) -> PretrainedConfig:
    """The model's configuration, from a local folder, else from the table, else from the hub.

    Raises:
        ValueError: none of them has it.
    """
    path = resolve(model.path)
    if not Path(path).is_dir() and path in SHAPES:
        return AutoConfig.for_model(**SHAPES[path])
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as e:
        raise ValueError(
            f"The shape of model.path {model.path} is unknown: give a folder with its config.json, or one of "
            f"{', '.join(SHAPES)}."
        ) from e


@dataclass(frozen=True)
class ModelSize:
    """What a forward pass reads and multiplies.

    blocks, head: weights of all blocks and of the output layer. layers, attention_layers: number of blocks, and of
    those with a key-value cache. hidden, intermediate, q_width, kv_width: widths of a block. state_bytes: what a
    sequence keeps in addition to its cache, read and written with every token.
    """

    blocks: float
    head: float
    layers: int
    attention_layers: int
    hidden: int
    intermediate: int
    q_width: int
    kv_width: int
    vocabulary: int
    state_bytes: float = 0.0

    @classmethod
    def of(cls, shape: Any, parameters: float) -> "ModelSize":
        """From a configuration whose blocks all have key-value caches, and its total number of parameters."""
        table = shape.vocab_size * shape.hidden_size
        kv_heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
        blocks = parameters - table * (1 if shape.tie_word_embeddings else 2)
        layers, width = shape.num_hidden_layers, head_dim(shape)
        return cls(blocks, table, layers, layers, shape.hidden_size, shape.intermediate_size,
                   shape.num_attention_heads * width, kv_heads * width, shape.vocab_size)  # fmt: skip

    @property
    def multiplied(self) -> float:
        """Weights that every token is multiplied by: all but the embedding."""
        return self.blocks + self.head

    @property
    def cache_token_bytes(self) -> int:
        """Bytes of a token in a bf16 cache: a key and a value per layer with a cache."""
        return 2 * 2 * self.attention_layers * self.kv_width

    def attention_flops(self, tokens: float) -> float:
        """FLOPs of causal attention in one forward pass over a sequence of `tokens` tokens."""
        return 2 * self.attention_layers * self.q_width * tokens * tokens

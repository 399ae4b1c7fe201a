"""Two small Llamas of transformers' own classes, one gated by SiLU, one by ReLU. They know nothing of tokred."""

from pathlib import Path
from typing import Any

from torch import Tensor

from tokred.demo.language.data import END, VOCABULARY, corpus, windows

__all__ = ["ACTIVATIONS", "WINDOW", "build", "checkpoint", "example", "load"]

ACTIVATIONS = ("silu", "relu")
WINDOW = 256  # tokens that the models were trained to read at once
CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "initializer_range": 0.05,
    "tie_word_embeddings": True,
    "bos_token_id": END,
    "eos_token_id": END,
    "pad_token_id": END,
}


def checkpoint(activation: str = "silu") -> Path:
    return Path(__file__).with_name(f"llama_{activation}.safetensors")


def build(activation: str = "silu") -> Any:
    """The model with random weights. Raises ValueError for an activation that is not in `ACTIVATIONS`."""
    import transformers as hf

    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is one of {', '.join(ACTIVATIONS)}, not {activation!r}")
    return hf.LlamaForCausalLM(hf.LlamaConfig(**CONFIG, hidden_act=activation))


def load(activation: str = "silu", path: Path | None = None) -> Any:
    """The trained model in eval mode, float32 (the file holds float16, to stay small)."""
    from safetensors.torch import load_file

    model = build(activation)
    weights = {name: value.float() for name, value in load_file(path or checkpoint(activation)).items()}
    model.model.load_state_dict(weights)  # the head's matrix is the embedding's
    return model.eval()


def example(batch: int = 4) -> tuple[Any, tuple[()], dict[str, Tensor]]:
    """The trained model and held-out text: `tokred explain tokred.demo.language.model:example`."""
    return load(), (), {"input_ids": windows(corpus(held_out=True).tokens(), batch, WINDOW)[:, :-1]}

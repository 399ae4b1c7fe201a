"""A small LLaVA of transformers' own classes: a CLIP tower, a projector and a Llama. It knows nothing of tokred."""

from pathlib import Path
from typing import Any

from torch import Tensor

from tokred.demo.mosaic.data import BOS, EOS, IMAGE, PAD, PATCH, SIDE, WORDS, samples

__all__ = ["CHECKPOINT", "build", "example", "load"]

CHECKPOINT = Path(__file__).with_name("mosaic.safetensors")
VISION: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "projection_dim": 128,
    "num_hidden_layers": 5,  # LLaVA takes what the last but one gives, less the class token
    "num_attention_heads": 4,
    "num_channels": 1,
    "image_size": SIDE,
    "patch_size": PATCH,
}
TEXT: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.05,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}


def build() -> Any:
    """The model with random weights."""
    import transformers as hf

    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    return hf.LlavaForConditionalGeneration(config)


def load(path: Path = CHECKPOINT) -> Any:
    """The trained model in eval mode, float32 (the file holds float16, to stay small)."""
    from safetensors.torch import load_file

    model = build()
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    generation = model.generation_config
    generation.pad_token_id, generation.bos_token_id, generation.eos_token_id = PAD, BOS, EOS
    return model.eval()


def example(batch: int = 24) -> tuple[Any, tuple[()], dict[str, Tensor]]:
    """The trained model and held-out mosaics with questions: `tokred explain tokred.demo.mosaic.model:example`."""
    return load(), (), samples(-(-batch // 3)).inputs(slice(batch))

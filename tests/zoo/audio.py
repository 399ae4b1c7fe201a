"""Audio encoders."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from tests.zoo.architecture import Architecture, Inputs

SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
WAVE: dict[str, Any] = SIZES | {
    "conv_dim": (32, 32, 32),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "feat_extract_norm": "layer",
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "feat_proj_dropout": 0.0,
    "layerdrop": 0.0,
}
SAMPLES = 800  # 159, 79, 39 frames after the three convolutions


def _waves(batch: int) -> Inputs:
    return {"input_values": torch.randn(batch, SAMPLES)}


def _audio(name: str, build: Any, *tags: str, **fields: Any) -> Architecture:
    known = {"inputs": _waves, "attention": 3, "mlp": 3, "self_attention_tokens": (39,)} | fields
    return Architecture(name, build, tags=frozenset({"audio", *tags}), **known)


def _whisper_encoder() -> torch.nn.Module:
    config = hf.WhisperConfig(
        d_model=64,
        encoder_layers=3,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=64,
        num_mel_bins=20,
        max_source_positions=40,
        max_target_positions=16,
        vocab_size=99,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return hf.WhisperModel(config).get_encoder()


def _ast() -> torch.nn.Module:
    config = hf.ASTConfig(**SIZES, num_mel_bins=32, max_length=40, patch_size=8, frequency_stride=5, time_stride=5)
    return hf.ASTForAudioClassification(config)


ARCHITECTURES = (
    _audio(
        "whisper_encoder",
        _whisper_encoder,
        self_attention_tokens=(40,),
        inputs=lambda batch: {"input_features": torch.randn(batch, 20, 80)},
        why="two strided convolutions, then tokens",
    ),
    _audio(
        "wav2vec2",
        lambda: hf.Wav2Vec2Model(hf.Wav2Vec2Config(**WAVE)),
        why="a convolution over tokens gives the positions",
    ),
    _audio(
        "wav2vec2_classifier",
        lambda: hf.Wav2Vec2ForSequenceClassification(hf.Wav2Vec2Config(**WAVE, do_stable_layer_norm=True)),
        why="pre-norm, mean pooling",
    ),
    _audio("hubert", lambda: hf.HubertModel(hf.HubertConfig(**WAVE))),
    _audio(
        "wavlm",
        lambda: hf.WavLMModel(hf.WavLMConfig(**WAVE)),
        why="position bias gated by the hidden state, F.multi_head_attention_forward",
    ),
    _audio(
        "ast",
        _ast,
        "cls",
        self_attention_tokens=(37,),
        inputs=lambda batch: {"input_values": torch.randn(batch, 40, 32)},
        why="a spectrogram as a grid of overlapping patches",
    ),
)

"""Models of transformers in their eager attention: every block is recognised, and the model computes the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t

from tests.passes.rewriting import SDPA, rewritten
from tokred.passes.match_attention import SOFTMAX

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = SMALL | {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2}
EAGER = {"attn_implementation": "eager"}
LLAMA = TEXT | {"num_key_value_heads": 2, "use_cache": False}


def vit() -> torch.nn.Module:
    return t.ViTModel(t.ViTConfig(**SMALL, **EAGER, image_size=32, patch_size=8))


def bert() -> torch.nn.Module:
    return t.BertModel(t.BertConfig(**SMALL, **EAGER, vocab_size=100))


def clip_vision() -> torch.nn.Module:
    return t.CLIPVisionModel(t.CLIPVisionConfig(**SMALL, **EAGER, image_size=32, patch_size=8))


def clip_text() -> torch.nn.Module:
    return t.CLIPTextModel(t.CLIPTextConfig(**TEXT, **EAGER))


def llama() -> torch.nn.Module:
    return t.LlamaModel(t.LlamaConfig(**LLAMA, **EAGER))


def llama_sdpa() -> torch.nn.Module:
    return t.LlamaModel(t.LlamaConfig(**LLAMA, attn_implementation="sdpa"))


def gpt2() -> torch.nn.Module:
    return t.GPT2Model(
        t.GPT2Config(
            n_embd=32, n_layer=2, n_head=4, vocab_size=100, use_cache=False, bos_token_id=1, eos_token_id=2, **EAGER
        )
    )


def t5() -> torch.nn.Module:
    return t.T5EncoderModel(t.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=100, **EAGER))


def deberta() -> torch.nn.Module:
    config = t.DebertaV2Config(**SMALL, vocab_size=100, relative_attention=True, pos_att_type=["c2p", "p2c"])
    return t.DebertaV2Model(config)


def bloom() -> torch.nn.Module:
    return t.BloomModel(t.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=100, use_cache=False))


def beit() -> torch.nn.Module:
    return t.BeitModel(t.BeitConfig(**SMALL, **EAGER, image_size=32, patch_size=8, use_relative_position_bias=True))


def swin() -> torch.nn.Module:
    shape = {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
    }
    return t.SwinModel(t.SwinConfig(**shape, **EAGER))


def gemma2() -> torch.nn.Module:
    return t.Gemma2Model(t.Gemma2Config(**LLAMA, head_dim=8, **EAGER))


def text() -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 8:] = 0
    return {"input_ids": torch.arange(24).view(2, 12) % 90 + 3, "attention_mask": mask}


def image() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


def check(build: Callable[[], torch.nn.Module], inputs: dict[str, torch.Tensor]) -> Any:
    torch.manual_seed(0)
    done = rewritten(build().eval(), **inputs)
    for name, value in done.expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(done.result[name], value, rtol=1e-5, atol=1e-5)
    return done


@pytest.mark.slow
@pytest.mark.parametrize(
    "build, inputs, blocks",
    [
        (vit, image(), 2),
        (beit, image(), 2),
        (swin, image(), 4),
        (clip_vision, image(), 2),
        (clip_text, text(), 2),
        (bert, text(), 2),
        (deberta, text(), 2),
        (t5, text(), 2),
        (gpt2, text(), 2),
        pytest.param(bloom, text(), 2, marks=pytest.mark.filterwarnings("ignore:.*should not be instantiated")),
        (llama, text(), 2),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_every_block_becomes_sdpa(
    build: Callable[[], torch.nn.Module], inputs: dict[str, torch.Tensor], blocks: int
) -> None:
    done = check(build, inputs)
    assert (len(done.calls), done.softmaxes) == (blocks, 0)


@pytest.mark.slow
@pytest.mark.parametrize("build", [llama, llama_sdpa])
def test_llama_reads_each_key_head_once(build: Callable[[], torch.nn.Module]) -> None:
    done = check(build, text())
    assert [call.kwargs.get("enable_gqa") for call in done.calls] == [True, True]
    assert [call.args[1].meta["val"].shape[1] for call in done.calls] == [2, 2]


def test_a_soft_cap_is_left_alone() -> None:
    done = check(gemma2, text())
    assert (done.calls, done.softmaxes) == ([], 2)


def test_float32_softmax_in_a_float64_model_is_left_alone() -> None:
    """The model itself rounds to float32 there; SDPA in float64 would not be the same to 1e-10."""
    torch.manual_seed(0)
    done = rewritten(vit().eval().double(), pixel_values=image()["pixel_values"].double())
    targets = [node.target for node in done.after[0].graph.nodes]
    assert SDPA not in targets
    assert sum(target in SOFTMAX for target in targets) == 2

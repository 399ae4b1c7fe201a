"""Small models of every kind of MLP, and what sparse methods mean on them, in plain torch: hooks that mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.decoders.models import SIZES

__all__ = ["GATED", "MODELS", "TWO", "example", "gates", "linears", "made", "masking", "masking_blocks", "mlps"]

TWO: dict[str, Any] = SIZES | {"num_hidden_layers": 2}
ENCODER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}

MODELS: dict[str, Callable[..., Any]] = {
    "llama": lambda layers=2: hf.LlamaForCausalLM(hf.LlamaConfig(**TWO | {"num_hidden_layers": layers})),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**TWO, sliding_window=64)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**TWO, head_dim=16)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**TWO, head_dim=16, query_pre_attn_scalar=16, sliding_window=64)
    ),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**TWO)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=99, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    ),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            vocab_size=99, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=64, word_embed_proj_dim=32,
        )
    ),
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**ENCODER), add_pooling_layer=False),
}  # fmt: skip
GATED = ("llama", "mistral", "qwen3", "gemma3", "phi3")


def made(name: str, dtype: torch.dtype = torch.float64, **sizes: int) -> Any:
    """The same weights every time, large enough that activations differ."""
    torch.manual_seed(11)
    model: Any = MODELS[name](**sizes).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
            elif parameter.abs().max() == 0:
                parameter.normal_(std=0.2)  # biases start as zeros
    if hasattr(model, "generation_config"):
        model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


def example(name: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        return torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    return torch.randint(3, 98, (2, 9), generator=generator)


def gates(model: nn.Module) -> dict[str, nn.Module]:
    """Activations of gated MLPs by the name of the parameter whose output they read."""
    names = dict(model.named_parameters())
    found = {}
    for name, module in model.named_modules():
        for activation in ("act_fn", "activation_fn"):
            for gate in ("gate_proj", "gate_up_proj"):
                if hasattr(module, activation) and f"{name}.{gate}.weight" in names:
                    found[f"{name}.{gate}.weight"] = getattr(module, activation)
    return found


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of attentions and MLPs by the name of their weight."""
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and "head" not in name
    }


def mlps(model: nn.Module) -> list[tuple[Any, Any, list[Tensor]]]:
    """Each MLP's first linear, its last one, and the weights [F C] that make its neurons, the gate's first."""
    found = []
    for module in model.modules():
        parts: dict[str, Any] = dict(module.named_children())
        if "gate_up_proj" in parts:
            found.append((parts["gate_up_proj"], parts["down_proj"], list(parts["gate_up_proj"].weight.chunk(2))))
        elif "gate_proj" in parts:
            rows = [parts["gate_proj"].weight, parts["up_proj"].weight]
            found.append((parts["gate_proj"], parts["down_proj"], rows))
        elif "c_fc" in parts:
            found.append((parts["c_fc"], parts["c_proj"], [parts["c_fc"].weight.T]))
        elif "fc1" in parts:
            found.append((parts["fc1"], parts["fc2"], [parts["fc1"].weight]))
        elif "intermediate" in parts and "output" in parts:
            first, last = parts["intermediate"].dense, parts["output"].dense
            found.append((first, last, [first.weight]))
    return found


@contextmanager
def masking_blocks(model: nn.Module, method: Any, *, decoding: bool = False) -> Iterator[None]:
    """Inside, each token's MLPs compute the blocks whose centres its input points at most, as `method` makes them."""
    seen: dict[Any, Tensor] = {}

    def reads(last: Any, module: Any, args: tuple[Tensor]) -> None:
        seen[last] = args[0]

    def mask(blocks: tuple[Tensor, Tensor], module: Any, args: tuple[Tensor]) -> Any:
        (labels, centres), h, x = blocks, args[0].clone(), seen[module]
        if decoding and h.shape[-2] > 1:
            return args
        for row, token in zip(h.view(-1, h.shape[-1]), x.reshape(-1, x.shape[-1]), strict=True):
            order = (centres * token).sum(1).argsort(descending=True)
            for block in order[method.left(len(labels)) :]:
                row[labels == block] = 0
        return (h,)

    handles = []
    for first, last, rows in mlps(model):
        blocks = method.prepare(*(part.detach() for part in rows))
        handles.append(first.register_forward_pre_hook(partial(reads, last)))
        handles.append(last.register_forward_pre_hook(partial(mask, blocks)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def masking(modules: dict[str, nn.Module], mask: Callable[[str, Tensor], Tensor], *, inputs: bool) -> Iterator[None]:
    """Inside, what each module reads (or gives) goes through `mask`, together with the module's name here."""
    handles = []
    for name, module in modules.items():
        if inputs:
            hook = module.register_forward_pre_hook(lambda m, args, name=name: (mask(name, args[0]), *args[1:]))
        else:
            hook = module.register_forward_hook(lambda m, args, out, name=name: mask(name, out))
        handles.append(hook)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

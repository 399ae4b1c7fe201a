"""transformers' `generate()` behind a pruned prefill: each layer's cache knows which tokens it still holds.

transformers computes one mask for all layers and reads positions off one cache layer. A prefill that drops tokens on
its way leaves caches of different lengths. After it, each shortened layer becomes a `PrunedLayer`, which still counts
the dropped tokens, and a hook gives each attention the columns of the mask that its own cache has keys for.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import UserError
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.utils.generic import ModelOutput

from tokred.compiler.caches import Kept, collect
from tokred.compiler.requests import Turn, serving

__all__ = ["PrunedLayer", "traced_whole", "with_pruned_caches"]

log = logging.getLogger("tokred")

ENCODE = "_maybe_prepare_encoder_kwargs_for_generation"


class PrunedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A dynamic cache layer without some of the prompt's tokens.

    rows     [B K] which of the prompt's tokens the first K keys belong to
    dropped  how many of them are gone; positions go on behind all tokens, dropped ones too
    """

    rows: Tensor
    dropped: int
    is_croppable = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Of another prompt, after `reset`, nothing is gone."""
        super().lazy_initialization(key_states, value_states)
        self.rows, self.dropped = key_states.new_empty((key_states.shape[0], 0), dtype=torch.int64), 0

    def get_seq_length(self) -> int:
        length: int = super().get_seq_length() + self.dropped if self.is_initialized else 0
        return length

    def columns(self, tokens: int) -> Tensor:
        """[B M] the columns of a mask over all `tokens` that this layer will have keys for."""
        prompt = self.rows.shape[1] + self.dropped
        new = torch.arange(prompt, tokens, device=self.rows.device)
        return torch.cat([self.rows, new.expand(self.rows.shape[0], -1)], 1)

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self.rows = self.rows.index_select(0, beam_idx.to(self.rows.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.rows = self.rows.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.rows = self.rows[indices]

    def crop(self, tokens_to_remove: int) -> None:
        keys: Any = self.keys
        if abs(tokens_to_remove) > keys.shape[-2] - self.rows.shape[1]:
            raise ValueError("tokred: the prompt of a pruned cache cannot be cropped")
        super().crop(tokens_to_remove)


def with_pruned_caches(model: Any, compile_forward: Callable[[Any], Any]) -> Any:
    """A model that shares `model`'s parameters, whose forward is compiled and tells its caches what was dropped."""
    result = copy.copy(model)
    result.__dict__.pop("_compiled_call_impl", None)
    compiled = compile_forward(model.forward)
    _mask_by_cache(model)
    _capture_outputs(model)
    vision = _sees(model)

    def run(*args: Any, **kwargs: Any) -> tuple[Any, Turn]:
        turn = Turn(_request_of((*args, *kwargs.values())))
        with _tracing(vision=vision), serving(turn):
            return compiled(*args, **kwargs), turn

    @wraps(model.forward)
    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal vision
        with collect() as kept:
            try:
                output, turn = run(*args, **kwargs)
            except (GuardOnDataDependentSymNode, UserError) as error:
                if not vision:
                    raise
                vision = False  # this model decides on such numbers: better several graphs than none
                log.info("%s: traced in pieces: %s", type(model).__name__, str(error).split("\n", 1)[0])
                output, turn = run(*args, **kwargs)
        if kept or turn.begun:
            for cache in [*_caches(output)] or _caches(kwargs.get("past_key_values")):
                if kept:
                    _adopt(cache, kept)
                if turn.begun:
                    cache.tokred_request = turn.request  # type: ignore[attr-defined]
        return output

    result.forward = forward
    if vision and hasattr(model, ENCODE) and not model.config.is_encoder_decoder:
        setattr(result, ENCODE, _encode_in_prefill(getattr(model, ENCODE)))
    return result


def _request_of(inputs: Iterable[Any]) -> Any:
    """What the prompt chose that filled the cache among a call's inputs; None if that was no compiled one."""
    return next((value.tokred_request for value in inputs if hasattr(value, "tokred_request")), None)


def _encode_in_prefill(ahead: Callable[..., Any]) -> Callable[..., Any]:
    """In place of `ahead`, with which generate() encodes images in front of the prefill, op by op.

    Pixels go into the prefill's own graph, where the encoder is compiled and methods see it. Where generate() repeats
    samples, or prefills in parts, it is `ahead` that knows which image is whose.
    """

    @wraps(ahead)
    def prepare(inputs: Any, model_kwargs: dict[str, Any], name: Any, config: Any) -> dict[str, Any]:
        repeats = any((getattr(config, option, None) or 1) > 1 for option in ("num_beams", "num_return_sequences"))
        if repeats or getattr(config, "prefill_chunk_size", None):
            encoded: dict[str, Any] = ahead(inputs, model_kwargs, name, config)
            return encoded
        return model_kwargs

    return prepare


def traced_whole(model: Any, *, vision: bool | None = None) -> AbstractContextManager[Any]:
    """Inside, Dynamo makes one graph of a generating model where it would break a VLM's into several."""
    _capture_outputs(model)
    return _tracing(vision=_sees(model) if vision is None else vision)


def _tracing(*, vision: bool) -> AbstractContextManager[Any]:
    """What Dynamo is told while it traces. A VLM counts its image tokens with .item(); an epsilon that another model of
    its class has otherwise would become a run-time number."""
    flags = {"capture_scalar_outputs": vision, "capture_dynamic_output_shape_ops": vision, "specialize_float": True}
    patched: AbstractContextManager[Any] = torch._dynamo.config.patch(flags)
    return patched


def _sees(model: Any) -> bool:
    return getattr(model.config, "vision_config", None) is not None


def _capture_outputs(model: nn.Module) -> None:
    """Let transformers install its hooks for hidden states now: in the first forward its lock would break the graph."""
    try:
        from transformers.utils.output_capturing import maybe_install_capturing_hooks
    except ImportError:  # an older transformers has none
        return
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and _may_capture(type(module).forward):
            inner = [part for part in module.modules() if getattr(part, "_output_capturing_hooks_installed", False)]
            if not inner:  # else they would be installed there a second time
                maybe_install_capturing_hooks(module)


def _may_capture(forward: Any) -> bool:
    """Whether transformers would install its hooks when this forward is called."""
    while forward is not None:
        if "maybe_install_capturing_hooks" in getattr(getattr(forward, "__code__", None), "co_names", ()):
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False


def _caches(output: Any) -> Iterator[Cache]:
    """The caches in what a forward returned, BLIP-2's inside the output of its language model."""
    if isinstance(output, Cache):
        yield output
    elif isinstance(output, (tuple, ModelOutput)):
        for part in output.values() if isinstance(output, ModelOutput) else output:
            yield from _caches(part)


def _adopt(cache: Any, kept: list[Kept]) -> None:
    """Replace the layers of a transformers cache whose keys are among `kept`."""
    rows = {part.cached.data_ptr(): part for part in kept}
    for number, layer in enumerate(cache.layers):
        part = rows.get(layer.keys.data_ptr()) if isinstance(getattr(layer, "keys", None), Tensor) else None
        if part is not None and isinstance(layer, DynamicLayer):
            cache.layers[number] = _pruned_layer(layer, part)


def _pruned_layer(layer: DynamicLayer, part: Kept) -> Any:
    """The layer, counting the tokens that it has lost."""
    pruned: Any = PrunedLayer()  # type: ignore[no-untyped-call]
    pruned.dtype, pruned.device, pruned.is_initialized = layer.dtype, layer.device, True
    pruned.keys, pruned.values, pruned.is_sliding = layer.keys, layer.values, layer.is_sliding
    pruned.rows, pruned.dropped = part.rows, part.tokens - part.rows.shape[1]
    return pruned


def _mask_by_cache(model: nn.Module) -> None:
    """Let each attention of `model` see the columns of the mask that its own cache has keys for."""
    numbered = [module for module in model.modules() if hasattr(module, "layer_idx")]
    for module in numbered:
        innermost = not any(inner in numbered for inner in module.modules() if inner is not module)
        if innermost and "past_key_values" in inspect.signature(module.forward).parameters:
            if _columns_of_mask not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_columns_of_mask, with_kwargs=True)


def _columns_of_mask(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
    layers = getattr(cache, "layers", ())
    layer = layers[module.layer_idx] if module.layer_idx < len(layers) else None
    if not isinstance(mask, Tensor) or not isinstance(layer, PrunedLayer) or not layer.is_initialized:
        return None
    tokens = max(mask.shape[-1], layer.get_seq_length() + mask.shape[-2])
    if before := tokens - mask.shape[-1]:  # it was made for layers whose caches hold the last window of tokens alone
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        mask = nn.functional.pad(mask, (before, 0), value=hidden)
    columns = layer.columns(tokens)
    mask = mask.expand(columns.shape[0], -1, -1, -1)
    shape = (-1, mask.shape[1], mask.shape[2], -1)
    return args, {**kwargs, "attention_mask": mask.gather(-1, columns[:, None, None].expand(shape))}

"""Dynamo's graph -> one functional, pre-dispatch ATen graph: few spellings, differentiable, all nodes with metadata."""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch.aot_autograd import aot_export_module
from torch._guards import detect_fake_mode
from torch.fx.experimental.proxy_tensor import make_fx

from tokred.compiler.vmaps import open_vmaps
from tokred.errors import in_a_line

__all__ = [
    "STRIDED",
    "CaptureFailed",
    "autocasts",
    "capture",
    "is_parameter",
    "module_path",
    "source_line",
    "tensor_meta",
    "trace_into",
]

aten = torch.ops.aten

# Calls without a result that only assert what tracing has already established.
NOISE = {aten._assert_tensor_metadata.default}
# What tracing settles on where the strides of fake tensors allow it. The kernel that runs may give others.
STRIDED = {aten.view.default, aten._unsafe_view.default}


class CaptureFailed(Exception):
    """The graph could not be re-traced; the caller lowers the untouched one and reports the reason."""


def capture(gm: fx.GraphModule, example_inputs: list[Any]) -> fx.GraphModule:
    """Re-trace `gm` into functional ATen with the same calling convention: same inputs, same outputs, same mutations.

    The trace runs under the fake mode of Dynamo's own placeholders, so symbolic sizes keep their guards.
    Raises CaptureFailed with the reason if any part of that does not work.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    inputs = [node.meta.get("example_value", value) for node, value in zip(placeholders, example_inputs, strict=True)]
    if detect_fake_mode(inputs) is None:
        raise CaptureFailed("no tensor among the inputs")
    depth = len(torch._C._functorch.get_interpreter_stack() or ())
    try:
        exported = aot_export_module(open_vmaps(gm), inputs, trace_joint=False, pre_dispatch=True)
    except Exception as error:
        # a graph that holds the opening and closing of a vmap was left between them
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
        raise CaptureFailed(in_a_line(error)) from error
    traced, signature = cast(fx.GraphModule, exported[0]), exported[1]
    _restore_attributes(traced, gm, signature)
    _restore_mutations(traced, signature)
    for old, new in zip(placeholders, traced.graph.find_nodes(op="placeholder"), strict=True):
        new.meta["source_name"] = old.name
        if (name := _input_name(old)) is not None:
            new.meta["input_name"] = name
        new.meta["parameter"] = _dotted(old)
        new.meta["is_parameter"] = isinstance(old.meta.get("example_value"), torch.nn.Parameter) or _is_module_state(
            old
        )
        if isinstance(old.meta.get("example_value"), torch.SymInt):
            new.meta["val"] = old.meta["example_value"]
    for node in list(traced.graph.nodes):
        if node.target in NOISE:
            traced.graph.erase_node(node)
        elif node.target in STRIDED:
            node.target = aten.reshape.default
        elif node.target is aten.cat.default:
            _drop_empty_parts(node)
    traced.graph.lint()
    traced.recompile()
    return traced


def trace_into(graph: fx.Graph, function: Any, args: tuple[Any, ...]) -> Any:
    """Trace `function(*args)`, where `args` is a pytree of nodes of `graph`, and append what it does to `graph`.

    Returns the function's result with nodes in place of tensors. The nodes carry fake metadata.
    """
    flat, spec = torch.utils._pytree.tree_flatten(args)
    nodes = [value for value in flat if isinstance(value, fx.Node)]
    out_spec: Any = None

    def flat_function(*tensors: Any) -> list[Any]:
        nonlocal out_spec
        remaining = iter(tensors)
        values = [next(remaining) if isinstance(value, fx.Node) else value for value in flat]
        result, out_spec = torch.utils._pytree.tree_flatten(function(*torch.utils._pytree.tree_unflatten(values, spec)))
        return result

    fakes = [node.meta["val"] for node in nodes]
    with torch.no_grad(), enable_python_dispatcher(), detect_fake_mode(fakes) or nullcontext():
        traced = make_fx(flat_function, pre_dispatch=True)(*fakes)
    env: dict[fx.Node, fx.Node] = dict(zip(traced.graph.find_nodes(op="placeholder"), nodes, strict=True))
    result: list[Any] = []
    for node in traced.graph.nodes:
        if node.op == "output":
            result = [env[out] if isinstance(out, fx.Node) else out for out in node.args[0]]
        elif node.op == "get_attr":
            raise ValueError(
                "a method may not create constant tensors from Python data; use torch.arange or torch.full"
            )
        elif node.op != "placeholder" and node.target not in NOISE:
            env[node] = graph.node_copy(node, env.__getitem__)
    return torch.utils._pytree.tree_unflatten(result, out_spec)


def tensor_meta(node: Any) -> torch.Tensor | None:
    """The fake tensor of a node with exactly one tensor result, else None."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def autocasts(node: fx.Node) -> bool:
    """Whether the node may run under autocast: then types of products are others than its graph's metadata says."""
    meta = tensor_meta(node)
    entered = node.graph.find_nodes(op="call_function", target=torch.amp.autocast_mode._enter_autocast)
    ambient = meta is not None and torch.is_autocast_enabled(meta.device.type)
    return ambient or any(region.args[2] for region in entered)


def source_line(node: fx.Node) -> str:
    """`file.py:123` of the innermost user frame that made this node, or the node's name."""
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.splitlines() if line.strip().startswith('File "')]
    if not lines:
        return node.name
    file, line = lines[-1].split('", line ')
    return f"{file.removeprefix('File ').strip(chr(34)).rsplit('/', 1)[-1]}:{line.split(',')[0]}"


def module_path(node: fx.Node) -> str:
    """The dotted module path that made this node, as the user wrote it (`vit.layers.3.attention`)."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(path) for path, _ in stack.values()]
    return clean_path(paths[-1]) if paths else ""


def clean_path(path: str) -> str:
    """Dynamo's `L['self'].layers.slice(0, 4, None)._modules['0'].attn` -> `layers.0.attn`."""
    path = re.sub(r"^L\['\w+'\]\.?", "", path)
    path = re.sub(r"\.slice\([^)]*\)", "", path)
    path = re.sub(r"(\._modules)?\[['\"]?([^\]'\"]+)['\"]?\]", r".\2", path)
    return path.replace("._modules", "").replace("_orig_mod.", "").strip(".")


def _dotted(placeholder: fx.Node) -> str:
    """`L['self']._modules['layers']._modules['0']._parameters['weight']` -> `layers.0.weight`; "" without a source."""
    source: Any = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return ""
    text = source.name() if callable(source.name) else source.name
    text = re.sub(r"^[LG]\['\w+'\]", "", text)
    text = re.sub(r"\._(modules|parameters|buffers)(?=\[)", "", text)
    text = re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", text).replace("_orig_mod.", "")
    return text.replace("__dict__._modules.", "").strip(
        "."
    )  # of modules that find attributes in their own way, as PEFT's


def is_parameter(node: Any) -> bool:
    """A module's own parameter or buffer."""
    return isinstance(node, fx.Node) and (
        node.op == "get_attr" or (node.op == "placeholder" and bool(node.meta.get("is_parameter")))
    )


def _input_name(node: fx.Node) -> str | None:
    """What the model's forward calls an input: `L['kwargs']['input_ids']`, or `L['input_ids']`, is "input_ids"."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", None)
    text = str(name() if callable(name) else name)
    found = re.fullmatch(r"L\['(?:kwargs'\]\[')?([a-zA-Z]\w*)'\]((?:\.|\[|').*)?", text)
    return None if found is None else found[1] + (found[2] or "")


def _is_module_state(node: fx.Node) -> bool:
    """Dynamo names placeholders of parameters and buffers after their place in the module tree."""
    return "_parameters_" in node.name or "_buffers_" in node.name


def _drop_empty_parts(cat: fx.Node) -> None:
    """`cat([tensor([]), x])` is a copy of x: what appending to an empty KV cache looks like."""
    parts = cast(list[Any], cat.args[0])
    left = [part for part in parts if (meta := tensor_meta(part)) is None or not _is_empty(meta)]
    result, first = tensor_meta(cat), tensor_meta(left[0]) if left else None
    if len(left) == len(parts) or result is None or first is None or first.dtype != result.dtype:
        return
    if len(left) > 1:
        cat.args = (left, *cat.args[1:])
    else:
        cat.target, cat.args, cat.kwargs = aten.clone.default, (left[0],), {"memory_format": torch.contiguous_format}


def _is_empty(meta: torch.Tensor) -> bool:
    """[0]. A length that is data is not asked."""
    return meta.dim() == 1 and isinstance(meta.shape[0], int) and meta.shape[0] == 0


def _restore_attributes(traced: fx.GraphModule, gm: fx.GraphModule, signature: Any) -> None:
    """aot_export lifts the module's own parameters and buffers to inputs; put them back as attributes."""
    lifted = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for node in traced.graph.find_nodes(op="placeholder"):
        if node.name not in lifted:
            continue
        name = lifted[node.name]
        attribute = name.replace(".", "_")
        source: Any = gm
        for part in name.split("."):
            source = getattr(source, part)
        if isinstance(source, torch.nn.Parameter):
            traced.register_parameter(attribute, source)
        else:
            traced.register_buffer(attribute, source)
        with traced.graph.inserting_before(node):
            getter = traced.graph.get_attr(attribute)
        getter.meta.update(node.meta)
        getter.meta["parameter"] = name
        node.replace_all_uses_with(getter)
        traced.graph.erase_node(node)


def _restore_mutations(traced: fx.GraphModule, signature: Any) -> None:
    """Functionalisation returns mutated inputs as extra leading outputs; write them back in place instead."""
    if signature.input_tokens:
        raise CaptureFailed("an op with side effects (it takes an effect token)")
    mutated = {**signature.buffers_to_mutate, **signature.parameters_to_mutate, **signature.user_inputs_to_mutate}
    output = traced.graph.output_node()
    results = list(cast(tuple[Any, ...], output.args[0]))
    extra = len(results) - len(signature.user_outputs)
    if extra != len(mutated):
        raise CaptureFailed("two mutated inputs end in the same value")
    if not mutated:
        return
    places = {node.name: node for node in traced.graph.nodes} | {
        node.target: node for node in traced.graph.find_nodes(op="get_attr")
    }
    with traced.graph.inserting_before(output):
        for result in results[:extra]:
            place = places[mutated[result.name].replace(".", "_")]
            copy = traced.graph.call_function(aten.copy_.default, (place, result))
            copy.meta["val"] = place.meta.get("val")
    output.args = (tuple(results[extra:]),)

"""The short way to an op's fake result says what FakeTensorMode says, and is taken only where it may be."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree

from tokred.compiler import fake
from tokred.compiler.fake import run_fake

aten = torch.ops.aten


def real(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


ROWS = torch.zeros(2, 3, dtype=torch.int64)

CALLS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "linear": (aten.linear.default, (real(2, 5, 8), real(4, 8), real(4))),
    "layer_norm": (aten.layer_norm.default, (real(2, 5, 8), [8])),
    "gelu, bfloat16": (aten.gelu.default, (real(2, 5, dtype=torch.bfloat16),)),
    "promotion": (aten.add.Tensor, (real(2, 5, dtype=torch.bfloat16), real(2, 5))),
    "reshape": (aten.reshape.default, (real(2, 6), [3, -1])),
    "slice": (aten.slice.Tensor, (real(2, 6), 1, 0, 6, 2)),
    "gather": (aten.gather.default, (real(2, 6), 1, ROWS)),
    "scatter_add": (aten.scatter_add.default, (real(2, 6), 1, ROWS, real(2, 3))),
    "max.dim": (aten.max.dim, (real(2, 6), 1)),
    "topk": (aten.topk.default, (real(2, 6), 3, 1)),
    "split": (aten.split.Tensor, (real(2, 6), 4, 1)),
    "cat": (aten.cat.default, ([real(2, 6), real(2, 1)], 1)),
    "attention": (aten.scaled_dot_product_attention.default, (real(2, 3, 5, 4), real(2, 3, 7, 4), real(2, 3, 7, 4))),
    "a new dtype": (aten._to_copy.default, (real(2, 6),)),
}


def facts(result: Any) -> list[Any]:
    return [(tuple(t.shape), t.dtype, t.device) for t in _pytree.tree_leaves(result)]


@pytest.mark.parametrize("name", CALLS)
def test_the_short_way_gives_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    func, args = CALLS[name]
    mode = FakeTensorMode()
    fakes = _pytree.tree_map_only(Tensor, mode.from_tensor, args)
    kwargs = {"dtype": torch.float16} if func is aten._to_copy.default else {}
    short = run_fake(func, fakes, kwargs)
    monkeypatch.setattr(fake, "_is_plain", lambda *_: False)
    assert facts(short) == facts(run_fake(func, fakes, kwargs)) == facts(func(*args, **kwargs))
    assert all(t.fake_mode is mode for t in _pytree.tree_leaves(short))


def test_symbolic_sizes_stay_symbolic() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    x = mode.from_tensor(real(6, 8), symbolic_context=None)
    out = run_fake(aten.mul.Tensor, (x, 2), {})
    assert isinstance(x.shape[0], torch.SymInt)
    assert str(out.shape[0]) == str(x.shape[0])


def test_a_device_that_is_asked_for_is_given() -> None:
    x = FakeTensorMode().from_tensor(real(2, 3))
    assert run_fake(aten.new_zeros.default, (x, [4]), {"device": torch.device("meta")}).device.type == "meta"
    assert run_fake(aten.new_zeros.default, (x, [4]), {}).device.type == "cpu"


def test_a_value_is_never_made_up() -> None:
    x = FakeTensorMode().from_tensor(real(1))
    with pytest.raises(DataDependentOutputException):
        run_fake(aten._local_scalar_dense.default, (x,), {})

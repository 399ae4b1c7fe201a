"""Token maps: what a method returns for a token axis. Plain tensors, traced like everything else.

    Keep(index)             rows survive
    Merge(keep, src, into)  every dropped row is added, with a weight, to a surviving one
      Represent             the same groups, each shown by its surviving row as it is
      Mlerp                 the same means, each as long as the longest row of its group
    Soft(reduce, restore)   dense matrices

B batch, N tokens before, K tokens after, R = N - K tokens that disappear. Protected tokens keep their rows: the first
`head` rows map to the first `head` rows, the last `tail` to the last, which is what lets `window` cut a map.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree

__all__ = ["Keep", "Merge", "Mlerp", "Represent", "Soft", "TokenMap", "cut_weight", "joined", "partition", "rows"]


@dataclass(frozen=True)
class TokenMap:
    """From N rows to K rows, and back.

    `size` [B K] says how many original tokens each row stands for, where the method tracks that; `prop_attn` says that
    attention over these rows adds log(size) to its scores.
    """

    def reduce(self, x: Tensor) -> Tensor:
        """[B N C] -> [B K C], as the method combines features."""
        raise NotImplementedError

    def pick(self, x: Tensor) -> Tensor:
        """[B N C] -> [B K C], one representative row each: for rotary tables and everything else that is multiplied."""
        raise NotImplementedError

    def any(self, x: Tensor) -> Tensor:
        """[B N C] -> [B K C] for booleans: true where any member is (a key is visible if one of its members is)."""
        raise NotImplementedError

    def pull(self, weight: Tensor) -> Tensor:
        """[B N] -> [B K]: weights w' with sum_j w'_j y_j = sum_i w_i restore(y)_i."""
        raise NotImplementedError

    def ones(self, length: Any) -> Tensor:
        """[B length] ones, on the map's device."""
        first: Tensor = getattr(self, fields(self)[0].name)
        return torch.ones((first.shape[0], length), device=first.device)

    def restore(self, y: Tensor, stale: Tensor | None) -> Tensor:
        """[B K C] -> [B N C]. `stale` [B N C] holds the last value of rows that a Keep dropped."""
        raise NotImplementedError

    def groups(self, length: int) -> Tensor:
        """[B N]: the output row that each input row is part of, -1 where it was dropped. For pictures."""
        raise NotImplementedError

    def window(self, lo: int, hi: int, length: Any) -> TokenMap:
        """The same map on rows [lo, length - hi); negative bounds add rows that map to themselves."""
        raise NotImplementedError

    per_sample: ClassVar[bool] = True  # whether samples of a batch lose different rows
    linear: ClassVar[bool] = True  # whether `reduce` is a matrix

    @property
    def restorable(self) -> bool:
        """Whether every original row has a value after `restore` without a stale one."""
        return True

    @property
    def sizes(self) -> Tensor | None:
        return getattr(self, "size", None)


def rows(x: Tensor, index: Tensor) -> Tensor:
    """[B N C] and row numbers [B K] -> [B K C]."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def partition(chosen: Tensor, length: Any) -> tuple[Tensor, Tensor]:
    """Distinct row numbers [B R] below N = `length` -> (those rows [B R], the other rows [B N-R]), both ascending.

    What sorting would give, for one running sum: a compiled model sorts through an ATen call that copies twice.
    """
    batch, r = chosen.shape
    every = torch.arange(length, device=chosen.device).expand(batch, -1)
    is_chosen = torch.zeros_like(every).scatter(1, chosen, 1)
    so_far = is_chosen.cumsum(1)
    slot = torch.where(is_chosen > 0, so_far - 1, r + every - so_far)
    order = torch.zeros_like(every).scatter(1, slot, every)
    return order[:, :r], order[:, r:]


def joined(src: Tensor, target: Tensor, length: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Rows src [B R] join rows target [B R], which stay: keep [B N-R], src and into as `Merge` takes them.

    Kept rows are ascending; N = `length`.
    """
    keep = partition(src, length)[1]
    slots = torch.arange(keep.shape[1], device=keep.device).expand_as(keep)
    places = torch.zeros_like(keep[:, :1]).expand(-1, length).scatter(1, keep, slots)  # [B N] of the rows that stay
    return keep, src, places.gather(1, target)


def _cut_index(index: Tensor, lo: int, hi: int, length: Any) -> Tensor:
    """Row numbers [B K] of rows [0, length) -> the same for rows [lo, length - hi)."""
    kept = index[:, max(lo, 0) : index.shape[1] - max(hi, 0)] - lo
    lead = [torch.arange(-lo, device=index.device).expand(index.shape[0], -1)] if lo < 0 else []
    last = [torch.arange(-hi, device=index.device).expand(index.shape[0], -1) + (length - lo)] if hi < 0 else []
    return torch.cat([*lead, kept, *last], 1) if lead or last else kept


def cut_weight(weight: Tensor, lo: int, hi: int) -> Tensor:
    """Weights [B K] of rows [0, K) -> those of rows [lo, K - hi); rows from outside weigh 1."""
    kept = weight[:, max(lo, 0) : weight.shape[1] - max(hi, 0)]
    return torch.nn.functional.pad(kept, (max(-lo, 0), max(-hi, 0)), value=1.0) if lo < 0 or hi < 0 else kept


@dataclass(frozen=True)
class Keep(TokenMap):
    """Rows `index` [B K] survive, in that order. A dropped row keeps its last value when the tokens are restored."""

    index: Tensor
    prop_attn: bool = False

    def reduce(self, x: Tensor) -> Tensor:
        return rows(x, self.index)

    pick = any = reduce

    def pull(self, weight: Tensor) -> Tensor:
        return weight.gather(1, self.index)

    def restore(self, y: Tensor, stale: Tensor | None) -> Tensor:
        assert stale is not None, "a Keep restores over the stale rows"
        return stale.scatter(1, self.index.unsqueeze(-1).expand(-1, -1, y.shape[-1]), y.to(stale.dtype))

    def groups(self, length: int) -> Tensor:
        dropped = torch.full((self.index.shape[0], length), -1, device=self.index.device)
        slots = torch.arange(self.index.shape[1], device=self.index.device).expand_as(self.index)
        return dropped.scatter(1, self.index, slots)

    def window(self, lo: int, hi: int, length: Any) -> Keep:
        return replace(self, index=_cut_index(self.index, lo, hi, length))

    @property
    def restorable(self) -> bool:
        return False


@dataclass(frozen=True)
class Merge(TokenMap):
    """Output row j is keep_weight[j] x[keep[j]] + the sum of src_weight[i] x[src[i]] over all i with into[i] = j.

    keep [B K], src [B R] and into [B R] are row numbers, keep and src together are a permutation of the N rows;
    keep_weight [B K] and src_weight [B R]. Restoring copies an output row to every member of its group.
    """

    keep: Tensor
    src: Tensor
    into: Tensor
    keep_weight: Tensor
    src_weight: Tensor
    size: Tensor | None = None
    prop_attn: bool = False

    @staticmethod
    def mean(keep: Tensor, src: Tensor, into: Tensor, size: Tensor, *, prop_attn: bool = False) -> Merge:
        """The mean of each group, weighted by `size` [B N] (ToMe, section 3), and the sizes that result."""
        kept, gone = size.gather(1, keep), size.gather(1, src)
        total = kept.scatter_add(1, into, gone)
        divisor = total.clamp(min=1e-6)
        weight = torch.where(total > 0, kept / divisor, 1.0)  # a group made only of padding stays what it is
        return Merge(keep, src, into, weight, gone / divisor.gather(1, into), total, prop_attn)

    def then(self, after: Merge) -> Merge:
        """This merge and then `after` as one; without sizes."""
        weight = torch.cat([after.keep_weight, after.src_weight], 1)
        weight = torch.zeros_like(weight).scatter(1, torch.cat([after.keep, after.src], 1), weight)  # [B K]
        return Merge(
            self.keep.gather(1, after.keep),
            torch.cat([self.src, self.keep.gather(1, after.src)], 1),
            torch.cat([after.groups(None).gather(1, self.into), after.into], 1),
            self.keep_weight.gather(1, after.keep) * after.keep_weight,
            torch.cat(
                [
                    self.src_weight * weight.gather(1, self.into),
                    self.keep_weight.gather(1, after.src) * after.src_weight,
                ],
                1,
            ),
        )

    def reduce(self, x: Tensor) -> Tensor:
        kept = rows(x, self.keep) * self.keep_weight.unsqueeze(-1)  # half precision is summed in float32
        gone = rows(x, self.src) * self.src_weight.unsqueeze(-1)
        out = kept.scatter_add(1, self.into.unsqueeze(-1).expand(-1, -1, x.shape[-1]), gone)
        return out if out.dtype == x.dtype else out.to(x.dtype)

    def pick(self, x: Tensor) -> Tensor:
        return rows(x, self.keep)

    def any(self, x: Tensor) -> Tensor:
        kept, gone = rows(x, self.keep).float(), rows(x, self.src).float()
        return kept.scatter_add(1, self.into.unsqueeze(-1).expand(-1, -1, x.shape[-1]), gone) > 0

    def pull(self, weight: Tensor) -> Tensor:
        return weight.gather(1, self.keep).scatter_add(1, self.into, weight.gather(1, self.src))

    def groups(self, length: Any) -> Tensor:
        slots = torch.arange(self.keep.shape[1], device=self.keep.device).expand_as(self.keep)
        where = torch.cat([self.keep, self.src], 1)
        return torch.zeros_like(where).scatter(1, where, torch.cat([slots, self.into], 1))

    def restore(self, y: Tensor, stale: Tensor | None = None) -> Tensor:
        return rows(y, self.groups(None))

    def window(self, lo: int, hi: int, length: Any) -> Merge:
        return replace(
            self,
            keep=_cut_index(self.keep, lo, hi, length),
            src=self.src - lo,
            into=self.into - lo,
            keep_weight=cut_weight(self.keep_weight, lo, hi),
            size=None if self.size is None else cut_weight(self.size, lo, hi),
        )


@dataclass(frozen=True)
class Represent(Merge):
    """A Merge whose output rows are the `keep` rows as they are: pruning that can be restored by copies."""

    def reduce(self, x: Tensor) -> Tensor:
        return self.pick(x)


@dataclass(frozen=True)
class Mlerp(Merge):
    """A Merge that gives each mean the length of the longest row in its group (ToFu, arXiv 2312.01026).

    A row that nothing is merged into stays as it is.
    """

    linear = False

    def reduce(self, x: Tensor) -> Tensor:
        mean = super().reduce(x)
        wide = x if x.dtype == torch.float64 else x.float()
        length = wide.norm(dim=-1)  # [B N]
        slots = torch.arange(self.keep.shape[1], device=x.device).unsqueeze(-1)  # [K 1]
        member = self.into.unsqueeze(1) == slots  # [B K R]: compared rather than scattered, so that it fuses
        joined = length.gather(1, self.src).unsqueeze(1).where(member, 0.0).amax(-1)  # [B K]
        longest = torch.maximum(length.gather(1, self.keep), joined)
        short = mean.to(wide.dtype).norm(dim=-1).clamp(min=1e-12)  # opposite rows may cancel
        factor = torch.where(member.any(-1), longest / short, 1.0)
        return (mean * factor.unsqueeze(-1)).to(x.dtype)


@dataclass(frozen=True)
class Soft(TokenMap):
    """Dense: [B K N] to reduce, [B N K] to restore; the rows of both sum to one."""

    matrix: Tensor
    back: Tensor
    size: Tensor | None = None
    prop_attn: bool = False

    def reduce(self, x: Tensor) -> Tensor:
        return self.matrix.to(x.dtype) @ x

    def pick(self, x: Tensor) -> Tensor:
        return rows(x, self.matrix.argmax(-1))

    def any(self, x: Tensor) -> Tensor:
        return self.matrix @ x.to(self.matrix.dtype) > 0

    def pull(self, weight: Tensor) -> Tensor:
        return (weight.unsqueeze(1).to(self.back.dtype) @ self.back).squeeze(1)

    def restore(self, y: Tensor, stale: Tensor | None = None) -> Tensor:
        return self.back.to(y.dtype) @ y

    def groups(self, length: int) -> Tensor:
        return self.back.argmax(-1)

    def window(self, lo: int, hi: int, length: Any) -> Soft:
        return replace(self, matrix=_cut_matrix(self.matrix, lo, hi), back=_cut_matrix(self.back, lo, hi))


def _cut_matrix(matrix: Tensor, lo: int, hi: int) -> Tensor:
    """A matrix whose first and last rows and columns are the identity, without some of them or with more."""
    rows, columns = matrix.shape[1], matrix.shape[2]
    inner = matrix[:, max(lo, 0) : rows - max(hi, 0), max(lo, 0) : columns - max(hi, 0)]
    if lo >= 0 and hi >= 0:
        return inner
    a, b = max(-lo, 0), max(-hi, 0)
    padded = torch.nn.functional.pad(inner, (a, b, a, b))
    row = torch.arange(padded.shape[1], device=matrix.device).unsqueeze(1)
    column = torch.arange(padded.shape[2], device=matrix.device).unsqueeze(0)
    first = (row < a) & (row == column)
    last = (row >= padded.shape[1] - b) & (row - padded.shape[1] == column - padded.shape[2])
    return padded + (first | last).to(padded.dtype)


def _flatten(value: Any) -> tuple[list[Any], Any]:
    names = [field.name for field in fields(value)]
    return [getattr(value, name) for name in names], (type(value), names)


def _unflatten(values: Any, context: Any) -> Any:
    kind, names = context
    return kind(**dict(zip(names, values, strict=True)))


for _kind in (Keep, Merge, Represent, Mlerp, Soft):
    _pytree.register_pytree_node(_kind, _flatten, _unflatten, serialized_type_name=f"tokred.{_kind.__name__}")

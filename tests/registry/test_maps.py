"""Token maps against dense matrices that plain loops build, in float64."""

from dataclasses import dataclass

import pytest
import torch
from torch.utils import _pytree

from tokred.registry.maps import Keep, Merge, Mlerp, Represent, Soft, partition

B, N, C = 3, 11, 5
HEAD, TAIL = 2, 1
EXACT = {"rtol": 0, "atol": 1e-13}


@dataclass
class Dense:
    """A map and its matrices."""

    map: object
    reduce: torch.Tensor  # [B K N]
    restore: torch.Tensor  # [B N K], 0 rows where a token is gone


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def kept():
    """Rows 0, 1 and 10 are protected; four others survive."""
    inner = torch.tensor([[2, 5, 6, 9], [3, 4, 8, 9], [2, 3, 4, 5]])
    index = torch.cat([torch.tensor([[0, 1]] * B), inner, torch.full((B, 1), N - 1)], 1)
    reduce, restore = torch.zeros(B, 7, N).double(), torch.zeros(B, N, 7).double()
    for b in range(B):
        for slot, row in enumerate(index[b].tolist()):
            reduce[b, slot, row] = restore[b, row, slot] = 1
    return Dense(Keep(index), reduce, restore)


GROUPS = [  # per sample: the unprotected groups, representative first
    [[5, 2, 3], [4], [9], [6, 7], [8]],
    [[9, 3], [8, 2], [7, 4], [6], [5]],
    [[2], [3], [4], [5], [9, 6, 7, 8]],
]


def grouped():
    """keep, src, into and the members of each output row."""
    members, parts = [], []
    for groups in GROUPS:
        members.append([[0], [1], *groups, [N - 1]])
        keep = [group[0] for group in members[-1]]
        pairs = [(row, slot) for slot, group in enumerate(members[-1]) for row in group[1:]]
        parts.append((keep, [row for row, _ in pairs], [slot for _, slot in pairs]))
    return members, *(torch.tensor([part[i] for part in parts]) for i in range(3))


def merged(size=None):
    members, keep, src, into = grouped()
    size = torch.ones(B, N).double() if size is None else size
    reduce, restore = torch.zeros(B, 8, N).double(), torch.zeros(B, N, 8).double()
    for b in range(B):
        for slot, group in enumerate(members[b]):
            total = sum(size[b, row] for row in group)
            for row in group:
                reduce[b, slot, row] = size[b, row] / total
                restore[b, row, slot] = 1
    return Dense(Merge.mean(keep, src, into, size), reduce, restore)


def weighed():
    return merged(torch.arange(1, B * N + 1).view(B, N).double())


def soft():
    inner = numbers(B, 4, N - HEAD - TAIL).softmax(-1)
    back = numbers(B, N - HEAD - TAIL, 4, seed=1).softmax(-1)

    def framed(matrix):
        whole = torch.zeros(B, matrix.shape[1] + HEAD + TAIL, matrix.shape[2] + HEAD + TAIL).double()
        whole[:, HEAD:-TAIL, HEAD:-TAIL] = matrix
        for i in (0, 1, -1):
            whole[:, i, i] = 1
        return whole

    reduce, restore = framed(inner), framed(back)
    return Dense(Soft(reduce, restore), reduce, restore)


LINEAR = [kept, merged, weighed, soft]
RESTORABLE = [merged, weighed, soft]


@pytest.mark.parametrize("make", LINEAR)
def test_reduce_is_the_matrix(make):
    dense, x = make(), numbers(B, N, C)
    torch.testing.assert_close(dense.map.reduce(x), dense.reduce @ x, **EXACT)


@pytest.mark.parametrize("make", RESTORABLE)
def test_restore_is_the_matrix(make):
    dense = make()
    y = numbers(B, dense.reduce.shape[1], C)
    assert dense.map.restorable
    torch.testing.assert_close(dense.map.restore(y, None), dense.restore @ y, **EXACT)


def test_keep_restores_over_stale_rows():
    dense, stale = kept(), numbers(B, N, C)
    y = numbers(B, 7, C, seed=1)
    gone = 1 - dense.restore.sum(-1, keepdim=True)
    assert not dense.map.restorable
    torch.testing.assert_close(dense.map.restore(y, stale), dense.restore @ y + gone * stale, **EXACT)


@pytest.mark.parametrize("make", LINEAR)
def test_pull_is_the_transpose_of_restore(make):
    dense, weight = make(), numbers(B, N).abs()
    expected = (weight.unsqueeze(1) @ dense.restore).squeeze(1)
    torch.testing.assert_close(dense.map.pull(weight), expected, **EXACT)


@pytest.mark.parametrize("make", LINEAR)
def test_any_is_true_where_a_member_is(make):
    dense = make()
    seen = numbers(B, N, 2) > 0.8
    expected = (dense.reduce.unsqueeze(-1) * seen.unsqueeze(1)).sum(2) > 0
    assert torch.equal(dense.map.any(seen), expected)
    assert expected.any()
    assert not expected.all()


def test_pick_takes_the_representative():
    members, *_ = grouped()
    x = numbers(B, N, C)
    expected = torch.stack([x[b, [group[0] for group in members[b]]] for b in range(B)])
    assert torch.equal(merged().map.pick(x), expected)
    assert torch.equal(kept().map.pick(x), kept().map.reduce(x))
    dense = soft()
    heaviest = torch.stack([x[b, dense.reduce[b].argmax(-1)] for b in range(B)])
    assert torch.equal(dense.map.pick(x), heaviest)


def test_groups_name_the_output_row():
    members, *_ = grouped()
    groups = merged().map.groups(N)
    for b in range(B):
        for slot, group in enumerate(members[b]):
            assert groups[b, group].tolist() == [slot] * len(group)
    dense = kept()
    groups = dense.map.groups(N)
    assert ((groups == -1) == (dense.restore.sum(-1) == 0)).all()
    assert (groups.gather(1, dense.map.index) == torch.arange(7)).all()
    assert torch.equal(soft().map.groups(N), soft().restore.argmax(-1))


WINDOWS = [(0, 0), (1, 0), (0, 1), (HEAD, TAIL), (-1, 0), (0, -3), (-2, -1), (1, -2), (-3, 1)]


@pytest.mark.parametrize("lo, hi", WINDOWS)
@pytest.mark.parametrize("make", LINEAR)
def test_window_is_the_same_map_on_fewer_or_more_rows(make, lo, hi):
    dense = make()
    kept_rows = dense.reduce.shape[1]
    whole_in = torch.eye(N + 8).double()[:, 4 : N + 4]  # [N + 8, N]: 4 more rows on either side
    whole_out = torch.eye(kept_rows + 8).double()[:, 4 : kept_rows + 4]
    frame = torch.zeros(B, kept_rows + 8, N + 8).double() + whole_out @ dense.reduce @ whole_in.t()
    for i in range(4):
        frame[:, i, i] = frame[:, -1 - i, -1 - i] = 1
    expected = frame[:, 4 + lo : kept_rows + 4 - hi, 4 + lo : N + 4 - hi]
    x = numbers(B, N - lo - hi, C)
    part = dense.map.window(lo, hi, N)
    torch.testing.assert_close(part.reduce(x), expected @ x, **EXACT)
    y = numbers(B, expected.shape[1], C, seed=2)
    if part.restorable:
        back = torch.zeros(B, N + 8, kept_rows + 8).double() + whole_in @ dense.restore @ whole_out.t()
        for i in range(4):
            back[:, i, i] = back[:, -1 - i, -1 - i] = 1
        back = back[:, 4 + lo : N + 4 - hi, 4 + lo : kept_rows + 4 - hi]
        torch.testing.assert_close(part.restore(y, None), back @ y, **EXACT)


def test_window_follows_the_sizes():
    token_map = weighed().map
    part = token_map.window(-1, TAIL, N)
    assert torch.equal(part.size, torch.cat([torch.ones(B, 1), token_map.size[:, :-TAIL]], 1))


def test_size_weighted_means_compose_and_sizes_add_up():
    """Two merges in a row are the mean of the original rows (merging.md 1.2)."""
    first = weighed().map
    keep = torch.arange(7).expand(B, -1)
    src, into = torch.full((B, 1), 7), torch.full((B, 1), 3)
    second = Merge.mean(keep, src, into, first.size)
    x, size = numbers(B, N, C), torch.arange(1, B * N + 1).view(B, N).double()
    y = second.reduce(first.reduce(x))
    members, *_ = grouped()
    for b in range(B):
        group = members[b][3] + members[b][7]
        mean = (x[b, group] * size[b, group, None]).sum(0) / size[b, group].sum()
        torch.testing.assert_close(y[b, 3], mean, **EXACT)
    torch.testing.assert_close(second.size.sum(1), size.sum(1), **EXACT)


def test_a_group_of_padding_alone_stays_finite_and_padding_has_no_say():
    size = torch.ones(B, N).double()
    size[0, [6, 7]] = 0  # a whole group of sample 0
    size[0, 3] = 0  # one member of the group of 5, 2, 3
    token_map, x = merged().map, numbers(B, N, C)
    token_map = Merge.mean(token_map.keep, token_map.src, token_map.into, size)
    y = token_map.reduce(x)
    torch.testing.assert_close(y[0, 2], (x[0, 5] + x[0, 2]) / 2, **EXACT)
    assert y.isfinite().all()
    assert token_map.size[0, 5] == 0


def test_represent_shows_the_kept_rows_and_restores_as_a_merge():
    mean, x = merged().map, numbers(B, N, C)
    token_map = Represent(mean.keep, mean.src, mean.into, mean.keep_weight, mean.src_weight)
    assert torch.equal(token_map.reduce(x), mean.pick(x))
    assert torch.equal(token_map.restore(mean.pick(x)), mean.restore(mean.pick(x)))


def test_mlerp_means_are_as_long_as_the_longest_member():
    mean, x = merged().map, numbers(B, N, C)
    token_map = Mlerp(mean.keep, mean.src, mean.into, mean.keep_weight, mean.src_weight)
    y = token_map.reduce(x)
    members, *_ = grouped()
    for b in range(B):
        for slot, group in enumerate(members[b]):
            average = x[b, group].mean(0)
            expected = average * x[b, group].norm(dim=-1).max() / average.norm()
            torch.testing.assert_close(y[b, slot], expected, **EXACT)
            if len(group) == 1:
                assert torch.equal(y[b, slot], x[b, group[0]])


def test_mlerp_of_rows_that_cancel_is_finite_backwards_too():
    mean = merged().map
    token_map = Mlerp(mean.keep, mean.src, mean.into, mean.keep_weight, mean.src_weight)
    x = numbers(B, N, C)
    x[1, 3] = -x[1, 9]  # a group of sample 1
    x[2, 4] = 0  # a group of one
    x.requires_grad_()
    y = token_map.reduce(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert y.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("make", LINEAR)
def test_half_precision_comes_back_as_half_precision(make):
    dense, x = make(), numbers(B, N, C)
    low = dense.map.reduce(x.bfloat16())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), dense.reduce @ x, rtol=0.02, atol=0.03)


@pytest.mark.parametrize("make", LINEAR)
def test_maps_are_pytrees(make):
    token_map = make().map
    leaves, spec = _pytree.tree_flatten(token_map)
    again = _pytree.tree_unflatten(leaves, spec)
    assert type(again) is type(token_map)
    x = numbers(B, N, C)
    assert torch.equal(again.reduce(x), token_map.reduce(x))


@pytest.mark.parametrize("count", [0, 1, 4, N])
def test_partition_is_what_sorting_gives(count):
    order = torch.stack([torch.randperm(N, generator=torch.Generator().manual_seed(b)) for b in range(B)])
    chosen, others = partition(order[:, :count], N)
    assert torch.equal(chosen, order[:, :count].sort(dim=1).values)
    assert torch.equal(others, order[:, count:].sort(dim=1).values)

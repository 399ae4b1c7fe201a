"""ToMe: bipartite soft matching, size-weighted means.

Bolya, Fu, Dai, Zhang, Feichtenhofer, Hoffman. Token Merging: Your ViT But Faster. ICLR 2023.
arXiv 2210.09461, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .driver import Cut, Site

Rate = int | list[int] | tuple[int, float]


def schedule(r: Rate, layer: int, layers: int) -> int:
    """How many tokens to remove at `layer`: constant, listed, or a ramp `(r, inflection)`."""
    if isinstance(r, int):
        return r
    if isinstance(r, list):
        return r[layer] if layer < len(r) else 0
    mean, inflection = r
    low = mean * (1.0 - inflection)
    high = 2 * mean - low
    return int(low + (high - low) / (layers - 1) * layer) if layers > 1 else int(low)


def match(cosine: Tensor, r: int, head: int, tail: int) -> list[list[int]]:
    """The groups that one sample's [N N] cosines give, in output order; a group's first member is its destination."""
    n = cosine.shape[0]
    protected = [*range(head), *range(n - tail, n)]
    sources = [i for i in range(0, n, 2) if i not in protected]
    destinations = [j for j in range(1, n, 2) if j not in protected]
    edges = []
    for i in sources:
        scores = cosine[i, destinations]
        best = int(scores.argmax())
        edges.append((float(scores[best]), i, destinations[best]))
    edges.sort(key=lambda edge: -edge[0])  # stable: equal scores keep their order

    gone = {i: j for _, i, j in edges[:r]}
    groups = [[i] for i in range(head)]
    groups += [[i] for i in sources if i not in gone]
    groups += [[j] + [i for i in sources if gone.get(i) == j] for j in destinations]
    groups += [[i] for i in range(n - tail, n)]
    return groups


def one_hot(batch_groups: list[list[list[int]]], n: int, like: Tensor) -> Tensor:
    """S [B N' N]: 1 where original token n is in group c."""
    out = like.new_zeros(len(batch_groups), len(batch_groups[0]), n)
    for b, groups in enumerate(batch_groups):
        for c, members in enumerate(groups):
            out[b, c, members] = 1.0
    return out


def weighted_means(s: Tensor, site: Site) -> Cut:
    """T = diag(1/m) S diag(s), m = S s."""
    mass = (s @ site.sizes[..., None]).squeeze(-1)  # [B N']
    transform = s * site.sizes[:, None, :] / mass[..., None]
    return Cut(transform @ site.x, mass, s.transpose(1, 2))


@dataclass(frozen=True)
class ToMe:
    r: Rate
    prop_attn: bool = True

    def cut(self, site: Site) -> Cut | None:
        n = site.x.shape[1]
        r = min(schedule(self.r, site.layer, site.layers), (n - site.head - site.tail) // 2)
        if r <= 0:
            return None
        with torch.no_grad():
            groups = [match(cosine, r, site.head, site.tail) for cosine in site.cosine]
            s = one_hot(groups, n, site.x)
        return weighted_means(s, site)

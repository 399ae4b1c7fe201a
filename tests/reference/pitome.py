"""PiToMe: merge tokens of high energy (many near neighbours), protect the isolated ones.

Tran, Nguyen, Nguyen, et al. Accelerating Transformers with Spectrum-Preserving Token Merging. NeurIPS 2024.
arXiv 2405.16148, section 3; the energy is the released code's, with ELU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .driver import Cut, Site
from .tome import one_hot, weighted_means


def elu(z: float) -> float:
    return z if z > 0 else math.exp(z) - 1.0


def energies(cosine: Tensor, margin: float) -> list[float]:
    """E_i = mean_j ELU(cos_ij - margin), j = i included."""
    n = cosine.shape[0]
    return [sum(elu(float(cosine[i, j]) - margin) for j in range(n)) / n for i in range(n)]


def match(cosine: Tensor, r: int, margin: float, head: int, tail: int) -> list[list[int]]:
    """One sample's groups in output order."""
    n = cosine.shape[0]
    free = list(range(head, n - tail))
    energy = energies(cosine[head : n - tail, head : n - tail], margin)
    ranked = sorted(free, key=lambda i: -energy[i - head])
    a, b, kept = ranked[0 : 2 * r : 2], ranked[1 : 2 * r : 2], ranked[2 * r :]
    target = {i: b[int(cosine[i, b].argmax())] for i in a}
    groups = [[i] for i in range(head)]
    groups += [[i] for i in kept]
    groups += [[j] + [i for i in a if target[i] == j] for j in b]
    groups += [[i] for i in range(n - tail, n)]
    return groups


@dataclass(frozen=True)
class PiToMe:
    keep: float | list[float]
    prop_attn: bool = False

    def count(self, layer: int, n: int) -> int:
        if isinstance(self.keep, list):
            keep = self.keep[layer] if layer < len(self.keep) else 1.0
        else:
            keep = self.keep
        return min(math.floor(n - n * keep + 1e-9), n // 2)

    def cut(self, site: Site) -> Cut | None:
        n = site.x.shape[1]
        r = self.count(site.layer, n - site.head - site.tail)
        if r <= 0:
            return None
        margin = 0.75 - 0.75 * site.layer / site.layers
        with torch.no_grad():
            groups = [match(cosine, r, margin, site.head, site.tail) for cosine in site.cosine]
            s = one_hot(groups, n, site.x)
        return weighted_means(s, site)

"""moefy: an MLP's neurons in blocks, of which each token computes those that its input points at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tokred.registry.method import check_int
from tokred.registry.neurons import Blockwise, Neurons, check_sparsity
from tokred.registry.register import register


@register("sparsify", "moefy")
@dataclass(frozen=True, kw_only=True)
class Moefy(Blockwise):
    """Split each MLP's neurons into equal blocks by their weights; a token computes the blocks nearest to its input.

    Zhang, Lin, Liu, Li, Sun, Zhou: "MoEfication: Transformer Feed-forward Layers are Mixtures of Experts", Findings of
    ACL 2022, arXiv 2110.01786; of its ways to construct experts and to select them the two that need neither data nor
    training. Blocks are balanced k-means clusters of the rows of the first linear's weight, each of length 1; where a
    gate is beside it (which the paper has not), of the rows of both, one behind the other. A block's centre is the mean
    of its rows (the gate's, where there is one), of length 1. For each token x the blocks with the largest
    centre . x are computed, as many for every token; the others' neurons are 0. The paper is about ReLU, and trains a
    little more where models have another activation: expect more loss there, and measure it.

    The blocks follow the weights: they are found anew when a parameter has changed. While decoding, blocks that no
    token of the batch needs are not read behind the gate (or, without one, in the last linear); what tells whether a
    neuron is open, the gate or the first linear, is computed whole.

    sparsity   the share of each MLP's blocks left out, in [0, 1); above 0 at least one goes, and one stays; 0.5
    neurons    how many neurons a block has at most; of at least two blocks some have one less where it does not come
               out even; 32, as in the released code
    rounds     at most so many rounds of k-means; 20
    seed       another start of k-means
    phase      "decode" (one token a sequence; prompts stay dense) or "masked" (every token, to measure quality)
    layers     None is all of them
    """

    sparsity: float = 0.5
    neurons: int = 32
    rounds: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sparsity(self.name, self.sparsity)
        for name, least in (("neurons", 1), ("rounds", 0), ("seed", 0)):
            check_int(self.name, name, getattr(self, name), least)

    def blocks(self, size: int) -> int:
        return max(2, -(-size // self.neurons))

    def left(self, size: int) -> int:
        blocks = self.blocks(size)
        out = max(1, round(self.sparsity * blocks)) if self.sparsity else 0
        return max(1, blocks - out)

    def prepare(self, *rows: Tensor) -> tuple[Tensor, Tensor]:
        wide = torch.cat([normalize(part.float(), dim=1) for part in rows], dim=1)  # [F C] or [F 2C]
        labels = balanced_clusters(wide, self.blocks(len(wide)), self.rounds, self.seed)
        return labels, centres(normalize(rows[0].float(), dim=1), labels, self.blocks(len(wide))).to(rows[0].dtype)

    def words(self, place: Neurons) -> str:
        return f"{self.left(place.size)} of {self.blocks(place.size)} blocks of neurons computed"


def balanced_clusters(points: Tensor, count: int, rounds: int, seed: int) -> Tensor:
    """Cluster points [F C] by k-means whose clusters differ in size by at most one; which one each is of, [F].

    It ends when no point changes its cluster, or after so many rounds. The start is a draw of points that depends on
    the seed alone.
    """
    start = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:count]
    room = torch.full((count,), len(points) // count, device=points.device)
    room[: len(points) % count] += 1
    labels = assigned(points @ normalize(points[start.to(points.device)], dim=1).T, room)
    for _ in range(rounds):
        moved = assigned(points @ centres(points, labels, count).T, room)
        if torch.equal(moved, labels):
            break
        labels = moved
    return labels


def centres(points: Tensor, labels: Tensor, count: int) -> Tensor:
    """The mean direction of each cluster's points, [E C], of length 1."""
    members = labels == torch.arange(count, device=labels.device)[:, None]  # [E F]
    return normalize(members.to(points.dtype) @ points, dim=1)  # index_add's order on CUDA is another in each run


def assigned(similarity: Tensor, room: Tensor) -> Tensor:
    """A cluster for each point, by their similarity [F E]; as many in each as it has room for [E].

    Each point asks at the nearest cluster that has room, which takes those most similar to it; the others ask again.
    """
    labels = torch.full((len(similarity),), -1, device=similarity.device)
    room = room.clone()
    while bool((labels < 0).any()):
        free = (labels < 0).nonzero().squeeze(1)
        value, wish = similarity[free].masked_fill(room == 0, -torch.inf).max(1)
        order = value.argsort(descending=True, stable=True)
        order = order[wish[order].argsort(stable=True)]
        asked = wish.bincount(minlength=len(room))
        first = asked.cumsum(0) - asked
        rank = torch.arange(len(order), device=order.device) - first[wish[order]]
        taken = order[rank < room[wish[order]]]
        labels[free[taken]] = wish[taken]
        room -= wish[taken].bincount(minlength=len(room))
    return labels

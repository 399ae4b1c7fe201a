"""ToFu: ToMe's pairs, pruned in the first half of the model and merged without loss of length in the second."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from tokred.registry.maps import Merge, Mlerp, Represent, TokenMap
from tokred.registry.matching import bipartite, mergeable
from tokred.registry.method import Reduction, check_r, per_layer
from tokred.registry.register import register
from tokred.registry.site import Place, Site


@register("merge", "tofu")
@dataclass(frozen=True)
class ToFu(Reduction):
    """Prune ToMe's r pairs in the first half of the layers; merge them, as long as their longest row, in the second.

    Kim, Gao, Hsu, Shen, Jin: "Token Fusion: Bridging the Gap between Token Pruning and Token Merging", WACV 2024,
    arXiv 2312.01026, section 3. No code was released; as in the re-implementation in PiToMe's repository a row weighs
    one, however often it was merged before, and attention takes no sizes.

    r   tokens removed per layer: an int, a list with one entry a layer, or (r, inflection)
    """

    r: int | list[int] | tuple[int, float] = 8

    needs = ("keys",)

    def __post_init__(self) -> None:
        check_r(self.name, self.r)

    def removed(self, place: Place) -> Any:
        return min(per_layer(self.r, place.layer, place.depth), mergeable(place))

    def plan(self, site: Site) -> TokenMap:
        keep, src, into = bipartite(site, site.metric(), self.removed(site))
        mean = Merge.mean(keep, src, into, site.members())
        kind = Represent if site.layer < site.depth // 2 else Mlerp
        parts = {field.name: getattr(mean, field.name) for field in fields(mean)}
        return kind(**parts | {"size": None})

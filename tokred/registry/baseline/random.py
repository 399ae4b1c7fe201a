"""random: keep tokens by a draw that is the same in every run."""

from __future__ import annotations

from dataclasses import dataclass

from tokred.registry.grid import shuffled
from tokred.registry.maps import TokenMap
from tokred.registry.method import Share, check_int
from tokred.registry.register import register
from tokred.registry.site import Site


@register("baseline", "random")
@dataclass(frozen=True)
class Random(Share):
    """Keep tokens at random, in their order. A baseline: what a method must beat to be worth its cost.

    The draw depends on the seed, the layer and the position alone, so outputs can be reproduced, and a sample's result
    does not depend on the batch that it is in.

    keep, ratio   fraction of the unprotected tokens kept or removed at each cut; 0.5
    seed          another draw
    layers        None is three cuts, a quarter, half and three quarters of the way
    """

    seed: int = 0

    causal_safe = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int(self.name, "seed", self.seed)

    def plan(self, site: Site) -> TokenMap:
        draw = shuffled(site.tokens, self.seed, site.layer, site.hidden.device).float()  # exact: below 2 ** 24
        return site.keep_top(draw.expand(site.batch, -1), site.count(self.kept))

"""norm: keep the longest rows."""

from __future__ import annotations

from dataclasses import dataclass

from tokred.registry.maps import TokenMap
from tokred.registry.method import Share
from tokred.registry.register import register
from tokred.registry.site import Site, precise


@register("prune", "norm")
@dataclass(frozen=True)
class NormTopK(Share):
    """Keep the tokens with the largest L2 norm in the residual stream, in their order. No paper claims that it is good.

    keep, ratio   fraction of the unprotected tokens kept or removed at each cut; 0.5
    layers        None is three cuts, a quarter, half and three quarters of the way
    """

    causal_safe = True

    def plan(self, site: Site) -> TokenMap:
        return site.keep_top(precise(site.hidden).norm(dim=-1), site.count(self.kept))

"""A report made by hand, with every kind of entry in it, for the tests of what renders it."""

import torch

from tokred.compiler.report import BlockReport, GraphReport, PassReport, Refusal, Report, TokenPicture

GRID = (4, 4)
# One class token, then sixteen patches: 1, 2 and 5 became one token, 3 and 4 another, the last two were dropped.
GROUPS = [0, 1, 1, 2, 2, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, -1, -1]
TORCH_SOURCE = 'def forward(self, x):\n    return x < 1 & "<script>alert(1)</script>"  # https://example.invalid'


def blocks() -> list[BlockReport]:
    reduced = BlockReport("attention", 0, "blocks.0.attn", (17, 12), "self", "vit.py:12", "tome(r=5)")
    reduced.flops = (1_234_000, 1_234_000)
    follows = BlockReport("mlp", 0, "blocks.0.mlp", (12, 12), "plain", "vit.py:14", flops=(2_000_000, 1_410_000))
    no_rule = Refusal("opaque-op", "aten.foo has no rule, so nothing is reduced across it", "vit.py:22")
    refused = BlockReport("attention", 1, "blocks.1.attn", (12, 12), "cross", "vit.py:20", "tome(r=5)", no_rule)
    refused.flops, refused.note = (900, 900), "predicted gain 0.1 ms"
    symbolic = BlockReport("mlp", 1, "blocks.1.mlp", ("s0", "s0 - 5"), "gated")
    return [reduced, follows, refused, symbolic]


def picture(layer: int, method: str, grid: tuple[int, int] | None) -> TokenPicture:
    return TokenPicture(layer, method, list(GROUPS), (1, 0), grid)


def full_report() -> Report:
    """Two graphs: one with everything, one that nothing was found in."""
    liveness = PassReport("token_liveness", True, 3, 0.123, ["layer 1 computes 1 row of 12"])
    lossy = PassReport("plugin_pass", False, 0, 0.0, [], [Refusal("pass-raised", "ValueError: no", "plugin_pass")])
    full = GraphReport(
        model="Digits<ViT>",
        blocks=blocks(),
        passes=[liveness, lossy],
        flops=(3_234_900, 2_644_900),
        restores=["for conv2d at dpt.py:3"],
        notes=["captured without a batch dimension"],
        pictures=[picture(0, "tome(r=5)", GRID), picture(1, "evit(keep=0.7)", None)],
        image=torch.linspace(0, 1, 8 * 8 * 3).view(8, 8, 3),
        before=TORCH_SOURCE,
        after="def forward(self, x):\n    return x",
    )
    return Report([full, GraphReport(model="Head")])

"""The methods that choose image tokens unlike each other, in front of the language model: written from the papers.

As in oracle.py nothing here knows tokred, and everything is one sample, often one number, at a time.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tests.decoders.oracle import Dropped, Selection, attention_of, masked

__all__ = ["catp", "encoder", "todre", "zoo_prune"]


def _entering(model: nn.Module, inputs: dict[str, Tensor], visual: Tensor) -> list[tuple[list[int], Tensor, Tensor]]:
    """For each sample the visual rows, what enters layer 0 [N C], and the cosines of the visual rows [V V]."""
    with torch.no_grad():
        hidden = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states[0]
    found = []
    for sample, x in enumerate(hidden):
        rows = visual[sample].nonzero().squeeze(-1).tolist()
        unit = [x[row] / x[row].square().sum().sqrt() for row in rows]
        cosines = torch.stack([torch.stack([(a * b).sum() for b in unit]) for a in unit])
        found.append((rows, x, cosines))
    return found


def _without(visual: Tensor, kept: list[list[int]]) -> Tensor:
    gone = visual.clone()
    for sample, rows in enumerate(kept):
        gone[sample, rows] = False
    return gone


def encoder(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[B T C] what LLaVA's features are taken from; its last attention's weights [B H T T] and keys [B T H D]."""
    tower = model.model.vision_tower
    with torch.no_grad():
        hidden = tower(pixels, output_hidden_states=True).hidden_states[-1]
    tower.set_attn_implementation("eager")  # which computes weights, but in float32
    keys: list[Tensor] = []
    layer = tower.encoder.layers[-1].self_attn
    hook = layer.k_proj.register_forward_hook(lambda module, inputs, output: keys.append(output))
    with torch.no_grad():
        seen = tower(pixels, output_attentions=True)
    hook.remove()
    tower.set_attn_implementation("sdpa")
    return hidden, seen.attentions[-1], keys[0].unflatten(-1, (layer.num_heads, -1))


def _pivots(model: Any, inputs: dict[str, Tensor]) -> list[int] | None:
    """The patch of each sample with the most attention of the class token, or of all patches where there is none."""
    if not hasattr(model, "model") or not hasattr(model.model, "multi_modal_projector"):
        return None
    if model.config.model_type == "internvl":  # four patches are one image token
        return None
    attention = encoder(model, inputs["pixel_values"])[1].mean(1)  # [B T T]
    if model.config.vision_feature_select_strategy == "full":
        return attention.mean(1).argmax(-1).tolist()
    return attention[:, 0, 1:].argmax(-1).tolist()


def todre(keep: float, exit_layer: int, pivot: str = "class") -> Selection:
    """arXiv 2505.18757v2: from the pivot on always the row least like the chosen ones. Without an encoder, and
    for "mean", the pivot is the row nearest the mean."""

    def select(model: nn.Module, inputs: dict[str, Tensor], visual: Tensor) -> Dropped:
        kept: list[list[int]] = []
        pivots = _pivots(model, inputs) if pivot == "class" else None
        for rows, x, cosines in _entering(model, inputs, visual):
            mean = x[rows].mean(0)
            nearness = [float(x[row] @ mean / x[row].norm()) for row in rows]
            chosen = [nearness.index(max(nearness)) if pivots is None else pivots[len(kept)]]
            while len(chosen) < round(keep * len(rows)):
                left = [v for v in range(len(rows)) if v not in chosen]
                chosen.append(min(left, key=lambda v: sum(float(cosines[v, c]) for c in chosen)))
            kept.append([rows[v] for v in chosen])
        gone = _without(visual, kept)
        return {0: gone, exit_layer: visual & ~gone}

    return select


def _directions(count: int, width: int, seed: int) -> Tensor:
    """[count width] standard normal numbers from a permutation of the numbers below a prime (Box and Muller)."""
    prime, drawn = 2**24 - 3, []
    for place in range(count * width):
        uniform = []
        for number in (0, 1):
            x = place
            for multiplier, shift in ((48271, seed), (69621, number)):
                x = pow(x * multiplier + shift * 7919 + 12345, 5, prime)
            uniform.append((x + 1) / prime)
        drawn.append(math.sqrt(-2 * math.log(uniform[0])) * math.cos(2 * math.pi * uniform[1]))
    return torch.tensor(drawn, dtype=torch.float64).view(count, width)


def _sensitivities(model: Any, pixels: Tensor, probes: int, step: float, seed: int) -> list[list[float]]:
    """How far the projector's output moves, on average, per step to both sides of what it reads."""
    hidden = encoder(model, pixels)[0]
    patches = hidden if model.config.vision_feature_select_strategy == "full" else hidden[:, 1:]
    found, directions = [], _directions(probes, patches.shape[-1], seed)
    for sample in patches:
        changes = []
        for x in sample:
            total = 0.0
            for u in directions:
                with torch.no_grad():
                    ahead, behind = (model.model.multi_modal_projector(x + h * u) for h in (step, -step))
                total += float(((ahead - behind) / (2 * step)).norm())
            changes.append(total / probes)
        found.append(changes)
    return found


def zoo_prune(keep: float, probes: int = 64, step: float = 0.01, seed: int = 0) -> Selection:
    """arXiv 2509.24837; without probes, with the length of what enters layer 0 for the sensitivity."""

    def select(model: nn.Module, inputs: dict[str, Tensor], visual: Tensor) -> Dropped:
        kept: list[list[int]] = []
        found = _sensitivities(model, inputs["pixel_values"], probes, step, seed) if probes else None
        for rows, x, cosines in _entering(model, inputs, visual):
            length = [float(x[row].square().sum().sqrt()) for row in rows] if found is None else found[len(kept)]
            score = [(v - min(length)) / (max(length) - min(length)) for v in length]
            chosen: list[int] = [score.index(1.0)]
            while len(chosen) < round(keep * len(rows)):
                left = [v for v in range(len(rows)) if v not in chosen]
                chosen.append(max(left, key=lambda v: score[v] * (1 - max(float(cosines[v, c]) for c in chosen))))
            kept.append([rows[v] for v in chosen])
        return {0: _without(visual, kept)}

    return select


def catp(keep: float, weight: float, images: int = 1, second: int = 0, affinity: float = 0.6) -> Selection:
    """arXiv 2508.07871: always the row that raises facility location plus alignment with the text most, image by image;
    then, if there are several, behind layer `second` and the next one what the question makes of context and image."""

    def select(model: nn.Module, inputs: dict[str, Tensor], visual: Tensor) -> Dropped:
        share = keep if images == 1 else (1 + keep) / 2
        kept: list[list[list[int]]] = []  # of each sample, of each image
        for rows, x, cosines in _entering(model, inputs, visual):
            each, own = len(rows) // images, []
            for image in range(images):
                mine = range(image * each, (image + 1) * each)
                after = rows[mine[-1] + 1] if mine[-1] + 1 < len(rows) else len(x)
                own.append([rows[v] for v in _cover(mine, rows, x, cosines, after, weight, int(share * each))])
            kept.append(own)
        dropped = {0: _without(visual, [[row for mine in own for row in mine] for own in kept])}
        if images == 1:
            return dropped
        each, number = int(visual[0].sum()) // images, int(keep * int(visual[0].sum()) / images * (images - 1))
        states = _states(model, inputs, dropped)[second + 1]
        rise = attention_of(model, inputs, second, dropped) - attention_of(model, inputs, second - 1, dropped)
        context, gone, last = [], torch.zeros_like(visual), torch.zeros_like(visual)
        for sample, own in enumerate(kept):
            h, change = states[sample], rise[sample, :, -1].mean(0)
            asks = torch.arange(len(h)) >= min(own[-1])  # what stage 1 left of the last image, and the text behind it
            asked = h[asks & ~dropped[0][sample]].mean(0)
            shown = [row for mine in own[:-1] for row in mine]
            value = {row: max(float(change[row]), 0) + affinity * _cosine(h[row], asked) for row in shown}
            context.append(sorted(value, key=value.__getitem__, reverse=True)[:number])
            gone[sample, [row for row in value if row not in context[-1]]] = True
        dropped[second + 1] = gone
        states = _states(model, inputs, dropped)[second + 2]
        for sample, own in enumerate(kept):
            h = states[sample]
            like = {row: _cosine(h[row], h[context[sample]].mean(0)) for row in own[-1]}
            last[sample, sorted(like, key=like.__getitem__, reverse=True)[int(keep * each) :]] = True
        return dropped | {second + 2: last}

    return select


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / a.norm() / b.norm())


def _states(model: nn.Module, inputs: dict[str, Tensor], dropped: Dropped) -> tuple[Tensor, ...]:
    """[B N C] what enters each layer."""
    with torch.no_grad(), masked(dropped):
        states: tuple[Tensor, ...] = model(**inputs, use_cache=False, output_hidden_states=True).hidden_states
    return states


def _cover(
    mine: range, rows: list[int], x: Tensor, cosines: Tensor, after: int, weight: float, count: int
) -> list[int]:
    """Which tokens of one image, by their numbers among the sample's, cover it and fit the text before row `after`."""
    text = x[rows[mine[-1]] + 1 : after].sum(0)
    aligned = {v: _cosine(x[rows[v]], text) if bool(text.any()) else 0.0 for v in mine}

    def worth(chosen: list[int]) -> float:
        covered = sum(max(0.0, *(float(cosines[v, c]) for c in chosen)) for v in mine)
        return round(covered + weight * sum((1 + aligned[c]) / 2 for c in chosen), 12)

    chosen: list[int] = []
    while len(chosen) < count:
        chosen.append(max((v for v in mine if v not in chosen), key=lambda v: worth([*chosen, v])))
    return chosen

"""Pictures of what happened to an image's patches: one SVG a site, to stand inside an HTML page."""

from __future__ import annotations

import struct
import zlib
from base64 import b64encode
from collections import Counter
from html import escape
from math import ceil

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from tokred.compiler.report import GraphReport, TokenPicture

__all__ = ["figures"]

Colour = tuple[int, int, int]

STRIP = 32  # columns of the picture where a grid is not known
GOLDEN_ANGLE = 137.508  # degrees; successive multiples are far apart on the colour circle
HATCH = (
    '<pattern id="hatch" width=".25" height=".25" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width=".25" height=".25" fill="#16181d"/><rect width=".06" height=".25" fill="#5c6370"/></pattern>'
)


def figures(graph: GraphReport, name: str) -> str:
    """All pictures of a graph as HTML figures; `name` is unique in the page. Empty where there is nothing to show."""
    if not graph.pictures:
        return ""
    image = None if graph.image is None else torch.as_tensor(graph.image).detach().float().cpu().clamp(0, 1)
    shared = f"<defs>{HATCH}</defs>"
    drawn = "".join(_figure(picture, image) for picture in graph.pictures)
    original = "" if image is None else _original(image, name)
    # Patterns are found by their id in the whole document, so one hidden drawing serves every figure.
    return f'<svg width="0" height="0" aria-hidden="true">{shared}</svg><div class="pictures">{original}{drawn}</div>'


def _original(image: Tensor, name: str) -> str:
    high, wide = image.shape[:2]
    return (
        f'<figure><svg class="picture" id="{name}-input" viewBox="0 0 {wide} {high}">{_image(image, wide, high)}</svg>'
        f"<figcaption>input, {high} x {wide}</figcaption></figure>"
    )


def _figure(picture: TokenPicture, image: Tensor | None) -> str:
    head, tail = picture.protected
    groups = picture.groups[head : len(picture.groups) - tail]
    rows, columns, image = _grid(picture, len(groups), image)
    sizes = Counter(groups)
    colours = _colours(groups, rows, columns, image)
    cells = "".join(
        _cell(index, divmod(index, columns), group, sizes[group], colours.get(group))
        for index, group in enumerate(groups)
    )
    ground = "" if image is None else _image(image, columns, rows)
    edges = f'<path class="edge" d="{_outline(groups, columns, sizes)}"/>'
    return (
        f'<figure><svg class="picture" data-layer="{picture.layer}" viewBox="0 0 {columns} {rows}">'
        f"{ground}{cells}{edges}</svg><figcaption>{escape(_caption(picture, sizes))}</figcaption></figure>"
    )


def _grid(picture: TokenPicture, count: int, image: Tensor | None) -> tuple[int, int, Tensor | None]:
    """Rows, columns, and the image if its patches are known; else a strip that wraps."""
    if picture.grid is not None and picture.grid[0] * picture.grid[1] == count:
        return *picture.grid, image
    columns = max(1, min(STRIP, count))
    return ceil(count / columns), columns, None


def _caption(picture: TokenPicture, sizes: Counter[int]) -> str:
    dropped = sizes[-1]
    groups = sum(group != -1 for group in sizes)
    tail = f", {dropped} dropped" if dropped else ""
    return f"layer {picture.layer}, {picture.method}: {sizes.total()} patches in {groups} tokens{tail}"


def _colours(groups: list[int], rows: int, columns: int, image: Tensor | None) -> dict[int, Colour | str]:
    """The colour of each group of two or more: its mean in the image, else one of its own."""
    merged = [group for group, size in Counter(groups).items() if size > 1 and group != -1]
    if image is None:
        return {group: f"hsl({GOLDEN_ANGLE * group % 360:.0f} 65% 55%)" for group in merged}
    patches = adaptive_avg_pool2d(image.permute(2, 0, 1), (rows, columns)).flatten(1)  # [3 N]
    where = torch.tensor(groups)
    return {group: _rgb(patches[:, where == group].mean(1)) for group in merged}


def _rgb(colour: Tensor) -> Colour:
    red, green, blue = (round(255 * value) for value in colour.tolist())
    return red, green, blue


def _cell(index: int, place: tuple[int, int], group: int, size: int, colour: Colour | str | None) -> str:
    row, column = place
    title = f"patch {index} (row {row}, column {column}): "
    if group == -1:
        kind, fill, title = "dropped", ' fill="url(#hatch)"', title + "dropped"
    elif size == 1:
        kind, fill, title = "kept", "", title + f"token {group}, alone"
    else:
        shade = colour if isinstance(colour, str) else f"rgb{colour}"
        kind, fill, title = "merged", f' fill="{shade}"', title + f"token {group}, one of {size}"
    return (
        f'<rect class="cell {kind}" data-group="{group}" x="{column}" y="{row}" width="1" height="1"{fill}>'
        f"<title>{title}</title></rect>"
    )


def _outline(groups: list[int], columns: int, sizes: Counter[int]) -> str:
    """Lines around merged groups: each side of a cell whose neighbour there belongs to another group."""
    strokes = []
    for index, group in enumerate(groups):
        if group == -1 or sizes[group] == 1:
            continue
        row, column = divmod(index, columns)
        if column == 0 or groups[index - 1] != group:
            strokes.append(f"M{column} {row}v1")
        if column == columns - 1 or index + 1 == len(groups) or groups[index + 1] != group:
            strokes.append(f"M{column + 1} {row}v1")
        if row == 0 or groups[index - columns] != group:
            strokes.append(f"M{column} {row}h1")
        if index + columns >= len(groups) or groups[index + columns] != group:
            strokes.append(f"M{column} {row + 1}h1")
    return "".join(strokes)


def _image(image: Tensor, wide: int, high: int) -> str:
    source = b64encode(_png(image)).decode()
    size = f'width="{wide}" height="{high}" preserveAspectRatio="none"'
    return f'<image {size} href="data:image/png;base64,{source}"/>'


def _png(image: Tensor) -> bytes:
    """An 8 bit RGB PNG of `[H, W, 3]` floats in 0..1 (RFC 2083: each scan line starts with its filter, 0 is none)."""
    high, wide, _ = image.shape
    pixels = (image * 255).round().byte().flatten(1)  # [H W*3]
    lines = torch.cat([pixels.new_zeros(high, 1), pixels], dim=1)
    head = struct.pack(">IIBBBBB", wide, high, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(lines.flatten().tolist()), 9)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

"""The report as JSON, as a printed table and as HTML text; test_html_browser.py looks at the page itself."""

import json
import re
import struct
import zlib
from base64 import b64decode
from html.parser import HTMLParser

import pytest
import torch

from tests.compiler.reports import GRID, full_report, picture
from tokred.compiler.picture import figures
from tokred.compiler.report import GraphReport, Report, TokenPicture
from tokred.compiler.text import flops_text, report_text, saving_text


def test_json_is_the_documented_schema_and_nothing_else():
    graphs = full_report().to_json()
    assert json.loads(json.dumps(graphs)) == graphs
    assert list(graphs) == ["graphs"]
    first, second = graphs["graphs"]
    assert first["flops"] == {"before": 3_234_900, "after": 2_644_900}
    assert first["blocks"][0] == {
        "kind": "attention",
        "layer": 0,
        "module": "blocks.0.attn",
        "tokens": [17, 12],
        "method": "tome(r=5)",
        "refusal": None,
    }
    assert first["blocks"][2]["refusal"] == {
        "code": "opaque-op",
        "reason": "aten.foo has no rule, so nothing is reduced across it",
        "where": "vit.py:22",
    }
    assert second == {"model": "Head", "blocks": [], "flops": {"before": 0, "after": 0}}
    for graph in (first, second):
        assert set(graph) == {"model", "blocks", "flops"}
        for block in graph["blocks"]:
            assert set(block) == {"kind", "layer", "module", "tokens", "method", "refusal"}
            assert block["kind"] in {"attention", "mlp"}


EXPECTED = """\
graph 1 of 2: Digits<ViT>
  2 attention, 2 MLP, 1 acted on, 1 refused; 3.23M -> 2.64M FLOPs (-18.2 %)

  layer  kind       form   module         tokens        FLOPs        method
  0      attention  self   blocks.0.attn  17 -> 12      1.23M        tome(r=5)
  0      mlp        plain  blocks.0.mlp   12            2M -> 1.41M
  1      attention  cross  blocks.1.attn  12            900          tome(r=5) refused: opaque-op; predicted gain 0.1 ms
  1      mlp        gated  blocks.1.mlp   s0 -> s0 - 5  0

  restored to all tokens
    for conv2d at dpt.py:3

  passes
    token_liveness  exact  3 changes  0.12 s
      layer 1 computes 1 row of 12
    plugin_pass     lossy  0 changes  0.00 s

  refused
    layer 1 attention blocks.1.attn: opaque-op: aten.foo has no rule, so nothing is reduced across it (vit.py:22)
    plugin_pass: pass-raised: ValueError: no (plugin_pass)

  notes
    captured without a batch dimension

graph 2 of 2: Head
  0 attention, 0 MLP, 0 acted on, 0 refused
"""


def test_printed_report():
    assert str(full_report()) == EXPECTED


def test_an_empty_report_says_so():
    assert report_text(Report()) == "tokred: nothing was compiled yet.\n"


@pytest.mark.parametrize(
    "flops, text",
    [(0, "0"), (999, "999"), (1000, "1k"), (1234, "1.23k"), (999_600, "1M"), (45_678_000_000, "45.7G"), (3e15, "3P")],
)
def test_flops_have_three_digits(flops, text):
    assert flops_text(flops) == text


def test_saving_is_signed_and_empty_where_nothing_was_counted():
    assert saving_text((200, 150)) == "-25.0 %"
    assert saving_text((200, 210)) == "+5.0 %"
    assert saving_text((0, 0)) == ""


class Tags(HTMLParser):
    """Opening and closing tags must match; collects every attribute that could fetch something."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "rect", "path", "image"})

    def __init__(self):
        super().__init__()
        self.open, self.links = [], []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in {"src", "href", "xlink:href", "data", "action"}]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in {"src", "href", "xlink:href"}]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_html_is_well_formed_and_fetches_nothing(tmp_path):
    path = full_report().to_html(tmp_path / "new" / "report.html")
    assert path == tmp_path / "new" / "report.html"
    text = path.read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.links, "the picture has an image"
    assert all(link.startswith("data:image/png;base64,") for link in tags.links)
    assert "<script>alert(1)" not in text
    assert "Digits&lt;ViT&gt;" in text
    assert "url(http" not in text
    assert "@import" not in text


def test_the_embedded_image_is_the_input(tmp_path):
    report = full_report()
    image = report.graphs[0].image
    source = re.search(r'href="data:image/png;base64,([^"]+)"', figures(report.graphs[0], "g"))
    data = b64decode(source[1])
    assert struct.unpack(">II", data[16:24]) == (8, 8)
    start = data.index(b"IDAT")
    (length,) = struct.unpack(">I", data[start - 4 : start])
    lines = torch.frombuffer(bytearray(zlib.decompress(data[start + 4 : start + 4 + length])), dtype=torch.uint8)
    pixels = lines.view(8, 1 + 8 * 3)[:, 1:].reshape(8, 8, 3)
    assert torch.equal(pixels, (image * 255).round().byte())


def cells(html):
    return re.findall(r'class="cell (\w+)" data-group="(-?\d+)" x="(\d+)" y="(\d+)"', html)


def test_each_patch_is_a_cell_and_the_class_token_is_none():
    graph = GraphReport("vit", pictures=[picture(0, "tome(r=5)", GRID)])
    found = cells(figures(graph, "g"))
    assert [(int(y), int(x)) for _, _, x, y in found] == [divmod(index, 4) for index in range(16)]
    kinds = [kind for kind, *_ in found]
    assert kinds == ["merged"] * 5 + ["kept"] * 9 + ["dropped"] * 2
    assert [int(group) for _, group, _, _ in found[:5]] == [1, 1, 2, 2, 1]


def test_merged_patches_share_their_mean_colour():
    image = torch.zeros(4, 4, 3)
    image[0, 0], image[0, 1], image[1, 0] = (
        torch.tensor([1.0, 0, 0]),
        torch.tensor([0, 1.0, 0]),
        torch.tensor([0, 0, 1.0]),
    )
    shown = figures(GraphReport("vit", pictures=[picture(0, "tome(r=5)", GRID)], image=image), "g")
    fills = re.findall(r'data-group="1"[^>]*fill="([^"]+)"', shown)
    assert fills == ["rgb(85, 85, 85)"] * 3


def test_a_grid_that_does_not_fit_becomes_a_strip():
    graph = GraphReport("vit", pictures=[picture(0, "tome(r=5)", (3, 3))], image=torch.zeros(4, 4, 3))
    assert 'viewBox="0 0 16 1"' in figures(graph, "g")


def test_tail_tokens_are_no_patches():
    one = picture(0, "tome(r=5)", GRID)
    one.groups, one.protected = [0, *range(1, 17), 17, 18], (1, 2)
    assert [int(group) for _, group, _, _ in cells(figures(GraphReport("vit", pictures=[one]), "g"))] == [*range(1, 17)]


def edges(groups, grid):
    shown = figures(GraphReport("vit", pictures=[TokenPicture(0, "tome(r=1)", groups, (0, 0), grid)]), "g")
    return sorted(re.findall(r"M\d+ \d+[vh]1", re.search(r'class="edge" d="([^"]*)"', shown)[1]))


def test_the_outline_goes_around_merged_groups_only():
    assert edges([0, 1, 2, 3], (2, 2)) == []
    assert edges([0, 1, -1, -1], (2, 2)) == []
    pair = ["M0 0h1", "M0 0v1", "M0 1h1", "M1 0h1", "M1 1h1", "M2 0v1"]  # no line between the two
    assert edges([0, 0, 1, 2], (2, 2)) == pair
    assert edges([0, 1, 2, 0], (2, 2)) == sorted(
        ["M0 0v1", "M1 0v1", "M0 0h1", "M0 1h1", "M1 1v1", "M2 1v1", "M1 1h1", "M1 2h1"]
    )

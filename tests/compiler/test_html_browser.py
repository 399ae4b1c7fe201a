"""The HTML files as a person sees them, in a real browser."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from tests.compiler.browser import look
from tests.compiler.reports import full_report
from tokred.compiler.dump import dump_stage

LOOK_AT_REPORT = """
const text = one => one.innerText.replace(/\\s+/g, ' ').trim();
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const seen = one => one.checkVisibility() && one.getBoundingClientRect().height > 0;
const texts = all('details pre');
const shown = () => texts.map(seen);

const closed = shown();
all('details summary')[0].click();
const firstOpen = shown();
all('button.all')[0].click();
const allOpen = shown();
all('button.all')[0].click();
const closedAgain = shown();

const pictures = all('svg.picture[data-layer]');
const member = pictures[0].querySelector('[data-group="1"]');
member.dispatchEvent(new MouseEvent('mouseover', {bubbles: true}));
const lit = all('.lit', pictures[0]).length;
member.dispatchEvent(new MouseEvent('mouseout', {bubbles: true}));

return {
  title: document.title,
  headings: all('h2').map(text),
  summary: text(document.querySelector('.summary')),
  rows: all('table.blocks tr.block').map(row => [...row.cells].map(text)),
  bars: all('table.blocks tr.block')
    .map(row => all('.bar', row).map(bar => bar.getBoundingClientRect().width)),
  refusals: all('tr.refusal').map(row => [...row.cells].map(text)),
  passes: all('tr.pass').map(row => [...row.cells].slice(0, 3).map(text)),
  restores: all('ul.restores li').map(text),
  notes: all('ul.notes li').map(text),
  captions: all('figcaption').map(text),
  cells: pictures.map(picture => all('rect.cell', picture).filter(seen).length),
  dropped: pictures.map(picture => all('rect.dropped', picture).length),
  hatch: getComputedStyle(pictures[0].querySelector('rect.dropped')).fill,
  hatchExists: document.getElementById('hatch') !== null,
  closed, firstOpen, allOpen, closedAgain, lit, unlit: all('.lit').length,
  sourceText: texts[0].textContent,
  scripts: document.scripts.length,
  wide: document.documentElement.scrollWidth <= window.innerWidth,
  fetched: performance.getEntriesByType('resource').map(entry => entry.name).filter(name => !name.startsWith('data:')),
};
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return look(full_report().to_html(folder / "report.html"), LOOK_AT_REPORT, folder)


def test_blocks_are_shown_with_tokens_before_and_after(seen):
    assert seen["title"] == "tokred report"
    assert seen["headings"] == ["graph 1: Digits<ViT>", "graph 2: Head"]
    assert seen["summary"] == "4 blocks, 1 acted on, 1 refused. FLOPs 3.23M → 2.64M (-18.2 %)"
    assert seen["rows"] == [
        ["0", "attention", "self", "blocks.0.attn vit.py:12", "17 → 12", "1.23M", "tome(r=5)"],
        ["0", "mlp", "plain", "blocks.0.mlp vit.py:14", "12", "2M → 1.41M", ""],
        [
            "1",
            "attention",
            "cross",
            "blocks.1.attn vit.py:20",
            "12",
            "900",
            "tome(r=5) refused: opaque-op predicted gain 0.1 ms",
        ],
        ["1", "mlp", "gated", "blocks.1.mlp", "s0 → s0 - 5", "0", ""],
    ]


def test_bars_are_as_long_as_their_token_counts(seen):
    (before, after), (same, same_after), _, symbolic = seen["bars"]
    assert after / before == pytest.approx(12 / 17, abs=0.02)
    assert same == same_after == pytest.approx(after, abs=1)
    assert symbolic == []


def test_refusals_passes_restores_and_notes_are_shown(seen):
    assert seen["refusals"] == [
        [
            "layer 1 attention blocks.1.attn",
            "opaque-op",
            "aten.foo has no rule, so nothing is reduced across it",
            "vit.py:22",
        ],
        ["plugin_pass", "pass-raised", "ValueError: no", "plugin_pass"],
    ]
    assert seen["passes"] == [["token_liveness", "exact", "3"], ["plugin_pass", "lossy", "0"]]
    assert seen["restores"] == ["for conv2d at dpt.py:3"]
    assert seen["notes"] == ["captured without a batch dimension"]


def test_pictures_show_every_patch(seen):
    assert seen["captions"] == [
        "input, 8 x 8",
        "layer 0, tome(r=5): 16 patches in 11 tokens, 2 dropped",
        "layer 1, evit(keep=0.7): 16 patches in 11 tokens, 2 dropped",
    ]
    assert seen["cells"] == [16, 16]
    assert seen["dropped"] == [2, 2]
    assert "#hatch" in seen["hatch"]
    assert seen["hatchExists"]


def test_pointing_at_a_patch_lights_its_group(seen):
    assert seen["lit"] == 3
    assert seen["unlit"] == 0


def test_graph_text_opens_and_closes(seen):
    assert seen["closed"] == [False, False]
    assert seen["firstOpen"] == [True, False]
    assert seen["allOpen"] == [True, True]
    assert seen["closedAgain"] == [False, False]


def test_text_from_the_model_stays_text(seen):
    assert seen["sourceText"] == full_report().graphs[0].before
    assert seen["scripts"] == 2, "the page's own and the test's"


def test_nothing_is_fetched_and_nothing_overflows(seen):
    assert seen["fetched"] == []
    assert seen["wide"]


def test_a_dumped_stage_shows_its_graph(tmp_path):
    traced = make_fx(lambda x: (x + 1).relu(), tracing_mode="fake")(torch.randn(3))
    dump_stage(tmp_path, 1, "capture", traced)
    found = look(
        tmp_path / "01_capture.html",
        """
        document.querySelector('summary').click();
        const boxes = [...document.querySelectorAll('g.node')].filter(one => one.checkVisibility());
        return {
          title: document.querySelector('h1').innerText,
          names: boxes.map(box => box.dataset.name),
          code: document.querySelector('details pre').innerText,
          fetched: performance.getEntriesByType('resource').length,
        };
        """,
        tmp_path,
    )
    assert found["title"] == "01 capture: 4 nodes"
    assert found["names"] == [node.name for node in traced.graph.nodes]
    assert "torch.ops.aten.relu.default(add)" in found["code"]
    assert found["fetched"] == 0

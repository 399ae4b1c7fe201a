"""What `dump=` writes, on graphs small enough to know by heart."""

import json
from xml.etree import ElementTree

import networkx as nx
import pytest
import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

import tokred
from tests.compiler.reports import full_report
from tokred.compiler.dump import dump_report, dump_stage, graph_to_networkx, readable
from tokred.compiler.flow import flow_dot, flow_svg, shape_text
from tokred.demo.model import DigitViT

SVG = "{http://www.w3.org/2000/svg}"


def mlp(x, up, down):
    return x + torch.relu(x @ up) @ down


@pytest.fixture(scope="module")
def traced() -> fx.GraphModule:
    inputs = torch.randn(2, 5, 4), torch.randn(4, 8), torch.randn(8, 4)
    return make_fx(mlp, tracing_mode="fake")(*inputs)


def test_networkx_graph_has_every_node_and_use(traced):
    graph = graph_to_networkx(traced)
    assert list(graph) == [node.name for node in traced.graph.nodes]
    assert set(graph.edges) == {
        (source.name, node.name) for node in traced.graph.nodes for source in node.all_input_nodes
    }
    assert graph.nodes["relu"]["target"] == "aten.relu.default"
    assert graph.nodes["relu"]["shape"] == "f32[2, 5, 8]"
    assert nx.has_path(graph, "up_1", "output")
    assert not nx.has_path(graph, "down_1", "relu")


def test_the_code_is_python_with_the_shape_of_each_value(traced):
    code = readable(traced)
    compile(code, "dump.py", "exec")
    lines = {line.split("=")[0].strip(): line for line in code.splitlines() if " = " in line}
    assert lines["relu"].endswith("# f32[2, 5, 8]")
    assert lines["add"].endswith("# f32[2, 5, 4]")
    assert "    # up_1  f32[4, 8]" in code
    assert "= None" not in code


def test_graphs_inside_a_graph_are_written_too():
    inner, outer = fx.Graph(), fx.Graph()
    inner.output(inner.call_function(torch.sin, (inner.placeholder("x"),)))
    outer.output(outer.call_function(torch.cos, (outer.call_module("body", (outer.placeholder("x"),)),)))
    code = readable(fx.GraphModule({"body": fx.GraphModule({}, inner)}, outer))
    assert code.index("torch.cos") < code.index("# body") < code.index("torch.sin")


def test_the_user_s_line_stands_over_what_it_made(traced):
    node = next(node for node in traced.graph.nodes if node.name == "relu")
    node.meta["stack_trace"] = '  File "/home/me/vit.py", line 31, in forward\n    x = self.act(x)\n'
    code = readable(traced).splitlines()
    relu = next(number for number, line in enumerate(code) if line.strip().startswith("relu ="))
    assert code[relu - 1] == "    # vit.py:31"


@pytest.mark.parametrize(
    "value, text",
    [
        (torch.empty(2, 3), "f32[2, 3]"),
        (torch.empty((), dtype=torch.bool), "b8[]"),
        ((torch.empty(1, dtype=torch.bfloat16), None), "(bf16[1], )"),
        (7, "7"),
        (None, ""),
    ],
)
def test_shape_text(value, text):
    assert shape_text(value) == text


def test_every_file_of_a_stage_can_be_read_back(traced, tmp_path):
    folder = tmp_path / "not" / "there"
    dump_stage(folder, 3, "reduce_tokens", traced)
    names = {path.name for path in folder.iterdir()}
    assert names == {f"03_reduce_tokens.{suffix}" for suffix in ("py", "dot", "svg", "html", "graphml")}
    back = nx.read_graphml(folder / "03_reduce_tokens.graphml")
    assert set(back.edges) == set(graph_to_networkx(traced).edges)
    assert back.nodes["relu"]["shape"] == "f32[2, 5, 8]"
    svg = ElementTree.parse(folder / "03_reduce_tokens.svg").getroot()
    assert len(svg.findall(f".//{SVG}g[@class='node']")) == len(traced.graph.nodes)
    assert len(svg.findall(f".//{SVG}path")) == len(back.edges)
    assert "relu" in (folder / "03_reduce_tokens.html").read_text(encoding="utf-8")


def boxes(svg_text):
    """Name -> (x, y, width, height) of each drawn node."""
    groups = ElementTree.fromstring(svg_text).findall(f".//{SVG}g[@class='node']")
    return {
        group.get("data-name"): tuple(int(group.find(f"{SVG}rect").get(key)) for key in ("x", "y", "width", "height"))
        for group in groups
    }


def test_the_drawing_runs_downwards_and_no_two_boxes_touch(traced):
    graph = graph_to_networkx(traced)
    places = boxes(flow_svg(graph))
    assert all(places[source][1] + places[source][3] < places[user][1] for source, user in graph.edges)
    names = list(places)
    for index, name in enumerate(names):
        x, y, wide, high = places[name]
        for other in names[index + 1 :]:
            x2, y2, _, _ = places[other]
            assert abs(x - x2) >= wide or abs(y - y2) >= high, (name, other)


def test_a_parameter_is_drawn_right_above_its_first_user(traced):
    places = boxes(flow_svg(graph_to_networkx(traced)))
    rows = sorted({y for _, y, _, _ in places.values()})
    user = next(
        node.name for node in traced.graph.nodes if any(source.name == "down_1" for source in node.all_input_nodes)
    )
    assert rows.index(places["down_1"][1]) == rows.index(places[user][1]) - 1


def test_an_empty_graph_is_drawn_too():
    assert boxes(flow_svg(nx.DiGraph())) == {}


def test_dot_names_every_node_once_and_quotes(traced):
    graph = graph_to_networkx(traced)
    graph.nodes["relu"]["shape"] = 'f32["quoted"]'
    text = flow_dot(graph)
    assert text.count("[label=") == len(graph)
    assert text.count(" -> ") == len(graph.edges)
    assert '\\"quoted\\"' in text


def test_report_files(tmp_path):
    report = full_report()
    dump_report(tmp_path / "out", report)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report.to_json()
    assert "blocks.0.attn" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_dumped_stage_does_not_change_the_graph(traced, tmp_path):
    before = traced.code
    dump_stage(tmp_path, 0, "x", traced)
    assert traced.code == before


def test_the_option_dumps_every_stage_and_the_report(tmp_path):
    model, pixels = DigitViT().eval(), torch.randn(2, 1, 32, 32)
    torch._dynamo.reset()
    tokred.reset()
    options = {"recipe": "tome(r=4, layers=[1])", "lower": "eager", "exact": False, "dump": str(tmp_path)}
    torch.compile(model, backend="tokred", options=options)(pixels)
    stages = sorted(path.stem for path in tmp_path.glob("*.graphml"))
    assert stages == ["00_dynamo", "01_captured", "02_reduce_tokens"]
    assert "f32[2, 61, " in (tmp_path / "02_reduce_tokens.py").read_text(encoding="utf-8")
    assert "f32[2, 61, " not in (tmp_path / "01_captured.py").read_text(encoding="utf-8")
    (graph,) = json.loads((tmp_path / "report.json").read_text())["graphs"]
    assert [block["tokens"] for block in graph["blocks"] if block["method"]] == [[65, 61]]

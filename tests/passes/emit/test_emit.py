"""The fused graph: what is added to the model's own, where, and with which comments."""

import pytest
import torch
from torch import nn

import dnifx
from dnifx.errors import PassError
from dnifx.estimators import Synthetic
from dnifx.ir import Program
from dnifx.passes.emit.code import import_block, import_line, program_code
from dnifx.passes.emit.fused import SOURCE, EmitFused, interface_root
from dnifx.passes.graph import captured
from dnifx.runtime.emitted.interface import swap_gradients
from tests.passes.programs import Residual, compiled, mlp

X = torch.randn(4, 6)


def fused(program: Program) -> list[tuple[str, str]]:
    assert program.fused is not None
    return [(node.op, node.name) for node in program.fused.nodes]


def test_the_models_nodes_are_all_there_with_their_names_targets_and_meta() -> None:
    program = compiled(Residual(), ["blocks.0"], X)
    assert program.fused is not None
    emitted = {node.name: node for node in program.fused.nodes}
    for node in captured(program).nodes:
        if node.op != "output":
            copy = emitted[node.name]
            assert (copy.op, copy.target, copy.meta) == (node.op, node.target, node.meta | {SOURCE: node.name})
            assert copy is not node


def test_an_interface_is_an_estimate_of_detached_values_and_one_swap() -> None:
    program = compiled(Residual(), ["blocks.0"], X)
    assert program.fused is not None
    nodes = {node.name: node for node in program.fused.nodes}
    added = [name for _, name in fused(program) if name not in {node.name for node in captured(program).nodes}]
    assert [name for name in added if not name.startswith("getitem")] == [
        "examples",
        "stem_detached",
        "relu_detached",
        "estimate_blocks_0",
        "swap_blocks_0",
        "stem_crossing",
        "relu_crossing",
    ]
    assert nodes["estimate_blocks_0"].target == "interfaces.blocks_0"
    assert nodes["swap_blocks_0"].target is swap_gradients
    assert nodes["stem_detached"].all_input_nodes == [nodes["stem"]]
    assert (nodes["stem_detached"].op, nodes["stem_detached"].target) == ("call_method", "detach")
    assert nodes["estimate_blocks_0"].args == ((nodes["stem_detached"], nodes["relu_detached"]), None)


def test_consumers_read_what_crossed_and_the_own_partition_reads_the_value() -> None:
    program = compiled(Residual(), ["blocks.0"], X)
    assert program.fused is not None
    nodes = {node.name: node for node in program.fused.nodes}
    assert nodes["stem_crossing"] in nodes["add"].all_input_nodes
    assert nodes["stem"] in nodes["blocks_0_linear"].all_input_nodes
    assert nodes["relu_crossing"] in nodes["blocks_1_linear"].all_input_nodes


def test_a_locked_boundary_has_no_interface_node() -> None:
    program = compiled(mlp(6, 6, 6, 2), ["0", "2"], X, gradient={"0": "oracle", "2": "zero"})
    names = [name for _, name in fused(program)]
    assert [name for name in names if name.startswith(("estimate", "swap"))] == ["estimate_cut_2", "swap_cut_2"]


def test_a_label_is_turned_into_features_once_for_all_estimators() -> None:
    program = compiled(mlp(6, 6, 6, 2), ["0", "2"], X, context="label", num_classes=3)
    names = [name for _, name in fused(program)]
    assert names.count("one_hot_context") == names.count("features") == 1
    assert program.fused is not None
    context = next(node for node in program.fused.nodes if node.name == "context")
    assert (context.op, context.args) == ("placeholder", (None,))


def test_the_captured_graph_is_left_alone() -> None:
    before = compiled(Residual(), ["blocks.0"], X, until="schedule")
    text = str(captured(before))
    after = EmitFused().run(before)
    assert str(captured(after)) == text
    assert captured(after) is captured(before)


def test_emit_without_interfaces_or_a_graph_is_found_out() -> None:
    with pytest.raises(PassError, match="emit gave no graph"):
        EmitFused().check(Program(nn.Linear(2, 2)))
    with pytest.raises(PassError, match="the program was not emitted; run all passes first"):
        program_code(Program(nn.Linear(2, 2)), True)


def test_the_interfaces_stand_under_a_free_name() -> None:
    assert interface_root(nn.Linear(2, 2)) == "interfaces"
    model = nn.Module()
    model.interfaces = nn.Linear(2, 2)
    assert interface_root(model) == "interfaces_"
    model.register_buffer("interfaces_", torch.zeros(1))
    assert interface_root(model) == "interfaces__"


def test_code_says_each_values_type_and_each_interfaces_origin() -> None:
    net = dnifx.decouple(mlp(6, 8, 2), ["0"], args=(X,), gradient=Synthetic(hidden=0))
    lines = net.code.splitlines()
    assert any(line.lstrip().startswith("_0 = ") and line.endswith("# f32[4, 8]") for line in lines)
    origin = "cut after 0; estimator Synthetic(hidden=0), 72 parameters"
    assert any(line.lstrip().startswith("estimate_cut_0 = ") and origin in line for line in lines)
    assert [line.split("(")[0] for line in lines if line.startswith("def ")] == [
        "def forward",
        "def submod_0",
        "def submod_1",
        "def step",
    ]
    compile(net.code, "<code>", "exec")


def test_code_imports_all_that_it_names() -> None:
    net = dnifx.decouple(Residual(), ["blocks.0"], args=(X,))
    namespace: dict[str, object] = {}
    exec(net.code, namespace)
    assert callable(namespace["forward"])
    names = set(compile(net.code, "<code>", "exec").co_names)
    assert {"torch", "swap_gradients"} <= names


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("torch", torch, "import torch"),
        ("fx", torch.fx, "import torch.fx as fx"),
        ("device", torch.device, "from torch import device"),
        ("swap", swap_gradients, "from dnifx.runtime.emitted.interface import swap_gradients as swap"),
        ("len", len, ""),
        ("Ellipsis", ..., ""),
    ],
)
def test_what_generated_code_names_is_imported(name: str, value: object, line: str) -> None:
    assert import_line(name, value) == line


def test_what_one_module_has_is_imported_in_one_line() -> None:
    imports = {"nn": nn, "swap": swap_gradients, "device": torch.device, "dtype": torch.dtype, "Size": torch.Size}
    assert import_block(imports, "swap(nn.Linear, device, dtype)").splitlines() == [
        "import torch",
        "from torch import device, dtype",
        "import torch.nn as nn",
        "from dnifx.runtime.emitted.interface import swap_gradients as swap",
    ]

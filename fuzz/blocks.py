"""Writes the small seeds: one layer each, in a shape of attention that the larger seeds do not have.

    python blocks.py seeds        # needs the `onnx` package
"""

import sys
from pathlib import Path

from onnx import ModelProto, TensorProto, helper

FLOAT, INT8 = TensorProto.FLOAT, TensorProto.INT8
MS = "com.microsoft"
HEADS, DIM, WIDTH = 2, 4, 8


def value(name, *dims, kind=FLOAT):
    return helper.make_tensor_value_info(name, kind, dims)


def weight(name, *dims, kind=FLOAT):
    """A constant whose values are elsewhere: seeds are small."""
    tensor = TensorProto(name=name, data_type=kind, dims=dims, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="d")
    return tensor


def ints(name, *values):
    return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)


def node(op, inputs, outputs, domain="", **attributes):
    outputs = outputs.split()
    return helper.make_node(op, inputs.split(), outputs, name=f"{op}_{outputs[0]}", domain=domain, **attributes)


def projections():
    return [node("MatMul", f"x w{part}", part) for part in "qkv"]


def weights():
    return [weight(f"w{part}", WIDTH, WIDTH) for part in "qkvo"]


def softmax(query="q4", key="k4", values="v4"):
    """From queries, keys and values by heads to `y`."""
    return [
        node("Transpose", key, "kt", perm=[0, 1, 3, 2]),
        node("MatMul", f"{query} kt", "s"),
        node("Mul", "s scale", "scaled"),
        node("Softmax", "scaled", "p"),
        node("MatMul", f"p {values}", "o"),
        node("Transpose", "o", "t", perm=[0, 2, 1, 3]),
        node("Reshape", "t merged", "m"),
        node("MatMul", "m wo", "y"),
    ]


def by_heads():
    split = [node("Reshape", f"{part} split", f"{part}s") for part in "qkv"]
    return split + [node("Transpose", f"{part}s", f"{part}4", perm=[0, 2, 1, 3]) for part in "qkv"]


def shapes():
    scale = helper.make_tensor("scale", FLOAT, [], [0.5])
    return [ints("split", 0, 0, HEADS, DIM), ints("merged", 0, 0, WIDTH), scale]


def model(nodes, constants, inputs=()):
    graph = helper.make_graph(
        nodes, "g", [value("x", "b", "s", WIDTH), *inputs], [value("y", "b", "s", WIDTH)], [*constants]
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MS, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8, producer_name="")


def multi_head(packed):
    if packed:
        nodes = [node("MatMul", "x wqkv", "f"), node("Reshape", "f five", "q")]
        constants = [weight("wqkv", WIDTH, 3 * WIDTH), ints("five", 0, 0, HEADS, 3, DIM), weight("wo", WIDTH, WIDTH)]
        inputs = "q"
    else:
        nodes, constants, inputs = projections(), [*weights(), weight("bias", 3 * WIDTH)], "q k v bias"
    nodes += [node("MultiHeadAttention", inputs, "a", MS, num_heads=HEADS), node("MatMul", "a wo", "y")]
    return model(nodes, constants)


def microsoft():
    nodes = [node("Attention", "x w bias", "a", MS, num_heads=HEADS, do_rotary=1, unidirectional=1)]
    nodes += [node("MatMul", "a wo", "y")]
    return model(nodes, [weight("w", WIDTH, 3 * WIDTH), weight("bias", 3 * WIDTH), weight("wo", WIDTH, WIDTH)])


def rotated():
    """Half a head is turned, by angles that are computed from positions that are counted from a mask."""
    nodes = [
        node("CumSum", "mask axis", "sum"),
        node("Sub", "sum one", "positions"),
        node("Cast", "positions", "float", to=FLOAT),
        node("Unsqueeze", "float axes", "column"),
        node("MatMul", "column frequencies", "angle"),
        node("Concat", "angle angle", "both", axis=-1),
        node("Cos", "both", "cos"),
        node("Sin", "both", "sin"),
        *projections(),
        *by_heads(),
    ]
    for part in "qk":
        nodes += [
            node("Split", f"{part}4 halves", f"{part}a {part}b", axis=-1),
            node("Neg", f"{part}b", f"{part}n"),
            node("Concat", f"{part}n {part}a", f"{part}t", axis=-1),
            node("Mul", f"{part}4 cos", f"{part}c"),
            node("Mul", f"{part}t sin", f"{part}d"),
            node("Add", f"{part}c {part}d", f"{part}r"),
        ]
    constants = [*weights(), *shapes(), ints("axis", 1), ints("one", 1), ints("axes", 1, 3), ints("halves", 2, 2)]
    constants.append(weight("frequencies", 1, 2))
    return model(nodes + softmax("qr", "kr"), constants, [value("mask", "b", "s", kind=TensorProto.INT64)])


def static_quantised():
    pair = lambda name, after: [  # noqa: E731
        node("QuantizeLinear", f"{name} scale zero", f"{after}_q"),
        node("DequantizeLinear", f"{after}_q scale zero", after),
    ]
    attention = softmax()
    attention[4] = node("MatMul", "p v4", "raw")
    attention[5:5] = pair("raw", "o")
    attention[-2] = node("Reshape", "t merged", "m_raw")
    attention[-1:-1] = pair("m_raw", "m")
    nodes = [node("DequantizeLinear", f"i{part} scale zero", f"w{part}") for part in "qkvo"]
    constants = [*shapes(), helper.make_tensor("zero", INT8, [], [0])]
    constants += [weight(f"i{part}", WIDTH, WIDTH, kind=INT8) for part in "qkvo"]
    return model(nodes + projections() + by_heads() + attention, constants)


def dynamic_quantised():
    nodes = [node("DynamicQuantizeLinear", "x", "xq xs xz")]
    for part in "qkv":
        nodes += [
            node("MatMulInteger", f"xq w{part} xz", f"{part}i"),
            node("Cast", f"{part}i", f"{part}f", to=FLOAT),
            node("Mul", f"{part}f scale", part),
        ]
    constants = [*shapes(), weight("wo", WIDTH, WIDTH), *(weight(f"w{p}", WIDTH, WIDTH, kind=INT8) for p in "qkv")]
    return model(nodes + by_heads() + softmax(), constants)


def branched():
    """The block in both branches of an `If`, as merged decoders have it."""
    branch = helper.make_graph(projections() + by_heads() + softmax(), "branch", [], [value("y", "b", "s", WIDTH)])
    choose = node("If", "use_cache_branch", "y", then_branch=branch, else_branch=branch)
    flag = value("use_cache_branch", 1, kind=TensorProto.BOOL)
    return model([choose], [*weights(), *shapes()], [flag])


SEEDS = {
    "block_decomposed": lambda: model(projections() + by_heads() + softmax(), [*weights(), *shapes()]),
    "block_rotated": rotated,
    "block_multi_head": lambda: multi_head(packed=False),
    "block_packed": lambda: multi_head(packed=True),
    "block_microsoft": microsoft,
    "block_qdq": static_quantised,
    "block_int8": dynamic_quantised,
    "block_if": branched,
}


def main():
    for name, make in SEEDS.items():
        seed: ModelProto = make()
        Path(sys.argv[1], f"{name}.onnx").write_bytes(seed.SerializeToString())


if __name__ == "__main__":
    main()

"""FLOPs of hand-counted nodes."""

from collections.abc import Mapping

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from optframe.errors import InputError
from optframe.flops import Int8Fractions, count_flops, int8_fractions
from optframe.types import OpParameter, OpSpec


def model(text: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18]>\n{text}'))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # 2 * outputs * products for each: 6*8*8 outputs of 4*3*3 products
        ("g (float[1,4,10,10] x, float[6,4,3,3] w) => (float[1,6,8,8] y) { y = Conv(x, w) }", 2 * 6 * 64 * 36),
        # two groups: each output sees half of the channels
        ("g (float[1,4,5,5] x, float[6,2,1,1] w) => (float[1,6,5,5] y) { y = Conv<group=2>(x, w) }", 2 * 6 * 25 * 2),
        ("g (float[3,5,7] x, float[7,2] w) => (float[3,5,2] y) { y = MatMul(x, w) }", 2 * 15 * 2 * 7),
        ("g (float[7,5] x, float[2,7] w) => (float[5,2] y) { y = Gemm<transA=1,transB=1>(x, w) }", 2 * 10 * 7),
        ("g (float[3,5] x) => (float[3,5] y) { y = Relu(x) }", 0),
    ],
)
def test_products_are_counted(text: str, expected: int) -> None:
    assert count_flops(model(text)).total == expected


def test_free_sizes_need_the_shapes_of_inputs() -> None:
    free = model("g (float[n,7] x, float[7,2] w) => (float[n,2] y) { y = MatMul(x, w) }")
    assert count_flops(free).unknown
    report = count_flops(free, input_shapes={"x": (4, 7)})
    assert (report.total, tuple(report.unknown)) == (2 * 4 * 2 * 7, ())


def test_a_function_counts_as_its_body() -> None:
    text = """g (float[4,8] x, float[8,8] w) => (float[4,8] y) { y = my.twice(x, w) }
    <domain: "my", opset_import: ["" : 18]>
    twice (a, b) => (c) { t = MatMul(a, b) c = MatMul(t, b) }"""
    with_function = ir.from_proto(
        onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18, "my" : 1]>\n{text}')
    )
    assert count_flops(with_function).total == 2 * (2 * 4 * 8 * 8)


def test_the_count_leaves_the_model_alone() -> None:
    subject = model("g (float[3,5] x, float[5,2] w) => (float[3,2] y) { y = MatMul(x, w) }")
    before = ir.to_proto(subject).SerializeToString(deterministic=True)
    count_flops(subject)
    assert ir.to_proto(subject).SerializeToString(deterministic=True) == before
    assert np.prod((3, 2, 5)) * 2 == count_flops(subject).total


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # every input element meets each of 6 outputs' 2x2 kernel
        (
            "g (float[1,4,5,5] x, float[4,6,2,2] w) => (float[1,6,6,6] y) { y = ConvTranspose(x, w) }",
            2 * 4 * 25 * 6 * 4,
        ),
        (
            'g (float[2,3,4] x, float[2,4,5] w) => (float[2,3,5] y) { y = Einsum<equation = "bij,bjk->bik">(x, w) }',
            2 * 2 * 3 * 4 * 5,
        ),
        (
            'g (float[2,7,3,4] x, float[4,5] w) => (float[2,7,3,5] y) { y = Einsum<equation = "...j,jk->...k">(x, w) }',
            2 * 42 * 4 * 5,
        ),
        ('g (float[2,3] x) => (float[3,2] y) { y = Einsum<equation = "ij->ji">(x) }', 0),
        # 6 steps of 2 sequences, both directions, 4 gates of 5 cells, from 3 inputs and 5 states
        (
            """g (float[6,2,3] x, float[2,20,3] w, float[2,20,5] r) => (float[6,2,2,5] y)
            { y = LSTM<direction = "bidirectional", hidden_size = 5>(x, w, r) }""",
            2 * 6 * 2 * (2 * 20 * 3 + 2 * 20 * 5),
        ),
        # of two branches the dearer one
        (
            """g (float[3,5] x, float[5,5] w, bool c) => (float[3,5] y) { y = If (c) <
                then_branch = t () => (float[3,5] a) { a = MatMul(x, w) },
                else_branch = e () => (float[3,5] d) { b = MatMul(x, w) d = MatMul(b, w) }
            > }""",
            2 * 2 * 15 * 5,
        ),
        # seven iterations
        (
            """g (float[3,5] x, float[5,5] w) => (float[3,5] y) {
                n = Constant<value_int = 7>()
                y = Loop (n, , x) <body = b (int64 i, bool c, float[3,5] h) => (bool d, float[3,5] k)
                    { d = Identity(c) k = MatMul(h, w) }>
            }""",
            7 * 2 * 15 * 5,
        ),
    ],
)
def test_rarer_products_are_counted(text: str, expected: int) -> None:
    report = count_flops(model(text))
    assert (report.total, report.unknown) == (expected, ())


def test_shapes_computed_by_the_model_itself_are_followed() -> None:
    text = """g (float[n,3,8] x, float[8,6] w) => (float[a,b] y) {
        shape = Shape(x)
        zero = Constant<value_int = 0>()
        one = Constant<value_int = 1>()
        axis = Constant<value_ints = [0]>()
        rows = Gather(shape, zero)
        columns = Gather(shape, one)
        all = Mul(rows, columns)
        first = Unsqueeze(all, axis)
        last = Constant<value_ints = [8]>()
        target = Concat<axis = 0>(first, last)
        flat = Reshape(x, target)
        y = MatMul(flat, w)
    }"""
    assert count_flops(model(text), input_shapes={"x": (5, 3, 8)}).total == 2 * 15 * 6 * 8
    with pytest.raises(InputError, match="unknown input 'z'"):
        count_flops(model(text), input_shapes={"z": (5, 3, 8)})


def test_calls_are_named_by_node_and_stripped_ops_mean_their_function() -> None:
    text = """g (float[4,8] x, float[8,8] w) => (float[4,8] y) {
        t = my.Twice(x, w)
        y = MatMul(t, w)
    }"""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 18, "my" : 1]>\n{text}')
    proto.graph.node[0].name, proto.graph.node[1].name = "call", "product"
    stripped = ir.from_proto(proto)
    assert count_flops(stripped).unknown == ("call", "product")
    parameters = (OpParameter("a"), OpParameter("b"))
    spec = _Twice("Twice", "my", parameters, (OpParameter("c"),), function="", shape_rule="")
    report = count_flops(stripped, ops={"my::Twice": spec})
    assert report.by_node == {"call": 1024, "product": 512}
    assert report.by_op == {"MatMul": 1536}


class _Twice(OpSpec):
    def build_function(self, opset: int, dtypes: Mapping[str, str]) -> ir.Function:
        text = f"""<domain: "my", opset_import: ["" : {opset}]>
            Twice (a, b) => (c) {{ t = MatMul(a, b) c = MatMul(t, b) }}"""
        return ir.serde.deserialize_function(onnx.parser.parse_function(text))


def test_int8_counts_only_where_both_operands_are() -> None:
    text = """g (float[1,2,4,4] x, int8[3,2,1,1] q, float s, float[3,3,1,1] w, int8[4,4] m) => (float[1,3,4,4] y) {
        i = QuantizeLinear(x, s)
        d = DequantizeLinear(i, s)
        v = DequantizeLinear(q, s)
        c = Conv(d, v)
        e = Conv(c, w)
        k = DequantizeLinear(m, s)
        y = MatMul(e, k)
    }"""
    conv, second, product = 2 * 48 * 2, 2 * 48 * 3, 2 * 48 * 4
    share = int8_fractions(model(text))
    assert share.all == pytest.approx(conv / (conv + second + product))  # weights alone in INT8 do not count
    assert share.convolutions == pytest.approx(conv / (conv + second))
    assert int8_fractions(model("g (float[3] x) => (float[3] y) { y = Relu(x) }")) == Int8Fractions(0.0, None)

"""FLOPs of hand-counted nodes."""

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from optframe.flops import count_flops


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

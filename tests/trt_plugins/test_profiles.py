"""Optimisation profiles: read from text, and refused where they contradict the graph."""

import onnx_ir as ir
import pytest

from optframe.errors import InputError
from optframe_trt.profiles import ShapeRange, input_dims, resolve

INPUTS = {"images": ("batch", 3, "height", "width"), "mask": ("batch", "height", "width")}


def test_named_dimensions_hold_for_every_input_that_has_them() -> None:
    (profile,) = resolve("batch=1/1/4, height=320/800/1344,width=512/1066/1344", INPUTS)
    assert profile["images"] == ShapeRange((1, 3, 320, 512), (1, 3, 800, 1066), (4, 3, 1344, 1344))
    assert profile["mask"] == ShapeRange((1, 320, 512), (1, 800, 1066), (4, 1344, 1344))


def test_whole_shapes_and_single_values() -> None:
    text = "images=1x3x32x64/2x3x32x64/4x3x32x64,mask=1x32x64/2x32x64/4x32x64;batch=2,height=8,width=9"
    first, second = resolve(text, INPUTS)
    assert first["images"].max == (4, 3, 32, 64)
    assert second["mask"] == ShapeRange((2, 8, 9), (2, 8, 9), (2, 8, 9))


def test_a_static_model_needs_none() -> None:
    assert resolve("", {"x": (1, 3)}) == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"dynamic shapes \(images batchx3xheightxwidth, mask batchxheightxwidth\): say in what range"),
        ("batch=1/1/4", "leaves dimension 'height' of input 'images'"),
        ("batch=4/1/1,height=8,width=8", "do not rise"),
        ("image=1x3x8x8,mask=1x8x8", "did you mean 'images'"),
        ("images=1x4x8x8,mask=1x8x8", "1x4x8x8 contradicts the graph, which has batchx3xheightxwidth"),
        ("images=1x3x8,mask=1x8x8", "contradicts the graph"),
        ("batch=1/2,height=8,width=8", "is no part of a profile"),
        ("batch=one,height=8,width=8", "is no part of a profile"),
        ("batch=-1,height=8,width=8", "is no part of a profile"),
        ("batch=1x2,height=8,width=8", "is a dimension and takes sizes"),
        ("images=1x3x8x8,batch=2,mask=2x8x8", "says two things of dimension 'batch'"),
        ("batch", "is no part of a profile"),
        ("batch=1,height=8,width=8,batch=2", "names 'batch' twice"),
        ("batch=0,height=8,width=8", "max 0x3x8x8 leaves nothing"),
        ("batch=1/1/3000000000,height=8,width=8", "sizes are at most 2147483647"),
    ],
)
def test_what_contradicts_the_graph_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve(text, INPUTS)


def test_a_profile_for_fixed_shapes_is_refused() -> None:
    with pytest.raises(InputError, match="fixed shape: leave --profile out"):
        resolve("batch=1", {"x": (1, 3)})


def test_an_unnamed_dimension_needs_the_whole_shape() -> None:
    with pytest.raises(InputError, match="leaves dimension number 0 of input 'x'"):
        resolve("n=1", {"x": (None, "n")})
    (profile,) = resolve("x=1x2/3x2/5x2", {"x": (None, "n")})
    assert profile["x"].max == (5, 2)


def test_dims_come_from_the_graph() -> None:
    x = ir.val("x", ir.DataType.FLOAT, ("batch", 3, None))
    model = ir.Model(ir.Graph([x], [x], nodes=[], opset_imports={"": 18}), ir_version=10)
    assert input_dims(model) == {"x": ("batch", 3, None)}
    x.shape = None
    with pytest.raises(InputError, match="'x' declares no shape"):
        input_dims(model)

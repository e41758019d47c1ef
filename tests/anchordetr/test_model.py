"""The PyTorch model against its definition: golden outputs, published layout, torch's own modules, written-out sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optframe.errors import InputError
from optframe_anchordetr.model import VARIANTS, AnchorDETR, AnchorDETRConfig, build
from optframe_anchordetr.model.attention import MultiHeadAttention, RowColumnAttention
from optframe_anchordetr.model.backbone import ResNet
from optframe_anchordetr.model.positions import (
    anchor_grid,
    feature_mask,
    grid_coordinates,
    inverse_sigmoid,
    sine_embedding,
    sine_embedding_2d,
)
from optframe_anchordetr.model.preprocess import pad_batch
from optframe_anchordetr.weights import load_seeded_weights

GOLDEN_TOLERANCE = 3e-5  # float32 of other kernels and summation orders: measured 0 and 7e-6


def run(model: nn.Module, *inputs: Tensor) -> tuple[np.ndarray, np.ndarray]:
    with torch.inference_mode():
        logits, boxes = model(*inputs)
    return logits.numpy(), boxes.numpy()


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Give every parameter, biases included, random values."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return module


class TestGolden:
    def test_single_image(self, seeded_model: AnchorDETR, golden: Callable, reference_image: Callable) -> None:
        expected = golden("r50-dc5_1x256x320")
        logits, boxes = run(seeded_model, torch.from_numpy(reference_image(256, 320, 0))[None])
        assert logits.shape == (1, 900, 91)
        np.testing.assert_allclose(logits, expected["pred_logits"], rtol=0, atol=GOLDEN_TOLERANCE)
        np.testing.assert_allclose(boxes, expected["pred_boxes"], rtol=0, atol=GOLDEN_TOLERANCE)

    def test_padded_batch(self, seeded_model: AnchorDETR, golden: Callable, reference_image: Callable) -> None:
        expected = golden("r50-dc5_padded_batch")
        images = [torch.from_numpy(reference_image(256, 320, 1)), torch.from_numpy(reference_image(192, 352, 2))]
        logits, boxes = run(seeded_model, *pad_batch(images))
        np.testing.assert_allclose(logits, expected["pred_logits"], rtol=0, atol=GOLDEN_TOLERANCE)
        np.testing.assert_allclose(boxes, expected["pred_boxes"], rtol=0, atol=GOLDEN_TOLERANCE)


class TestLayout:
    @pytest.mark.parametrize("variant", ["r50-dc5", "r50-c5", "r101-dc5", "r101-c5", "r50-dc5-mha"])
    def test_names_and_shapes_are_the_published_ones(
        self, variant: str, state_dict_shapes: Mapping[str, Mapping[str, list[int]]]
    ) -> None:
        with torch.device("meta"):
            state = build(variant).state_dict()
        assert {name: list(tensor.shape) for name, tensor in state.items()} == state_dict_shapes[variant]

    def test_grid_prior_has_no_position_table(self) -> None:
        with torch.device("meta"):
            learned, grid = build("r50-c5"), build("r50-c5", spatial_prior="grid")
        assert learned.state_dict().keys() - grid.state_dict().keys() == {"transformer.position.weight"}
        assert learned.config.queries == 900
        assert grid.config.queries == 867

    def test_batches_tracked_are_ignored(self, small_model: AnchorDETR) -> None:
        twin = build(small_model.config)
        extra = {"backbone.body.bn1.num_batches_tracked": torch.tensor(7)}
        twin.load_state_dict({**small_model.state_dict(), **extra}, strict=True)
        assert torch.equal(twin.transformer.pattern.weight, small_model.transformer.pattern.weight)

    def test_the_last_listed_head_counts(self) -> None:
        model = build("r50-dc5")
        state = {name: torch.full_like(t, i) for i in range(6) for name, t in heads(model, i).items()}
        model.load_state_dict(state, strict=False)
        assert model.transformer.class_embed[0].bias.unique().tolist() == [5.0]
        assert model.transformer.bbox_embed[0].layers[2].weight.unique().tolist() == [5.0]


def heads(model: AnchorDETR, layer: int) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if f"_embed.{layer}." in name}


class TestVariants:
    @pytest.mark.parametrize("name", ["r50-c5", "r50-dc5-mha", "r50-c5-mha"])
    @pytest.mark.parametrize("prior", ["learned", "grid"])
    def test_outputs_depend_on_image_query_and_padding(self, name: str, prior: str, reference_image: Callable) -> None:
        config = replace(VARIANTS[name], spatial_prior=prior, encoder_layers=1, decoder_layers=1)
        model = build(config)
        load_seeded_weights(model)
        a, b = (torch.from_numpy(reference_image(97, 131, seed)) for seed in (1, 2))
        images, mask = pad_batch([a, b[:, :80, :70]])
        logits, boxes = run(model, images, mask)
        assert logits.shape == (2, config.queries, 91)
        assert boxes.shape == (2, config.queries, 4)
        unmasked, _ = run(model, images)
        assert np.abs(logits[0] - logits[1]).max() > 0.1
        assert np.abs(logits[:, 0] - logits[:, 150]).max() > 0.1
        assert np.abs(logits[1] - unmasked[1]).max() > 0.01
        # The first image has no padding: its mask must change nothing but the rounding of other kernels.
        np.testing.assert_allclose(logits[0], unmasked[0], rtol=0, atol=1e-5)

    def test_float64_agrees(self, seeded_model: AnchorDETR, reference_image: Callable) -> None:
        images = torch.from_numpy(reference_image(65, 97, 4))[None]
        single = run(seeded_model, images)
        twin = build("r50-dc5")
        twin.load_state_dict(seeded_model.state_dict())
        double = run(twin.double(), images.double())
        # float32's rounding through about 100 layers, seen at 1e-5; a wrong cast would show as 1e-3 and more
        np.testing.assert_allclose(single[0], double[0], rtol=0, atol=2e-4)
        np.testing.assert_allclose(single[1], double[1], rtol=0, atol=5e-5)

    def test_queries_are_pattern_major(self, small_model: AnchorDETR) -> None:
        """With one pattern for all, query k + 300 equals query k; and each query's pattern is the one of its block."""
        twin = build(small_model.config)
        twin.load_state_dict(small_model.state_dict())
        patterns = twin.transformer.pattern.weight
        patterns.data[1] = patterns.data[0]
        logits, boxes = run(twin, torch.rand(1, 3, 64, 80, generator=torch.Generator().manual_seed(0)))
        np.testing.assert_allclose(logits[0, :300], logits[0, 300:600], rtol=0, atol=1e-5)
        np.testing.assert_allclose(boxes[0, :300], boxes[0, 300:600], rtol=0, atol=1e-5)
        assert np.abs(logits[0, :300] - logits[0, 600:]).max() > 0.1


class TestBackbone:
    @pytest.mark.parametrize(("dilation", "stride"), [(True, 16), (False, 32)])
    @pytest.mark.parametrize("size", [(16, 33), (97, 131)])
    def test_feature_size(self, dilation: bool, stride: int, size: tuple[int, int]) -> None:
        with torch.device("meta"):
            features = ResNet(50, dilation)(torch.empty(1, 3, *size))
        assert features.shape == (1, 2048, *(math.ceil(side / stride) for side in size))

    def test_only_the_blocks_after_the_first_are_dilated(self) -> None:
        with torch.device("meta"):
            stages = ResNet(101, dilation=True), ResNet(101, dilation=False)
        dilations = [[block.conv2.dilation[0] for block in net.layer4] for net in stages]
        strides = [[block.conv2.stride[0] for block in net.layer4] for net in stages]
        assert dilations == [[1, 2, 2], [1, 1, 1]]
        assert strides == [[1, 1, 1], [2, 1, 1]]
        assert len(stages[0].layer3) == 23

    def test_frozen_batch_norm_is_batch_norm_in_eval_mode(self, seed: int) -> None:
        frozen = ResNet(50, dilation=True).bn1
        reference = nn.BatchNorm2d(64, eps=1e-5).eval()
        generator = torch.Generator().manual_seed(seed)
        state = {name: 0.5 + torch.rand(64, generator=generator) for name in frozen.state_dict()}
        frozen.load_state_dict(state)
        reference.load_state_dict(state, strict=False)
        x = torch.randn(2, 64, 5, 7, generator=generator)
        # scale and shift are applied in another order: a few units in the last place of values up to 10
        torch.testing.assert_close(frozen(x), reference(x), rtol=1e-5, atol=1e-5)


class TestPositions:
    @pytest.mark.parametrize("features", [128, 256])
    def test_sine_embedding_by_its_formula(self, features: int) -> None:
        positions = np.array([0.0, 0.013, 0.5, 0.99])
        expected = np.empty((4, features))
        for i in range(features):
            angle = positions * 2 * math.pi / 10000 ** (2 * (i // 2) / features)
            expected[:, i] = np.sin(angle) if i % 2 == 0 else np.cos(angle)
        embedded = sine_embedding(torch.from_numpy(positions), features).numpy()
        np.testing.assert_allclose(embedded, expected, rtol=0, atol=1e-12)  # float64

    def test_two_dimensional_embedding_has_y_first(self) -> None:
        x, y = torch.tensor([0.2, 0.4]), torch.tensor([0.7, 0.9])
        embedded = sine_embedding_2d(x, y, 256)
        assert torch.equal(embedded[:, :128], sine_embedding(y, 128))
        assert torch.equal(embedded[:, 128:], sine_embedding(x, 128))

    def test_grid_coordinates_count_the_unpadded_cells(self) -> None:
        mask = torch.zeros(2, 3, 5, dtype=torch.bool)
        mask[1, 2:] = True
        mask[1, :, 4:] = True
        x, y = grid_coordinates(mask, torch.float32)
        torch.testing.assert_close(x[0], torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]))
        torch.testing.assert_close(y[1], torch.tensor([0.25, 0.75, 0.75]))
        torch.testing.assert_close(x[1], torch.tensor([0.125, 0.375, 0.625, 0.875, 0.875]))

    def test_anchor_grid_has_x_outermost(self) -> None:
        points = anchor_grid(17)
        assert points.shape == (289, 2)
        torch.testing.assert_close(points[1], torch.tensor([0.5 / 17, 1.5 / 17]))
        torch.testing.assert_close(points[17], torch.tensor([1.5 / 17, 0.5 / 17]))

    def test_inverse_sigmoid(self) -> None:
        p = torch.tensor([-0.5, 0.0, 1e-6, 0.3, 1.0, 2.0], dtype=torch.float64)
        expected = torch.tensor([1e-5, 1e-5, 1e-5 / (1 - 1e-6), 0.3 / 0.7, 1e5, 1e5], dtype=torch.float64).log()
        torch.testing.assert_close(inverse_sigmoid(p), expected)

    @pytest.mark.parametrize("stride", [16, 32])
    def test_mask_is_resized_as_torch_does(self, stride: int) -> None:
        """For every size, by a mask that tells each source index apart from the next."""
        for size in range(stride, 1345, 7):
            cells = math.ceil(size / stride)
            mask = torch.arange(size).bitwise_right_shift(torch.arange(11)[:, None]).bitwise_and(1).bool()[:, None]
            expected = F.interpolate(mask.float()[:, None], size=(1, cells))[:, 0].bool()
            assert torch.equal(feature_mask(mask, 1, cells), expected), size


def attended(module: RowColumnAttention, inputs: dict[str, np.ndarray], mask: np.ndarray) -> np.ndarray:
    """Row-column decoupled attention by its definition, with loops over images, heads and queries, in float64."""
    weight, bias = (p.detach().numpy() for p in (module.in_proj_weight, module.in_proj_bias))
    c = weight.shape[1]
    names = ("row_query", "column_query", "row_key", "column_key", "value")
    p = {n: inputs[n] @ weight[i * c : (i + 1) * c].T + bias[i * c : (i + 1) * c] for i, n in enumerate(names)}
    output = np.empty_like(p["row_query"])
    for n, head in np.ndindex(len(output), module.heads):
        d = slice(head * c // module.heads, (head + 1) * c // module.heads)
        row_key, column_key = p["row_key"][n, :, :, d].mean(0), p["column_key"][n, :, :, d].mean(1)
        for q in range(output.shape[1]):
            a_row = softmax(p["row_query"][n, q, d] @ row_key.T / math.sqrt(c // module.heads), mask[n, 0])
            a_column = softmax(p["column_query"][n, q, d] @ column_key.T / math.sqrt(c // module.heads), mask[n, :, 0])
            output[n, q, d] = np.einsum("y,x,yxc->c", a_column, a_row, p["value"][n, :, :, d])
    return output @ module.out_proj.weight.detach().numpy().T + module.out_proj.bias.detach().numpy()


def softmax(scores: np.ndarray, padded: np.ndarray) -> np.ndarray:
    weights = np.where(padded, 0.0, np.exp(scores))
    return weights / weights.sum()


class TestAttention:
    @pytest.mark.parametrize("size", [(3, 5), (5, 3), (4, 4), (1, 6), (6, 1)])
    @pytest.mark.parametrize("order", ["by-shape", "row-first", "column-first"])
    def test_row_column_attention_by_its_definition(self, size: tuple[int, int], order: str, seed: int) -> None:
        h, w = size
        module = randomise(RowColumnAttention(24, 3, order).double(), seed)
        generator = np.random.default_rng(seed)
        shapes = {"row_query": (2, 7, 24), "column_query": (2, 7, 24)}
        shapes |= dict.fromkeys(("row_key", "column_key", "value"), (2, h, w, 24))
        inputs = {name: generator.standard_normal(shape) for name, shape in shapes.items()}
        mask = np.zeros((2, h, w), bool)
        mask[1, (h + 1) // 2 :] = True
        mask[1, :, (w + 1) // 2 :] = True
        rq, cq, rk, ck, v = (torch.from_numpy(inputs[name]) for name in inputs)
        output = module((rq, cq), (rk, ck), v, torch.from_numpy(mask))
        np.testing.assert_allclose(output.detach(), attended(module, inputs, mask), rtol=0, atol=1e-12)  # float64

    def test_multi_head_attention_is_torchs(self, seed: int) -> None:
        ours = randomise(MultiHeadAttention(24, 3).double(), seed)
        reference = nn.MultiheadAttention(24, 3, batch_first=True, dtype=torch.float64)
        reference.load_state_dict(ours.state_dict(), strict=True)
        generator = torch.Generator().manual_seed(seed)
        q = torch.randn(2, 7, 24, generator=generator, dtype=torch.float64)
        k, v = torch.randn(2, 2, 5, 24, generator=generator, dtype=torch.float64)
        padded = torch.tensor([[False] * 5, [False, False, True, True, True]])
        expected, _ = reference(q, k, v, key_padding_mask=padded)
        torch.testing.assert_close(ours(q, k, v, padded), expected, rtol=0, atol=1e-12)


class TestPadBatch:
    def test_pads_right_and_below(self) -> None:
        a, b = torch.ones(3, 4, 6), torch.full((3, 5, 2), 2.0)
        images, mask = pad_batch([a, b])
        assert images.shape == (2, 3, 5, 6)
        assert mask.shape == (2, 5, 6)
        assert images.sum(dim=(1, 2, 3)).tolist() == [72.0, 60.0]
        assert torch.equal(mask[0], torch.tensor([False] * 4 + [True])[:, None].expand(5, 6))
        assert torch.equal(mask[1], torch.tensor([False] * 2 + [True] * 4).expand(5, 6))

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
    def test_a_trace_keeps_its_inputs(self) -> None:
        """In-place copies into a zero tensor would be lost, and the trace would return constants."""

        class Batch(nn.Module):
            def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
                return pad_batch([a, b])

        traced = torch.jit.trace(Batch(), (torch.zeros(3, 4, 6), torch.zeros(3, 5, 2)))
        images, mask = traced(torch.full((3, 4, 6), 7.0), torch.full((3, 5, 2), 8.0))
        assert images.amax(dim=(1, 2, 3)).tolist() == [7.0, 8.0]
        assert mask.sum(dim=(1, 2)).tolist() == [6, 20]

    def test_refuses_what_is_no_image(self) -> None:
        with pytest.raises(InputError, match=r"no image to batch"):
            pad_batch([])
        with pytest.raises(InputError, match=r"\(4, 6\), not \(3, height, width\)"):
            pad_batch([torch.ones(4, 6)])


class TestBadInput:
    @pytest.mark.parametrize(("variant", "hint"), [("r50-dc6", "did you mean 'r50-dc5'"), ("yolo", "known: r101-c5")])
    def test_unknown_variant(self, variant: str, hint: str) -> None:
        with pytest.raises(InputError, match=hint):
            build(variant)

    def test_unknown_option(self) -> None:
        with pytest.raises(InputError, match=r"attention is 'flash'; choose one of 'RCDA', 'nn.MultiheadAttention'"):
            AnchorDETRConfig(attention="flash")

    def test_side_below_the_stride(self, small_model: AnchorDETR) -> None:
        with pytest.raises(InputError, match=r"1x3x64x15 is too small for this variant's stride of 16"):
            small_model(torch.zeros(1, 3, 64, 15))
        run(small_model, torch.zeros(1, 3, 16, 16))

    @pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (0, 3, 64, 64)])
    def test_shape_of_images(self, small_model: AnchorDETR, shape: tuple[int, ...]) -> None:
        with pytest.raises(InputError, match=r"is not Nx3xHxW"):
            small_model(torch.zeros(shape))

    def test_integer_images(self, small_model: AnchorDETR) -> None:
        with pytest.raises(InputError, match=r"torch.uint8; normalise them"):
            small_model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))

    @pytest.mark.parametrize(
        "mask",
        [torch.zeros(1, 64, 64), torch.zeros(1, 64, 63, dtype=torch.bool), torch.zeros(2, 64, 64, dtype=torch.bool)],
    )
    def test_mask_of_other_type_or_shape(self, small_model: AnchorDETR, mask: Tensor) -> None:
        with pytest.raises(InputError, match=r"it must be bool \(1, 64, 64\)"):
            small_model(torch.zeros(1, 3, 64, 64), mask)

    def test_image_that_is_padding_alone(self, small_model: AnchorDETR) -> None:
        mask = torch.zeros(2, 64, 64, dtype=torch.bool)
        mask[1] = True
        with pytest.raises(InputError, match="top left pixel as padding"):
            small_model(torch.zeros(2, 3, 64, 64), mask)

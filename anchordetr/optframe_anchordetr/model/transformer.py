"""Anchor DETR's encoder, decoder and prediction heads."""

import torch
from torch import Tensor, nn

from optframe_anchordetr.config import AnchorDETRConfig
from optframe_anchordetr.model.attention import FlatSpatialAttention, MultiHeadAttention, RowColumnAttention
from optframe_anchordetr.model.positions import (
    anchor_grid,
    grid_coordinates,
    inverse_sigmoid,
    sine_embedding,
    sine_embedding_2d,
)


def _spatial_attention(config: AnchorDETRConfig) -> nn.Module:
    if config.attention == "RCDA":
        return RowColumnAttention(config.channels, config.heads, config.sum_order)
    return FlatSpatialAttention(config.channels, config.heads)


class FeedForward(nn.Module):
    """Linear, ReLU, Linear, residual, norm; keeps the shape (..., C)."""

    def __init__(self, config: AnchorDETRConfig) -> None:
        super().__init__()
        self.linear1 = nn.Linear(config.channels, config.feedforward_channels)
        self.linear2 = nn.Linear(config.feedforward_channels, config.channels)
        self.norm2 = nn.LayerNorm(config.channels)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.norm2(x + self.linear2(self.linear1(x).relu()))
        return output


class EncoderLayer(nn.Module):
    """Spatial self-attention and feed-forward, each followed by residual and norm."""

    def __init__(self, config: AnchorDETRConfig) -> None:
        super().__init__()
        self.self_attn = _spatial_attention(config)
        self.norm1 = nn.LayerNorm(config.channels)
        self.ffn = FeedForward(config)

    def forward(self, src: Tensor, positions: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
        """Map src (N, h, w, C) to the same shape; each of `positions` broadcasts to it."""
        keys = tuple(src + position for position in positions)
        queries = tuple(key.flatten(1, 2) for key in keys)
        attended = self.self_attn(queries, keys, src, mask)
        output: Tensor = self.ffn(self.norm1(src + attended.reshape(src.shape)))
        return output


class DecoderLayer(nn.Module):
    """Self-attention among the queries, spatial cross-attention to the memory, feed-forward; post-norm."""

    def __init__(self, config: AnchorDETRConfig) -> None:
        super().__init__()
        self.cross_attn = _spatial_attention(config)
        self.norm1 = nn.LayerNorm(config.channels)
        self.self_attn = MultiHeadAttention(config.channels, config.heads)
        self.norm2 = nn.LayerNorm(config.channels)  # the first to be applied: the checkpoints' naming
        self.ffn = FeedForward(config)

    def forward(
        self,
        tgt: Tensor,
        anchor_position: Tensor,
        anchor_positions: tuple[Tensor, ...],
        memory: Tensor,
        memory_positions: tuple[Tensor, ...],
        mask: Tensor | None,
    ) -> Tensor:
        """Map tgt (N, Q, C) to the same shape, given memory (N, h, w, C).

        `anchor_position` is the self-attention's embedding of the anchors (1, Q, C), `anchor_positions` and
        `memory_positions` are the cross-attention's.
        """
        placed = tgt + anchor_position
        tgt = self.norm2(tgt + self.self_attn(placed, placed, tgt))
        queries = tuple(tgt + position for position in anchor_positions)
        keys = tuple(memory + position for position in memory_positions)
        tgt = self.norm1(tgt + self.cross_attn(queries, keys, memory, mask))
        output: Tensor = self.ffn(tgt)
        return output


class BoxHead(nn.Module):
    """Three linear layers with ReLU between: (..., C) to (..., 4)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(channels, width) for width in (channels, channels, 4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layers[1](self.layers[0](x).relu()).relu()
        output: Tensor = self.layers[2](hidden)
        return output


class Transformer(nn.Module):
    """From projected features to class logits and boxes."""

    grid: Tensor

    def __init__(self, config: AnchorDETRConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder_layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.decoder_layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.pattern = nn.Embedding(config.patterns, config.channels)
        if config.spatial_prior == "learned":
            self.position = nn.Embedding(config.anchors, 2)
            nn.init.uniform_(self.position.weight)
        else:
            self.register_buffer("grid", anchor_grid(config.grid_steps), persistent=False)
        self.adapt_pos2d = _position_adapter(config.channels)
        self.adapt_pos1d = _position_adapter(config.channels)
        # The checkpoints list one shared head for each decoder layer.
        self.class_embed = nn.ModuleList([nn.Linear(config.channels, config.classes)] * config.decoder_layers)
        self.bbox_embed = nn.ModuleList([BoxHead(config.channels)] * config.decoder_layers)

    def forward(self, features: Tensor, cells: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return logits (N, Q, classes) and boxes (N, Q, 4), (cx, cy, w, h) in [0, 1], of features (N, C, h, w).

        `cells` (N, h, w) is True on padding and sets the positions; `mask` is the same, or None where nothing is
        padded, and keeps attention from padded cells.
        """
        anchors = self._anchors()
        memory_positions = self._positions(*grid_coordinates(cells, features.dtype))
        memory = features.permute(0, 2, 3, 1)
        for layer in self.encoder_layers:
            memory = layer(memory, memory_positions, mask)
        tgt = self._decode(anchors, memory, memory_positions, mask)
        return self._predict(tgt, anchors)

    def _anchors(self) -> Tensor:
        """Return the queries' anchor points (Q, 2), pattern-major."""
        points = self.position.weight if self.config.spatial_prior == "learned" else self.grid
        return points.repeat(self.config.patterns, 1)

    def _positions(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """Embed cells at x (N, w) and y (N, h): tensors that broadcast to (N, h, w, C)."""
        x, y = x.unsqueeze(1), y.unsqueeze(2)
        if self.config.attention == "RCDA":
            return self._embed_1d(x), self._embed_1d(y)
        return (self._embed_2d(x.expand(-1, y.shape[1], -1), y.expand(-1, -1, x.shape[2])),)

    def _embed_1d(self, position: Tensor) -> Tensor:
        embedded: Tensor = self.adapt_pos1d(sine_embedding(position, self.config.channels))
        return embedded

    def _embed_2d(self, x: Tensor, y: Tensor) -> Tensor:
        embedded: Tensor = self.adapt_pos2d(sine_embedding_2d(x, y, self.config.channels))
        return embedded

    def _decode(
        self, anchors: Tensor, memory: Tensor, memory_positions: tuple[Tensor, ...], mask: Tensor | None
    ) -> Tensor:
        """Return the last decoder layer's queries (N, Q, C)."""
        x, y = anchors.unsqueeze(0).unbind(-1)
        joint = self._embed_2d(x, y)
        separate = (self._embed_1d(x), self._embed_1d(y)) if self.config.attention == "RCDA" else (joint,)
        points = self.config.queries // self.config.patterns
        tgt = self.pattern.weight.repeat_interleave(points, dim=0).expand(memory.shape[0], -1, -1)
        for layer in self.decoder_layers:
            tgt = layer(tgt, joint, separate, memory, memory_positions, mask)
        return tgt

    def _predict(self, tgt: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        centre = inverse_sigmoid(anchors)
        reference = torch.cat((centre, torch.zeros_like(centre)), dim=-1)
        return self.class_embed[-1](tgt), (self.bbox_embed[-1](tgt) + reference).sigmoid()


def _position_adapter(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, channels))

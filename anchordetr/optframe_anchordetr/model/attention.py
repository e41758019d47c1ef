"""Row-column decoupled attention and multi-head attention, written out in plain operators.

Neither uses `scaled_dot_product_attention` nor `nn.MultiheadAttention`'s fast path, so that no exporter chooses a form
for us. Both take their queries and keys as tuples of as many tensors as they have projections: (row, column) for RCDA.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optframe_anchordetr.config import SumOrder

NEGATIVE_INFINITY = float("-inf")


class _ProjectedAttention(nn.Module):
    """The stacked input projections and the output projection that both attentions have."""

    def __init__(self, channels: int, heads: int, projections: int) -> None:
        super().__init__()
        self.channels = channels
        self.heads = heads
        self.scale = (channels // heads) ** -0.5
        self.in_proj_weight = nn.Parameter(torch.empty(projections * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(projections * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def project(self, x: Tensor, index: int) -> Tensor:
        """Apply input projection `index` to x (..., C)."""
        rows = slice(index * self.channels, (index + 1) * self.channels)
        return F.linear(x, self.in_proj_weight[rows], self.in_proj_bias[rows])

    def split_heads(self, x: Tensor) -> Tensor:
        """Bring x (N, L, C) to (N, heads, L, C / heads)."""
        return x.reshape(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)

    def weights(self, query: Tensor, key: Tensor, padded: Tensor | None) -> Tensor:
        """Return the attention (N, heads, L, S) of query (N, L, C) to key (N, S, C); padded (N, S) keys get none."""
        scores = self.split_heads(query * self.scale) @ self.split_heads(key).transpose(2, 3)
        if padded is not None:
            scores = scores.masked_fill(padded[:, None, None], NEGATIVE_INFINITY)
        return scores.softmax(-1)

    def merge_heads(self, x: Tensor) -> Tensor:
        """Bring x (N, heads, L, C / heads) back to (N, L, C), through the output projection."""
        merged: Tensor = self.out_proj(x.transpose(1, 2).flatten(2))
        return merged


class MultiHeadAttention(_ProjectedAttention):
    """`torch.nn.MultiheadAttention` (batch first, no dropout), for query (N, L, C), key and value (N, S, C)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__(channels, heads, projections=3)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, padded: Tensor | None = None) -> Tensor:
        """Return (N, L, C); keys where padded (N, S) is True get no attention."""
        attention = self.weights(self.project(query, 0), self.project(key, 1), padded)
        return self.merge_heads(attention @ self.split_heads(self.project(value, 2)))


class FlatSpatialAttention(MultiHeadAttention):
    """Multi-head attention over a feature map's flattened cells."""

    def forward(  # type: ignore[override]
        self, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...], value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attend from queries ((N, L, C),) to keys ((N, h, w, C),) and value (N, h, w, C), padded in mask (N, h, w)."""
        (query,), (key,) = queries, keys
        padded = None if mask is None else mask.flatten(1)
        return super().forward(query, key.flatten(1, 2), value.flatten(1, 2), padded)


class RowColumnAttention(_ProjectedAttention):
    """Row-column decoupled attention: Anchor DETR (arXiv:2109.07107), section 3.4.

    A query's attention to cell (y, x) is the product of its attention to column y and to row x, each from keys averaged
    over the other axis, so that no weight of size h * w is ever made.
    """

    def __init__(self, channels: int, heads: int, sum_order: SumOrder) -> None:
        super().__init__(channels, heads, projections=5)
        self.sum_order = sum_order

    def forward(
        self, queries: tuple[Tensor, ...], keys: tuple[Tensor, ...], value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attend from (row, column) queries (N, L, C) to (row, column) keys and value (N, h, w, C).

        Returns (N, L, C). Cells whose column's first or row's first cell is True in mask (N, h, w) get no attention;
        the keys' averages do include them, as in the original.
        """
        row_query, column_query = queries
        row_key, column_key = keys
        padded_x, padded_y = (None, None) if mask is None else (mask[:, 0, :], mask[:, :, 0])
        row = self.weights(self.project(row_query, 0), self.project(row_key, 2).mean(1), padded_x)
        column = self.weights(self.project(column_query, 1), self.project(column_key, 3).mean(2), padded_y)
        return self.merge_heads(self._weighted_sum(row, column, self.project(value, 4)))

    def _weighted_sum(self, row: Tensor, column: Tensor, value: Tensor) -> Tensor:
        n, h, w, _ = value.shape
        value = value.reshape(n, h, w, self.heads, -1)
        row_first = h < w if self.sum_order == "by-shape" else self.sum_order == "row-first"
        if row_first:
            return _sum_twice(row, column, value.permute(0, 3, 2, 1, 4))
        return _sum_twice(column, row, value.permute(0, 3, 1, 2, 4))


def _sum_twice(first: Tensor, second: Tensor, value: Tensor) -> Tensor:
    """Sum value (N, heads, A, B, D) over A with weights first (N, heads, L, A), then over B with second (.., L, B)."""
    n, heads, a, b, d = value.shape
    partial = first @ value.reshape(n, heads, a, b * d)
    partial = partial.reshape(n, heads, -1, b, d)
    return (second.unsqueeze(3) @ partial).squeeze(3)

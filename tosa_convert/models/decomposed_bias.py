"""Decomposed relative positions (MViTv2, arXiv 2112.01526, section 4.1): what a query adds to its logits for each row
and for each column of the keys."""

import torch
import torch.nn.functional as F

from tosa_convert.methods.token_ops import gather_tokens


def decomposed_bias(
    queries: torch.Tensor, by_row: torch.Tensor, by_column: torch.Tensor, places: torch.Tensor, grid: tuple[int, int]
) -> torch.Tensor:
    """Queries (B, H, K, D) of the tokens at some places (B, K) of a grid → (B, H, K, K), what is added to their logits.

    Args:
        by_row, by_column: (2 · side − 1, D), embeddings of the distances from key to query, of a grid of any size.
    """
    heads, count = queries.shape[1], queries.shape[2]
    rows, columns = places // grid[1], places % grid[1]
    summed = _of_keys(queries, by_row, rows, grid[0]) + _of_keys(queries, by_column, columns, grid[1])
    return summed.unflatten(2, (heads, count)).permute(0, 2, 3, 1)


def _of_keys(queries: torch.Tensor, distances: torch.Tensor, lines: torch.Tensor, side: int) -> torch.Tensor:
    """(B, H, K, D), and the row or column (B, K) of each token → (B, K keys, H · K queries)."""
    batch, count = lines.shape
    table = _table(distances, side)
    mine = table.flatten(1).index_select(0, lines.reshape(-1)).reshape(batch, count, side, -1)  # of each query
    added = torch.einsum("bhkd,bksd->bshk", queries, mine)
    return gather_tokens(added.flatten(2), lines)


def _table(distances: torch.Tensor, side: int) -> torch.Tensor:
    """(side of the query, side of the key, D)."""
    wanted = 2 * side - 1
    if distances.shape[0] != wanted:
        distances = F.interpolate(distances.T[None], size=wanted, mode="linear")[0].T
    line = torch.arange(side, device=distances.device)
    return distances[line[:, None] - line[None, :] + side - 1]

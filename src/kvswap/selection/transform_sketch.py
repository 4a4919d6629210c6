"""The sketch that kvswap uses: a transform code of keys, with more bits for the directions that matter for logits.

A sketch has to give the product of a key with a query. So the directions are the principal components of the centred
keys under the metric of the calibration's queries. The error of a direction then counts as much as its variance. Bits
go where they lower the error most: reverse water-filling, as in any transform code (Goyal, "Theoretical foundations of
transform coding", 2001). The calibration fixes the quantiser's steps, so a token needs no scale; larger keys are
clipped. The mean of the keys and the middle of the codes are left out: they shift all logits of a head by the same
amount, and a softmax does not change with that.

Codes are made of digits of 2 or 4 bits. A code of several digits is stored as several rows, and the row of the k-th
digit has ``2 ** (bits * k)`` times the weight. So one kernel scores any mix of precisions.

Contexts longer than ``FLAT_TOKENS`` are scored in two levels. First every token gets a coarse score, from the few bytes
that hold the directions of most weight; the score of a tile of 64 tokens is that of its best token. Then the tokens of
the best tiles, and of an incomplete last tile, are scored in full.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from kvswap.native import loops, query_loops
from kvswap.native.step_loops import Sketch
from kvswap.selection.basis import TRANSFORM, Basis, KeyCovariance
from kvswap.selection.score import float_products, integer_products
from kvswap.selection.sketch import LayerSketch

# For a Gaussian of variance 1, by bits: error of the best uniform quantiser, and its step (Max, 1960).
ERRORS = {0: 1.0, 2: 0.1188, 4: 0.01154, 6: 0.00104, 8: 0.000090}
STEPS = {2: 0.9957, 4: 0.3352, 6: 0.1041, 8: 0.0308}
FLAT_TOKENS = 65536  # up to here all tokens are scored in full at each step
FINE_TOKENS = 32768  # how many are scored in full in a longer context
COARSE_SHARE = 8  # coarse scores use one in so many of a token's bytes: the first, with most weight
SMALLEST_QUERY = 1e-3  # least weight of a direction, relative to the largest, though calibration had no such query


def transform_basis(statistics: KeyCovariance, rows: int, bits: int) -> Basis:
    """A basis of ``rows`` digits of ``bits`` (2 or 4) for each token.

    Its matrix ``[2 * D, rows]`` float16 holds two: the one that encodes keys and the one that projects queries, each
    column up to a scale. Its rows ``[5, rows]`` are those two scales, the projected mean of the keys, the bits of the
    whole code, and which digit of it this is.
    """
    root, inverse = _roots(statistics.queries)
    mean = statistics.total / max(1, statistics.count)
    centred = statistics.matrix / max(1, statistics.count) - torch.outer(mean, mean)
    variances, vectors = torch.linalg.eigh(root @ centred @ root)
    variances = variances.clamp(min=max(1e-12 * float(variances[-1]), 1e-20))
    directions, digits = _allocate(variances, rows, bits)
    whole = bits * torch.bincount(directions, minlength=len(variances))[directions]
    order = _by_weight(variances[directions].sqrt() * torch.exp2(bits * digits - whole), 8 // bits)
    directions, digits, whole = directions[order], digits[order], whole[order]
    steps = torch.tensor([STEPS[int(each)] for each in whole], dtype=torch.float64) * variances[directions].sqrt()
    encode = (root @ vectors)[:, directions] / steps
    decode = (inverse @ vectors)[:, directions] * steps * 2.0 ** (bits * digits)
    halves = [_half(each) for each in (encode, decode)]
    (rounded, scale), (_, query_scale) = halves
    shares = torch.stack((scale, query_scale, mean @ (rounded.double() * scale), whole.double(), digits.double()))
    return Basis(torch.cat([matrix for matrix, _ in halves]), TRANSFORM, shares.float())


def full_precision_basis(matrix: torch.Tensor) -> Basis:
    """A basis from ``[2 * D + 3, rows]`` float32, as sessions of version 1 store it, without scales of columns."""
    encode, decode = matrix[:-3].double().chunk(2)
    halves = [_half(each) for each in (encode, decode)]
    shares = torch.cat((torch.stack([scale for _, scale in halves]).float(), matrix[-3:]))
    return Basis(torch.cat([rounded for rounded, _ in halves]), TRANSFORM, shares)


def _half(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A float64 matrix as float16 with a scale for each column, which makes its largest element one."""
    scale = matrix.abs().amax(0).clamp(min=1e-30)
    return (matrix / scale).half(), scale


def basis_bytes(elements: int, rows: int) -> int:
    """Bytes of a basis for keys of D elements."""
    return 2 * elements * rows * 2 + 5 * rows * 4


def _allocate(variances: torch.Tensor, rows: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Spend ``rows`` digits where they lower the error most: direction and digit (0 is the finest) of each row."""
    levels = [ERRORS[each] for each in range(0, 9, bits)]
    gains = variances[:, None] * -torch.diff(torch.tensor(levels, dtype=torch.float64))
    best = gains.flatten().topk(min(rows, gains.numel())).indices.sort().values
    return best // gains.shape[1], best % gains.shape[1]  # gains fall with each digit, so a code has its first digits


def _by_weight(weights: torch.Tensor, parts: int) -> torch.Tensor:
    """Order of rows so that those of most weight share the first bytes of a packed token.

    Row ``k * n + r`` is in the k-th of ``parts`` of byte r of n. Coarse scores read a few bytes of each token.
    """
    order = weights.argsort(descending=True, stable=True)
    if len(order) % parts:
        return order
    interleaved: torch.Tensor = order.view(-1, parts).T.flatten()
    return interleaved


def _roots(queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Square root of the query moments ``[H_kv, d, d]`` as one ``[D, D]``, and its inverse."""
    roots, inverses = [], []
    for moments in queries:
        values, vectors = torch.linalg.eigh(moments)
        values = values.clamp(min=max(SMALLEST_QUERY * float(values[-1]), 1e-30)).sqrt()
        roots.append((vectors * values) @ vectors.T)
        inverses.append((vectors / values) @ vectors.T)
    return torch.block_diag(*roots), torch.block_diag(*inverses)


class TransformSketch(LayerSketch):
    """``LayerSketch`` with a transform code. Its logits lack a constant for each head; no scales are stored."""

    scale_rows = 0

    def __init__(self, *, basis: Basis, device: torch.device, **size: int) -> None:
        super().__init__(basis=basis, device=device, **size)
        assert basis.rows is not None
        self._rows = basis.rows.to(device)
        self._compiled: tuple[torch.Tensor, Sketch] | None = None

    @staticmethod
    def token_bytes(rank: int, bits: int) -> int:
        """Bytes of one token of one layer: codes alone."""
        return rank * bits // 8

    @staticmethod
    def scratch_bytes(rank: int, bits: int, heads: int, device: torch.device, group_tokens: int) -> int:
        """Temporary bytes to score one token."""
        if loops.scores_here(bits, group_tokens, device):
            return loops.scratch_token_bytes(heads, group_tokens)
        return LayerSketch.scratch_bytes(rank, bits, heads, device, group_tokens)

    @staticmethod
    def matrices(basis: Basis) -> tuple[torch.Tensor, torch.Tensor]:
        """The matrices that project keys and queries, ``[D, R]`` each, up to a scale of each column."""
        encode, decode = basis.matrix.chunk(2)
        return encode, decode

    def project(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys ``[n, D]`` float32 in units of the finest step, ``[n, R]``."""
        return (keys @ self._matrix.float()).mul_(self._rows[0])

    def group_mass(self, query: torch.Tensor, scaling: float, group_tokens: int) -> torch.Tensor:
        """Estimated attention mass of each group; see the base class."""
        if not loops.scores_here(self.bits, group_tokens, query.device):
            return super().group_mass(query, scaling, group_tokens)
        low_rank = self.low_rank(query, scaling)
        if int(self.tokens.max()) <= FLAT_TOKENS:
            tiles = self._codes.tiles
            return loops.group_mass(tiles, low_rank, self._rows[1], self.bits, self.tokens, group_tokens)
        found = [self._two_levels(b, each, group_tokens) for b, each in enumerate(low_rank)]
        return found[0][None] if len(found) == 1 else pad_sequence(found, batch_first=True)

    def low_rank(self, query: torch.Tensor, scaling: float) -> torch.Tensor:
        """Scaled queries projected; see the base class."""
        if query_loops.computes_here(query):
            return query_loops.project(query, self._by_head, scaling)
        return super().low_rank(query, scaling)

    def _two_levels(self, sequence: int, low_rank: torch.Tensor, group_tokens: int) -> torch.Tensor:
        """Mass of one sequence's groups, ``[N]``; past ``FLAT_TOKENS`` it is 0 outside of the best tiles."""
        codes, tokens = self._codes.tiles[sequence], int(self.tokens[sequence])
        score = partial(loops.group_mass, codes[None], low_rank[None], self._rows[1], self.bits)
        if tokens <= FLAT_TOKENS:
            return score(self.tokens[sequence : sequence + 1], group_tokens)[0]
        tile_tokens, parts = loops.SCORE_TILE_TOKENS, 8 // self.bits
        few = self._coarse_rows
        columns = low_rank.unflatten(1, (parts, -1))[:, :, :few].flatten(1)
        scales = self._rows[1].unflatten(0, (parts, -1))[:, :few].flatten()
        whole, rest = divmod(tokens, tile_tokens)
        coarse = loops.tile_mass(codes[:, :few], columns, scales, self.bits, whole * tile_tokens)
        if bool(coarse.isnan().any()):  # nothing is the best among what compares with nothing
            return torch.full((tokens // group_tokens,), float("nan"))
        best = loops.top_groups(coarse[None], 0, [whole], FINE_TOKENS // tile_tokens)[0]
        tiles = np.append(best, np.full(int(rest > 0), whole))  # an incomplete last tile is always in
        fine = score(self.tokens[sequence : sequence + 1], group_tokens, tiles)[0]
        mass = torch.zeros(whole + (rest > 0), tile_tokens // group_tokens)
        padded = torch.nn.functional.pad(fine, (0, -len(fine) % mass.shape[1]))
        mass[torch.from_numpy(tiles)] = padded.view(len(tiles), -1)
        return mass.flatten()[: tokens // group_tokens]

    def compiled(self, group_tokens: int) -> Sketch | None:
        """What compiled steps score, which stays true until keys are appended; None where nothing compiled can."""
        if not loops.scores_here(self.bits, group_tokens, self._by_head.device):
            return None
        tiles = self._codes.tiles
        if self._compiled is None or self._compiled[0] is not tiles:
            parts = tiles.data_ptr(), *tiles.stride()[:2], *tiles.shape[1:3], self.bits, self._coarse_rows
            addresses = self._by_head.data_ptr(), self._rows[1].data_ptr(), self.tokens.ctypes.data
            self._compiled = tiles, Sketch(*parts, *addresses, FLAT_TOKENS, FINE_TOKENS // loops.SCORE_TILE_TOKENS)
        return self._compiled[1]

    @property
    def _coarse_rows(self) -> int:
        rows = self._codes.tiles.shape[2]
        return min(rows, loops.COARSE_ROWS * self.bits // 8, max(2, rows // COARSE_SHARE))

    def encode(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Digits ``[n, R]`` uint8 of projected keys ``[n, R]``; no scales, ``[0, n]``."""
        mean, bits, digit = self._rows[2:]
        levels = torch.exp2(bits)
        whole = (rows - mean).floor_().add_(levels / 2)
        whole = torch.minimum(whole.clamp_(min=0), levels - 1).to(torch.uint8)
        codes = (whole >> (digit * self.bits).to(torch.uint8)) & ((1 << self.bits) - 1)
        return codes, rows.new_empty(0, len(rows), dtype=torch.float16)

    def products(self, low_rank: torch.Tensor, width: int) -> torch.Tensor:
        """Multiply projected queries ``[B, H_q, R]`` with the first ``width`` quantised keys: ``[B, H_q, width]``."""
        multiply = integer_products if self._integer else float_products
        low_rank = low_rank * self._rows[1]
        pairs = ((query, self._codes.rows(sequence, 0, width)) for sequence, query in enumerate(low_rank))
        return torch.stack([multiply(query, codes, self.bits) for query, codes in pairs])

"""The Triton kernel: x @ weight.T + bias for every format, from the neutral layout. Imports Triton; loaded when needed.

A weight is decoded where it is multiplied: code -> steps (what it means at scale 1) -> steps * scale in float32, as the
reference does, then rounded to the input's dtype. The ways from codes to steps are the functions that `linear` takes as
`to_steps`; nothing else depends on the format.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def linear(
    x,  # [tokens, columns]
    qdata,  # uint8 [rows, row_bytes]: a little-endian stream of codes a row
    scale,  # [ceil(rows / block_rows), groups]
    extra,  # what `to_steps` reads
    bias,  # [rows] or None
    out,  # [tokens, rows]
    tokens,
    rows,
    columns,
    row_bytes,
    groups,
    block_rows,
    block_columns,
    extra_bytes,
    midpoint: tl.constexpr,
    bits: tl.constexpr,
    to_steps: tl.constexpr,
    widen: tl.constexpr,  # multiply in float32: the interpreter has no products of bfloat16
    tile_tokens: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
):
    """One tile of `out`; sums are float32. The grid is (tiles of rows, tiles of tokens)."""
    n = tl.program_id(0).to(tl.int64) * tile_rows + tl.arange(0, tile_rows)
    m = tl.program_id(1).to(tl.int64) * tile_tokens + tl.arange(0, tile_tokens)
    block = n // block_rows
    total = tl.zeros((tile_tokens, tile_rows), tl.float32)
    for start in range(0, columns, tile_columns):
        k = start + tl.arange(0, tile_columns)
        inside = (k < columns)[:, None] & (n < rows)[None, :]
        group = (k // block_columns)[:, None]
        codes = read_codes(qdata + n[None, :] * row_bytes, k[:, None], inside, bits)
        scales = tl.load(scale + block[None, :] * groups + group, inside, other=0.0).to(tl.float32)
        steps = to_steps(codes, extra, block[None, :] * extra_bytes, group, inside, midpoint, bits)
        given = (m < tokens)[:, None] & (k < columns)[None, :]
        inputs = tl.load(x + m[:, None] * columns + k[None, :], given, other=0.0)
        values = (steps * scales).to(inputs.dtype)
        if widen:
            inputs, values = inputs.to(tl.float32), values.to(tl.float32)
        total = tl.dot(inputs, values, total, input_precision="ieee")
    if bias is not None:
        total += tl.load(bias + n, n < rows, other=0.0).to(tl.float32)[None, :]
    kept = (m < tokens)[:, None] & (n < rows)[None, :]
    tl.store(out + m[:, None] * rows + n[None, :], total.to(out.dtype.element_ty), kept)


@triton.jit
def read_codes(row, index, inside, bits: tl.constexpr):
    """The codes number `index` of the packed rows that begin at `row`, int32; 0 where they are not `inside`."""
    bit = index * bits
    byte = row + bit // 8
    word = tl.load(byte, inside, other=0).to(tl.int32)
    if 8 % bits != 0:  # some codes end in the next byte
        word |= tl.load(byte + 1, inside & (bit % 8 + bits > 8), other=0).to(tl.int32) << 8
    return (word >> (bit % 8)) & (2**bits - 1)


# --- from codes to steps, float32; the block's row in `extra` begins `at` so many bytes ---------------------------


@triton.jit
def around_midpoint(codes, extra, at, group, inside, midpoint: tl.constexpr, bits: tl.constexpr):
    """Symmetric integers."""
    return codes.to(tl.float32) - midpoint


@triton.jit
def around_zero_point(codes, extra, at, group, inside, midpoint: tl.constexpr, bits: tl.constexpr):
    """Asymmetric integers: `extra` has the zero points, packed along its rows as codes are."""
    return (codes - read_codes(extra + at, group, inside, bits)).to(tl.float32)


@triton.jit
def from_table(codes, extra, at, group, inside, midpoint: tl.constexpr, bits: tl.constexpr):
    """Small floats: `extra` has the value of every code, float32 [2^bits]. A code outside is 0, whose value is 0."""
    return tl.load(extra + codes)

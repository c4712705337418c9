"""Reads a checkpoint by docs/format.md alone (version 1): every tensor of a folder as float32."""

import json
import struct
from pathlib import Path

import numpy as np

KINDS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1", "I8": "i1"}
SUFFIXES = ("", "_scale", "_tensor_scale", "_row_scale", "_zero_point", "_act_scale", "_act_zero_point")
FLOATS = {"float8": (4, 3), "float8-e5m2": (5, 2), "mxfp4": (2, 1), "mxfp6-e2m3": (2, 3), "mxfp6-e3m2": (3, 2)}
FLOATS |= {"mxfp8": (4, 3), "mxfp8-e5m2": (5, 2), "nvfp4": (2, 1), "float8-2x4": (4, 3)}  # exponent and mantissa bits
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
NF4 += [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
NF4 += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]


def read_codes(rows: np.ndarray, bits: int, length: int) -> np.ndarray:
    stream = np.unpackbits(rows, axis=-1, count=length * bits, bitorder="little")
    return stream.reshape(*rows.shape[:-1], length, bits) @ (1 << np.arange(bits))


def read_sparse_codes(rows: np.ndarray, bits: int, length: int) -> np.ndarray:
    units = np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, -rows.shape[-1] % 5)]).reshape(*rows.shape[:-1], -1, 5)
    places = units[..., :1] >> np.array([0, 2, 4, 6]) & 3
    codes = np.zeros((*units.shape[:-1], 8), dtype=np.int64)
    np.put_along_axis(codes, places + np.array([0, 0, 4, 4]), units[..., 1:].astype(np.int64), -1)
    return codes.reshape(*rows.shape[:-1], -1)[..., :length]


def read_float(codes: np.ndarray, exponent_bits: int, width: int) -> np.ndarray:
    sign, bias = 2 ** (exponent_bits + width), 2 ** (exponent_bits - 1) - 1
    exponent, mantissa = codes % sign >> width, codes % 2**width
    significand = np.where(exponent == 0, mantissa, mantissa + 2**width)
    return np.where(codes & sign, -1.0, 1.0) * np.ldexp(significand, np.maximum(exponent, 1).astype(int) - bias - width)


def read_scales(fqn: str, kind: str, tensors: dict) -> np.ndarray:
    stored = tensors[f"{fqn}_scale"]
    if kind == "float8_e8m0fnu":
        return np.ldexp(np.float32(1), stored.astype(int) - 127)
    if kind == "float8_e4m3fn":
        return read_float(stored, 4, 3).astype(np.float32) * tensors[f"{fqn}_tensor_scale"]
    if kind in ("uint8", "int8"):
        return stored.astype(np.float32) * tensors[f"{fqn}_row_scale"]
    return stored.astype(np.float32)


def read_weight(fqn: str, entry: dict, tensors: dict) -> np.ndarray:
    *_, rows, columns = entry["shape"][:-2] + entry["shape"][-2:][:: -1 if entry["transposed"] else 1]
    bits, across, along = entry["bits"], np.arange(rows) // entry["block"][0], np.arange(columns) // entry["block"][1]
    values = (read_sparse_codes if entry["format"] == "float8-2x4" else read_codes)(tensors[fqn][..., 0], bits, columns)
    if entry["asymmetric"]:
        values = values - read_codes(tensors[f"{fqn}_zero_point"], bits, along[-1] + 1)[..., across[:, None], along]
    elif entry["format"] in FLOATS:
        values = read_float(values, *FLOATS[entry["format"]])
    elif entry["format"].startswith("nf4"):
        values = np.array(NF4)[values]
    else:
        values = values - (0.5 if bits == 1 else 2 ** (bits - 1))
    values = values.astype(np.float32) * read_scales(fqn, entry["scale_dtype"], tensors)[..., across[:, None], along]
    return values.swapaxes(-1, -2) if entry["transposed"] else values


def read(folder: Path) -> dict[str, np.ndarray]:
    entries, tensors = json.loads((folder / "config.json").read_text())["quantization_config"]["weights"], {}
    for data in (path.read_bytes() for path in folder.glob("*.safetensors")):
        start = 8 + struct.unpack("<Q", data[:8])[0]
        for key, about in json.loads(data[8:start]).items():
            if key != "__metadata__":
                kind, (first, last) = about["dtype"], about["data_offsets"]
                array = np.frombuffer(data[start + first : start + last], KINDS[kind]).reshape(about["shape"])
                tensors[key] = (array.astype("<u4") << 16).view("<f4") if kind == "BF16" else array
    taken = {f"{fqn}{suffix}" for fqn in entries for suffix in SUFFIXES}
    plain = {key: array.astype(np.float32) for key, array in tensors.items() if key not in taken}
    return plain | {fqn: read_weight(fqn, entry, tensors) for fqn, entry in entries.items()}

"""Reads a checkpoint by docs/format.md alone (version 1): every tensor of a folder as float32."""

import json
import struct
from pathlib import Path

import numpy as np

KINDS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1"}


def read_codes(rows: np.ndarray, bits: int, length: int) -> np.ndarray:
    stream = np.unpackbits(rows, axis=-1, count=length * bits, bitorder="little")
    return stream.reshape(*rows.shape[:-1], length, bits) @ (1 << np.arange(bits))


def read_float8(codes: np.ndarray, exponent_bits: int) -> np.ndarray:
    width, bias = 7 - exponent_bits, 2 ** (exponent_bits - 1) - 1
    exponent, mantissa = (codes & 127) >> width, codes & (2**width - 1)
    significand = np.where(exponent == 0, mantissa, mantissa + 2**width)
    return np.where(codes & 128, -1.0, 1.0) * np.ldexp(significand, np.maximum(exponent, 1) - bias - width)


def read_weight(fqn: str, entry: dict, tensors: dict) -> np.ndarray:
    *_, rows, columns = entry["shape"][:-2] + entry["shape"][-2:][:: -1 if entry["transposed"] else 1]
    bits, across, along = entry["bits"], np.arange(rows) // entry["block"][0], np.arange(columns) // entry["block"][1]
    values = read_codes(tensors[fqn][..., 0], bits, columns)
    if entry["asymmetric"]:
        values = values - read_codes(tensors[f"{fqn}_zero_point"], bits, along[-1] + 1)[..., across[:, None], along]
    elif entry["format"].startswith("float8"):
        values = read_float8(values, 5 if entry["format"].endswith("e5m2") else 4)
    else:
        values = values - (0.5 if bits == 1 else 2 ** (bits - 1))
    values = values.astype(np.float32) * tensors[f"{fqn}_scale"].astype(np.float32)[..., across[:, None], along]
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
    taken = {f"{fqn}{suffix}" for fqn in entries for suffix in ("", "_scale", "_zero_point")}
    plain = {key: array.astype(np.float32) for key, array in tensors.items() if key not in taken}
    return plain | {fqn: read_weight(fqn, entry, tensors) for fqn, entry in entries.items()}

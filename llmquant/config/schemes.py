"""Schemes: short names of what to do to one weight and the activations that meet it.

Grammar: `none | [<activation>-]<format>[-g<N>|-row|-tensor|-b<N>|-b<R>x<C>][-s8][-sym|-asym]`, a format being a row of
the table (`int4`, `float8`, `float8-e5m2`, ...). What stands before it is said of activations, what follows of the
weight. Without a suffix the format's default holds; `-b<N>` is short for blocks of N rows and N columns, and `-s8`
(behind groups of two to six bits: `int3-g32-s8`) says that scales of groups are codes of eight bits.

An activation is `a8[-g<N>|-token][-sym|-asym]`, `f8[-g<N>|-token|-tensor]`, `s8[-sym|-asym]`, `sf8`, or block floats;
without one, activations stay as they are. `a8` quantizes the input of a product to int8 codes, anew each time:
symmetric in groups of 32 of a token unless it says otherwise (`a8-int4-g32`, `a8-token-asym-int8`). `f8` quantizes it
to float8 (e4m3) numbers, with a scale a token unless it says otherwise (`f8-float8`, `f8-tensor-float8-tensor`,
`f8-g128-float8-b128`). `s8` and `sf8` are their static kin: int8 and float8 with one scale for all inputs, which a
calibration run chose (`s8-int8`, `s8-asym-int8`, `sf8-float8`).

Block floats are the name of an MX format, `<mx>[-floor|-ceil|-even|-rceil]`, or `nvfp4[-tensor|-token]`, before that of
the weight's: `mxfp8-mxfp8`, `mxfp8-e5m2-mxfp8`, `mxfp8-rceil-mxfp4`, `nvfp4-nvfp4`. They take the rule `floor`, and one
float32 scale for all tokens, unless they say otherwise. No suffix is the name of a format, so `mxfp8-e5m2` alone is a
weight.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from llmquant.config.base import QuantConfig, config_of, from_dict, parse_granularity
from llmquant.errors import ConfigError
from llmquant.formats import FORMATS, Format
from llmquant.primitives.dynamic import DEFAULT_GROUP, FLOAT8, INT8, Activation, block_floats
from llmquant.primitives.granularity import Granularity, MappingType, PerTensor, PerToken, PerTokenGroup

_DEFAULT_TOKENS: dict[str, Granularity] = {
    "a8": PerTokenGroup(DEFAULT_GROUP),
    "f8": PerToken(),
    "s8": PerTensor(),
    "sf8": PerTensor(),
}
_STATIC = ("s8", "sf8")


def parse_scheme(scheme: str) -> QuantConfig | None:
    """A scheme as a config; None for `none`. Raises `ConfigError` that says which part is wrong."""
    if scheme == "none":
        return None
    activation, stem = _split_activation(scheme)
    row, rest = _split_stem(stem)
    found = re.fullmatch(r"(?:-(g[0-9]+|row|tensor|b[0-9]+(?:x[0-9]+)?))?(?:-s([0-9]+))?(?:-(sym|asym))?", rest)
    if not found:
        raise ConfigError(
            f"cannot read {rest!r} in scheme {scheme!r}",
            hint=f"{row.name} may be followed by -g<size>, -row, -tensor or -b<size>, then -s8, then -sym or -asym"
            + (f", or, said of activations, by a format: {row.name}-{row.name}" if row.name in block_floats() else ""),
        )
    shared, scale_bits, mapping = found.groups()
    return config_of(
        activation,
        format=row.name,
        granularity=parse_granularity(shared) if shared else None,
        mapping_type=_suffix_mapping(mapping),
        scale_bits=int(scale_bits) if scale_bits else None,
    )


def parse_config(value: str | Mapping[str, Any] | None) -> QuantConfig | None:
    """A scheme, or a mapping of config fields, or None."""
    if value is None:
        return None
    return parse_scheme(value) if isinstance(value, str) else from_dict(value)


def _split_activation(scheme: str) -> tuple[Activation | None, str]:
    """What a scheme says of activations, and the rest, which begins with the format."""
    if not scheme.startswith(tuple(_DEFAULT_TOKENS)):
        return _split_blocks(scheme)
    found = re.fullmatch(r"(a8|f8|s8|sf8)(?:-(g[0-9]+|token|tensor))?(?:-(sym|asym))?-(.*)", scheme)
    if not found:
        raise ConfigError(
            f"cannot read the activations of scheme {scheme!r}",
            hint="a8 may be followed by -g<size> or -token, then -sym or -asym, and a format: a8-int4-g32; "
            "f8 by -g<size>, -token or -tensor, and a format: f8-float8; s8 by -sym or -asym, and a format: s8-int8; "
            "sf8 by a format: sf8-float8",
        )
    prefix, shared, mapping, stem = found.groups()
    dtype = INT8 if prefix in ("a8", "s8") else FLOAT8
    tokens = _token_granularity(shared, prefix)
    return Activation.of(tokens, _suffix_mapping(mapping), dtype, static=prefix in _STATIC), stem


def _split_blocks(scheme: str) -> tuple[Activation | None, str]:
    """The same where activations are block floats: a format of theirs, what is said of it, and another format."""
    names = "|".join(sorted(block_floats(), key=len, reverse=True))
    rules = "|".join({rule: None for row in FORMATS.values() for rule in row.scale_rules})
    found = re.fullmatch(rf"({names})(?:-(token|tensor))?(?:-({rules}))?-(.*)", scheme)
    if not found or not found[4].startswith(tuple(FORMATS)):
        return None, scheme
    name, shared, rule, stem = found.groups()
    if shared is None:
        return Activation.default(name, rule or ""), stem
    return Activation.of(PerToken() if shared == "token" else PerTensor(), dtype=name, scale_rule=rule or ""), stem


def _token_granularity(shared: str | None, prefix: str) -> Granularity:
    named = {"token": PerToken(), "tensor": PerTensor(), None: _DEFAULT_TOKENS[prefix]}
    return named[shared] if shared in named else PerTokenGroup(int(str(shared)[1:]))


def _suffix_mapping(suffix: str | None) -> MappingType:
    return MappingType.ASYMMETRIC if suffix == "asym" else MappingType.SYMMETRIC


def _split_stem(scheme: str) -> tuple[Format, str]:
    """The longest format name that starts the scheme, and the rest."""
    for name in sorted(FORMATS, key=len, reverse=True):
        if scheme == name or scheme.startswith(name + "-"):
            return FORMATS[name], scheme[len(name) :]
    near = difflib.get_close_matches(scheme, ["none", *FORMATS], n=3) or ["none", *FORMATS]
    raise ConfigError(f"unknown scheme {scheme!r}", hint="start with one of " + ", ".join(near))

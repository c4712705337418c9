"""What lowering made of each product of a graph."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class LoweringReport:
    """Every product that could have an int8 weight, under its name: that of its module (FQN).

    Attributes:
        int8: what runs in int8 now, with the kernel that serves it.
        refused: what the graph quantizes and no int8 kernel takes, with the reason: it stays as the graph has it, codes
            that become floats again before a float product.
        floating: what the graph does not quantize.
    """

    int8: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    floating: dict[str, str] = field(default_factory=dict)

    @property
    def kernels(self) -> Counter[str]:
        """How many products each kernel serves."""
        return Counter(self.int8.values())

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} by {kernel}" for kernel, count in sorted(self.kernels.items()))
        lines = [f"{len(self.int8)} products in int8" + (f" ({kinds})" if kinds else "")]
        for title, products in (("quantized, but run as floats", self.refused), ("not quantized", self.floating)):
            if products:
                lines.append(f"{len(products)} {title}:")
                lines += [f"  {name}: {reason}" for name, reason in products.items()]
        return "\n".join(lines)

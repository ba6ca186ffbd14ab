"""What the paper prints, as it prints it; percentages as shares. Ours never stand here."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["DISTANCE", "ESTIMATION_ERROR", "EXPANSION_ERROR", "MODELS", "SPEEDUP"]

MODELS = ("Llama-3-1B", "Llama-3-3B", "Llama-3-8B")

DISTANCE: Mapping[str, tuple[float, ...]] = {
    "lora": (0.0016, 0.0014, 0.0012),
    "qlora": (0.0018, 0.0016, 0.0011),
    "bottleneck": (0.0009, 0.0005, 0.0008),
    "quantised bottleneck": (0.0011, 0.0008, 0.0007),
}
"""table 2: distance of fine-tuned from initial weights over the norm of the model, mean of 50 subsets of 3"""

ESTIMATION_ERROR: Mapping[int, tuple[float, ...]] = {
    200: (0.082, 0.081, 0.070),
    400: (0.047, 0.048, 0.043),
    800: (0.046, 0.044, 0.042),
}
"""table 3: relative error of predicted test accuracy by projection dimension, 50 subsets of 3"""

SPEEDUP = 105.0
"""table 3: FLOPs of fine-tuning over those of estimation"""

EXPANSION_ERROR: Mapping[float, Mapping[str, float]] = {
    0.0005: {"lora": 9.1e-4, "qlora": 1.7e-4, "bottleneck": 8.9e-3, "quantised bottleneck": 7.0e-3},
    0.0010: {"lora": 1.9e-3, "qlora": 5.6e-4, "bottleneck": 1.5e-2, "quantised bottleneck": 1.1e-2},
    0.0015: {"lora": 3.4e-3, "qlora": 1.0e-3, "bottleneck": 2.1e-2, "quantised bottleneck": 1.1e-2},
    0.0020: {"lora": 5.0e-3, "qlora": 2.0e-3, "bottleneck": 2.1e-2, "quantised bottleneck": 1.4e-2},
    0.0025: {"lora": 5.4e-3, "qlora": 2.2e-3, "bottleneck": 7.0e-2, "quantised bottleneck": 1.5e-2},
}
"""table 5, the smallest model: mean squared relative error of the first-order expansion by relative distance"""

"""What the paper prints, as it prints it; percentages as shares. Ours never stand here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = [
    "BEST_RANK",
    "BOOSTING_ERROR",
    "BOOSTING_GAIN",
    "DISTANCE",
    "ENSEMBLE_GAIN",
    "ENSEMBLE_MEMORY",
    "ENSEMBLE_OF_TWO",
    "ESTIMATION_ERROR",
    "EXPANSION_ERROR",
    "FEDERATED",
    "FIGURE_7",
    "MODELS",
    "QUANTISED_SHARPNESS",
    "SPEEDUP",
    "TABLE_4",
    "TABLE_6",
    "TABLE_7",
    "TASKS",
    "WORSE_PAIRS",
    "Printed",
]

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

EXPANSION_LIMIT: Mapping[str, float] = {
    "lora": 0.01,
    "qlora": 0.03,
    "bottleneck": 0.01,
    "quantised bottleneck": 0.03,
}
"""section 2.2 and figure 2: the error is less than this in all cases"""

TASKS = ("boolq", "cb", "copa", "hellaswag", "multirc", "rte", "story_cloze", "wic", "winogrande", "wsc")
"""by the names of our cards"""


@dataclass(frozen=True)
class Printed:
    """One line of a table of accuracies; mean and standard deviation of three seeds.

    Attributes:
        accuracy: By task; table 4 leaves three tasks out.
        average: Over all ten tasks, as printed; the mean of the printed lines is another in places.
        flops: To train it.
        memory_bytes: Of a GPU at inference.
    """

    accuracy: Mapping[str, tuple[float, float]]
    average: tuple[float, float] | None = None
    flops: float | None = None
    memory_bytes: float | None = None


def _line(
    percent: str, average: tuple[float, float] | None = None, flops: float | None = None, gb: float | None = None
) -> Printed:
    """Read a line as it is printed, ``mean±sd`` in per cent for each task; a dash where there is none."""
    cells = [cell.split("±") for cell in percent.split()]
    accuracy = {
        task: (float(cell[0]) / 100, float(cell[1]) / 100)
        for task, cell in zip(TASKS, cells, strict=True)
        if len(cell) == 2
    }
    return Printed(accuracy, average, flops, None if gb is None else gb * 1e9)


TABLE_4: Mapping[str, Printed] = {
    "full": _line("87.6±0.9 93.2±0.7 92.0±1.0 93.2±0.6 86.4±0.2 - 94.2±0.5 - 75.1±0.2 -", (0.846, 0.009), 6.0e19, 73.0),
    "lora": _line("84.5±0.2 87.7±0.8 92.0±2.0 93.4±0.3 82.1±0.2 - 92.9±0.3 - 60.7±0.4 -", (0.816, 0.008), 2.7e19, 21.5),
    "qlora": _line(
        "82.0±0.5 83.7±0.7 90.0±2.0 92.3±0.3 84.2±0.8 - 91.5±0.7 - 55.1±0.3 -", (0.786, 0.012), 4.3e18, 12.6
    ),
    "mtl-ft": _line(
        "89.9±0.2 100±0.0 95.0±0.5 93.9±0.4 89.6±0.1 - 98.0±0.5 - 84.4±0.3 -", (0.894, 0.005), 8.6e18, 39.1
    ),
    "tag": _line("88.5±0.4 100±0.0 94.0±0.5 92.1±0.3 89.1±0.7 - 96.3±0.4 - 80.1±0.8 -", (0.881, 0.008), 4.3e19, 21.4),
    "ours": _line("89.9±0.9 100±0.0 94.0±1.0 93.5±0.3 89.1±0.3 - 97.1±0.1 - 82.0±0.5 -", (0.886, 0.006), 4.7e18, 21.4),
}
"""Llama-3-8B; MTL-FT, TAG and ours on QLoRA. Figure 4 shows the same numbers."""

TABLE_6: Mapping[str, Printed] = {
    "qlora": _line(
        "91.9±0.7 96.2±0.6 90.0±1.0 90.7±0.9 89.5±0.3 84.6±0.4 96.9±0.6 74.2±0.5 76.6±2.4 75.5±1.2",
        (0.869, 0.016),
        1.8e19,
        18.6,
    ),
    "mtl-ft": _line(
        "92.1±0.4 100±0.0 95.0±0.5 96.1±0.9 91.7±0.4 90.7±0.4 98.2±0.9 78.9±0.4 85.1±1.1 82.7±1.5",
        (0.902, 0.008),
        3.7e19,
        65.8,
    ),
    "ours": _line(
        "92.1±0.4 100±0.0 94.0±1.5 94.3±0.4 90.7±0.4 88.0±0.7 98.1±0.8 74.1±0.6 84.3±1.5 76.9±1.4",
        (0.899, 0.009),
        1.9e19,
        47.8,
    ),
}
"""CodeLlama-34B-Instruct, QLoRA"""

TABLE_7: Mapping[str, Printed] = {
    "gradient-cosine": _line(
        "88.0±0.7 100±0.0 92.0±1.0 92.5±0.6 89.1±0.3 83.0±0.2 96.5±0.9 70.3±0.7 81.5±0.9 79.6±0.3"
    ),
    "ours": _line("89.9±0.9 100±0.0 94.0±1.0 93.5±0.3 89.1±0.3 85.7±0.3 97.1±0.1 69.9±0.9 82.0±0.5 79.8±2.2"),
}
"""Llama-3-8B, QLoRA; the text calls grouping by gradients 0.8 % lower, the printed lines differ by 0.85 points"""

FIGURE_7: Mapping[str, Mapping[str, float]] = {
    "shared": {"memory_bytes": 9e9},
    "mtl-ft": {"flops over ours": 1 / (1 - 0.46), "memory_bytes": 43e9},
    "full": {"flops over ours": 1 / (1 - 0.96), "memory_bytes": 19e9 / (1 - 0.74), "accuracy over ours": -0.01},
    "ours": {"flops over shared": 1.08, "memory_bytes": 19e9, "accuracy over shared": 0.09},
}
"""Llama-3-8B, QAdapter, as appendix B.3 tells it: the figure itself has no numbers"""

ENSEMBLE_GAIN: Mapping[str, float] = {"qlora": 0.108, "quantised bottleneck": 0.095}
"""section 2.1: accuracy of ten adapters that go on from one for all, weighted, over that one"""

ENSEMBLE_MEMORY = 4.0
"""section 2.1: memory of a GPU, of those ten over that one"""

BOOSTING_ERROR = 0.18
"""sections 2.3 and 3.3: by how much one step of boosting lowers the training error of its group, relative"""

BOOSTING_GAIN = 0.004
"""section 3.3: average test accuracy across tasks, after that step over before; 2.3 says it of tasks in one group"""

WORSE_PAIRS: Mapping[str, int] = {
    "full": 20,
    "lora": 27,
    "bottleneck": 24,
    "qlora": 33,
    "quantised bottleneck": 35,
}
"""section 2.1: of 45 pairs of tasks, those trained together to worse than apart"""

BEST_RANK = 16
"""section 4: of 4, 16, 64 and 256, the rank of the smallest generalisation gap"""

ENSEMBLE_OF_TWO: Mapping[str, float] = {"gap": -0.44, "trace": -0.74}
"""section 4: generalisation gap and largest trace of two adapters of half the rank each, over those of one"""

QUANTISED_SHARPNESS: Mapping[str, float] = {"gap": -0.34, "trace": -0.51}
"""section 4: generalisation gap and largest trace of QLoRA over LoRA's, RTE and COPA"""

POSITIVE_ALL: Mapping[str, float] = {
    "full": 0.60,
    "lora": 0.40,
    "bottleneck": 0.40,
    "qlora": 0.30,
    "quantised bottleneck": 0.10,
}
"""appendix B.6: rate of positive transfer when all ten tasks are trained together"""

POSITIVE_PAIRS: Mapping[str, float] = {
    "full": 0.56,
    "lora": 0.38,
    "bottleneck": 0.48,
    "qlora": 0.26,
    "quantised bottleneck": 0.22,
}
"""appendix B.6: the same over all 45 pairs"""

POSITIVE_METHODS: Mapping[str, Mapping[str, float]] = {
    "qlora": {"mtl-ft": 0.90, "ours": 0.80},
    "quantised bottleneck": {"mtl-ft": 0.90, "ours": 0.80},
}
"""appendix B.6, figure 11: the same of methods over all ten tasks, as the text tells it"""

FEDERATED: Mapping[str, float] = {
    "loss over global": 1 - 0.09,
    "flops over global": 1.08,
    "flops over mtl-ft": 1 - 0.90,
    "memory over mtl-ft": 1 - 0.91,
}
"""section 3.3, extension: 500 clients, our method over QLoRA for all and over pre-training, then fine-tuning"""

MEMORY_BY_ADAPTERS: Mapping[str, tuple[float, float]] = {
    "lora": (21.5e9, 2.8e9),
    "bottleneck": (21.5e9, 6.5e9),
}
"""appendix B.6: a GPU's memory of one adapter and its base, and of each one more; quantised 53 and 56 % less"""

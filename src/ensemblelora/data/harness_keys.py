"""What a card written for lm-evaluation-harness says beyond the task itself, and why it may be left out here.

The harness names in a card how it reports: metrics, tags, filters, decontamination. None of these changes an example,
so they are passed over. What would change one is not: a function of the harness's own, or examples in front of the
question.
"""

from __future__ import annotations

import re
from typing import Any

from ensemblelora.errors import DataError

__all__ = ["drop_report_keys", "quote_functions"]

_CALL = re.compile(r"""(?m)(?<=[:\-\[,] )!function\s+["']?([\w.]+)["']?""")
_MARK = "!function "
_REPORT_KEYS = frozenset(
    {
        "tag",
        "task_alias",
        "metric_list",
        "should_decontaminate",
        "doc_to_decontamination_query",
        "fewshot_split",
        "fewshot_config",
        "fewshot_delimiter",
        "generation_kwargs",
        "filter_list",
        "repeats",
        "process_results",
    }
)


def quote_functions(text: str) -> str:
    """Turn the harness's function tags into texts, so that the rest of a card can be read as plain YAML.

    Example:
        >>> quote_functions("aggregation: !function utils.mean")
        'aggregation: "!function utils.mean"'
    """
    return _CALL.sub(rf'"{_MARK}\1"', text)


def drop_report_keys(values: dict[str, Any], source: str) -> dict[str, Any]:
    """Leave out what only tells the harness how to report.

    Args:
        values: A card's keys.
        source: The card, for messages.

    Raises:
        DataError: If a key that is left calls a function, or there are to be examples in front of the question.
    """
    kept = {key: value for key, value in values.items() if key not in _REPORT_KEYS}
    calls = [f"{key} calls {value.removeprefix(_MARK)}" for key, value in kept.items() if _is_call(value)]
    if calls:
        raise DataError(
            f"card {source}: {', '.join(calls)}; a card is data and can't call functions: write a Jinja template, or "
            "prepare the rows in a file"
        )
    if kept.pop("num_fewshot", 0):
        raise DataError(f"card {source}: num_fewshot {values['num_fewshot']}: questions stand alone here; set it to 0")
    return kept


def _is_call(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_is_call, value.values()))
    if isinstance(value, list):
        return any(map(_is_call, value))
    return isinstance(value, str) and value.startswith(_MARK)

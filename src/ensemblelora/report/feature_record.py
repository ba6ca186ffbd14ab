"""feature_health.json: what was kept of every gradient, how exactly, and the sentence that says so."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from ensemblelora.report.wording import format_percent

__all__ = ["FeatureRecord", "describe_features"]

_EXPECTED_MEDIAN = 0.67  # of a normal error's size, over its standard deviation


class FeatureRecord(BaseModel):
    """The few values that the report shows; others are passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    n_coordinates: int
    proj_dim: int
    form: Literal["projected", "coordinates", "gram"] = "projected"
    projection_error: float | None = None
    n_rows: int | None = None
    n_rows_taken: int | None = None


def describe_features(record: FeatureRecord) -> str:
    """Say in a few sentences what the predictions were made from.

    Example:
        >>> describe_features(FeatureRecord(n_coordinates=4096, proj_dim=400, projection_error=0.034))[-65:]
        'a random projection to 400 numbers is expected to be off by 3.4%.'
    """
    text = _describe_form(record)
    if record.n_rows is None or record.n_rows_taken is None or record.n_rows_taken == record.n_rows:
        return text
    return f"{text} They were taken of {record.n_rows_taken:,} of {record.n_rows:,} rows, which stand for all."


def _describe_form(record: FeatureRecord) -> str:
    full, kept = f"{record.n_coordinates:,} numbers", f"{record.proj_dim:,}"
    error = None if record.projection_error is None else format_percent(record.projection_error)
    if record.form == "coordinates":
        return f"The predictions were made from all {full} of each gradient."
    if record.form == "gram":
        text = f"Of gradients of {full}, all inner products were kept, in {kept} numbers each."
        return text if error is None else f"{text} They are off by {error} of the two lengths' product in the median."
    text = f"Gradients of {full} were projected to {kept} at random."
    if error is None:
        return text
    return (
        f"{text} The inner product of two, on which predictions rest, is then off by {error} of their lengths' product "
        f"in the median; a random projection to {kept} numbers is expected to be off by "
        f"{format_percent(_EXPECTED_MEDIAN / record.proj_dim**0.5)}."
    )

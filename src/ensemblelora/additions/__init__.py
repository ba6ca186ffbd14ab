"""Datasets that come and go after a run: one is added, dropped, or its rows change, and the rest is kept.

In: a finished run's folder, a card or data file. Out: a new run folder in which everything that the change does not
touch was carried over, and a record of where the dataset belongs, why, and what that cost beside a full rerun. The
earlier run is only read.

:mod:`.source` reads the earlier run, :mod:`.options` predicts where a dataset belongs, :mod:`.carry` takes over what
stays, :mod:`.costs` keeps the books, :mod:`.outcome` is what is handed back, and :mod:`.change` is the main path.
"""

from __future__ import annotations

from ensemblelora.additions.change import add_task, drop_task, update_task
from ensemblelora.additions.options import Option
from ensemblelora.additions.outcome import Change, Outcome

__all__ = ["Change", "Option", "Outcome", "add_task", "drop_task", "update_task"]

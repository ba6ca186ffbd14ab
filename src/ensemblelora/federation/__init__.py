"""Clients whose texts stay with them: which of them to train together, and federated averaging inside each group.

:mod:`.clients` and :mod:`.rows` turn texts into rows; :mod:`.protocol` says what server and clients tell each other.
A client answers with :mod:`.answers`, from what :mod:`.worker` holds; the server asks through :mod:`.exchange`, and
:mod:`.server` is its main path. :mod:`.engines` brings them together, in one process, in Flower's simulation, or
between SuperNodes and a SuperLink (:mod:`.apps`). Only that module and :mod:`.transport` know Flower.
"""

from __future__ import annotations

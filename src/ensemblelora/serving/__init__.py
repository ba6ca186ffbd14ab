"""A run behind HTTP: ``POST /predict``, ``/tasks``, ``/health``, ``/metrics``, ``/openapi.json``.

:mod:`.server` is the process: socket, signals, the line that says it is ready. :mod:`.app` is what it answers.
:mod:`.batching` lets requests that come together share forward passes, and refuses what there is no room for.
:mod:`.limits` says how much is room. Needs the extra ``serve``.
"""

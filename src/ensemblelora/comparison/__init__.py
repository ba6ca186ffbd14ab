"""Every way to fine-tune on many datasets, under one budget, on the same rows and seeds, in one table.

A method (:mod:`.methods`) takes a :class:`~.pool.Pool`, one seed's rows, model and trained adapters, and returns a
:class:`~.candidate.Candidate`: how it scores rows, and what it cost. Adapters that several methods need are trained
once and charged to each. Test rows are scored when everything about a method is settled, and never before.
"""

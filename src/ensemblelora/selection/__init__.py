"""Which sources help one target: datasets, or parts of them, to fine-tune on beside the target's own rows (GradEx).

Open :mod:`.select` first. The searches (:mod:`.search`, :mod:`.values`) need a finished feature store alone, no model.
"""

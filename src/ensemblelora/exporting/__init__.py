"""From a finished run to files that other software loads, and what that costs on the run's validation rows.

``peft``: every member as a plain PEFT folder, with the weights; nothing is lost. ``folded``: one LoRA in their place,
each member's change times its weight, at the rank of one adapter. ``merged``: that adapter inside the base weights.
Only LoRA can be folded or merged; members of another kind stay what they are.
An ensemble averages outputs and a fold averages weights. The two agree as far as the model is linear in its adapters,
so the difference is measured, and a fold that hurts is refused before anything is written.
In 16 bits a row's scores depend a little on its batch, so that a loss over few rows is good to about 0.01 nats.

``request`` checks what is asked for, ``fold`` makes one adapter and measures it, ``write`` leaves the files, with the
README that ``notes`` words. ``card`` adds what model hubs read, ``layout`` says whether servers of many adapters can
load a folder, and ``push`` uploads one.
"""

from ensemblelora.exporting.fold import TaskChange
from ensemblelora.exporting.layout import list_layout_faults
from ensemblelora.exporting.request import TOLERANCE, Format
from ensemblelora.exporting.write import Export, export_run

__all__ = ["TOLERANCE", "Export", "Format", "TaskChange", "export_run", "list_layout_faults"]

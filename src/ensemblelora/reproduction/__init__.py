"""The paper's tables with this software's numbers beside the paper's own, from the records of validated runs."""

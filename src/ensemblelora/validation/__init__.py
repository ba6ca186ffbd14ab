"""How well predicted performance of subsets of tasks agrees with performance after true fine-tuning."""

"""What a step changes and how: the trained parameters and their precision, optimizers, schedule, EMA."""

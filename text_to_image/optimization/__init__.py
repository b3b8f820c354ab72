"""What a step changes and how (parameters, precision, optimizers, schedule, EMA), and the memory it takes."""

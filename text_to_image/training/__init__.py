"""Fine-tuning: the plan, the encodings, the objective, the loop, and what is measured on the way."""

"""Whether generated pictures are copies of the training pictures."""

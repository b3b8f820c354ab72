"""Captions for pictures: captioners, the caption file and its writers, text files, lengths, the --check audit."""

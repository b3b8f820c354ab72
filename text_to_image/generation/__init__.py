"""Prompts to pictures: requests, which weights generate them, the image generator, output files, sheets."""

"""Finds generated pictures that copy training pictures, and measures how varied the others are."""

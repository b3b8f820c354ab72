"""Base models: found, checked, and converted from files of other programs; LoRA files of any program are read."""

"""Pictures to captions: the captioners, the caption file, caption lengths, and the audit behind --check."""

"""Which pictures a folder holds and what captions it has: metadata.jsonl, other tables, sidecars, hub data sets."""

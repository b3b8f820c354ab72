"""The data set: metadata.jsonl, image files, hub data sets, buckets, augmentation, mirroring, captions."""

"""From captioned pictures to what is trained on: buckets, augmentation, mirroring, caption variants."""

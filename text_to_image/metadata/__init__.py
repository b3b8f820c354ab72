"""Which pictures and captions a data set has, in folders, tar shards, parquet files and on the hub."""

"""Training: one engine, one loop, and resume shards that are a resume."""

"""From text to batches: documents, encoding, prepare (text -> shards), loader (shards -> batches)."""

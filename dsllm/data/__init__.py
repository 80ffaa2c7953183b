"""Token shards, their manifest and order, and the batches a rank reads; rank and world size arrive as integers."""

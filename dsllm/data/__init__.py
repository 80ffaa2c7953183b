"""Token shards, their manifest and order, and the batches a rank reads; the data rank and size arrive as integers."""

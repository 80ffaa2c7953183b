"""From sources to token shards: documents, tokenizer, shards, data card."""

"""SentencePiece training and token shards."""

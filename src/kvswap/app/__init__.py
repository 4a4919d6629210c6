"""Text in, text out: a conversation over documents, its statistics, and the quality check."""

"""Groups on disk: their layout, files and segments, and plans of reads."""

"""The method: a prompt and a decode step with the KV cache on disk. Knows neither sessions nor rivals."""

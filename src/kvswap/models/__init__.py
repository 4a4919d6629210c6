"""From a name to a model: loading, GGUF, the hub, the adapter that finds layers, masks, sampling."""

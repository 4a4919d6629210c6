"""Which groups a layer needs: the sketch of the keys, scores by attention mass, the method itself."""

"""Parts that several published methods share: decode paths, slots, and what they keep of the keys."""

"""Speed, memory and agreement of methods beside each other: ``kvswap bench`` and the scale suite."""

"""Compare kvswap with other programs that run the same model file (``kvswap bench --peers``).

Each program runs in a process of its own (``worker``), so that its memory can be told apart. ``run`` gives all of them
the same tokens in turns.
"""

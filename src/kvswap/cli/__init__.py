"""The command line, one file for each command. No logic of its own."""

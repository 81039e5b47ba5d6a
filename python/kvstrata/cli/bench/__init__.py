"""The benches of the command line."""

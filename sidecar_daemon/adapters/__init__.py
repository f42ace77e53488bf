"""The outside world, one folder a neighbour. Adapters do not import one another."""

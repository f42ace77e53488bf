"""Benchmarks: runnable modules that print one JSON object. No part of the test suite."""

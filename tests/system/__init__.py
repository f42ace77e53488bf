"""Tests that need a tool from the operating system: ``make test-system``. A missing tool fails, with how to get it."""

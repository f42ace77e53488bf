"""Tests: unit, contract, integration; torture and bench run on their own."""

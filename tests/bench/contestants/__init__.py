"""Processes that are measured. Each reads one JSON object a line and answers with one; see ``wire``."""

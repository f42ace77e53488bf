"""Contract suites: what every implementation must do."""

"""Pure rules: nouns, outcomes, batching, windows, retry and errors. No I/O, no third party but numpy."""

"""The model: manifests, fetching, export to ONNX, tokenizer, session and pooling."""

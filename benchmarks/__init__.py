"""Speed of fusedrnn beside torch.nn and onnxruntime: run ``python -m benchmarks --help``."""

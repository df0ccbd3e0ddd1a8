"""A small config.yaml, of the workflow's tests and of the fuzzer."""

CONFIG = {
    "models": "config/models.yaml",
    "recipes": "config/recipes.yaml",
    "matrix": [{"model": "tiny", "recipes": ["fp32", "bf16"]}, {"model": "other", "recipes": ["fp32"]}],
    "build": {
        "engines": ["portable"],
        "max_batch_size": 4,
        "max_input_len": 1024,
        "max_output_len": 8,
        "extrapolate_positions": False,
        "remove_input_padding": True,
        "compute_capabilities": ["8.9"],
    },
    "evaluation": {
        "runtime": "portable",
        "device": "cpu",
        "baseline_dtype": "float32",
        "dataset": {"name": "trtbuild-news", "split": "evaluation", "samples": 2},
        "prompt": "{article}",
        "chat": True,
        "max_output_len": 8,
    },
    "benchmark": {"batch_size": 1, "input_len": 8, "output_len": 4, "repeats": 1},
}

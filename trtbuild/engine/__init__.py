"""Engines: the portable one and TensorRT's, both made from one network, and the interpreter that compares them."""

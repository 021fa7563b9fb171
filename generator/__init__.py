"""The generator: text to image ids.

model.py is the transformer, engine.py decodes with a KV cache, sampling.py decides on ids, train.py trains.
"""

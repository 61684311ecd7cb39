"""A zoo of trained models: folders of a manifest, weights as a GGUF file, tokenizer and card, checked by their hashes.

`manifest` says what a model's folder holds, `store` finds the folder that `zoo:NAME` means, `transfer` copies models
from and to other places, `add` makes a folder from a run, `card` writes its Markdown. No file of a zoo is a pickle.
"""

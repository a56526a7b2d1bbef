"""Trunks of other libraries: weights from Transformers' folders, and back into them. `trunk.py` is the way in."""

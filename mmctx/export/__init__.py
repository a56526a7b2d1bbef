"""Parts of a model as graphs that other programs run."""

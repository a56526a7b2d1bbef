"""What embeds the parts of a store: a checkpoint's similarity head, or models of Transformers and open_clip."""

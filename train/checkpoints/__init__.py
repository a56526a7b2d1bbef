"""Checkpoints: written whole or not at all, read only when whole.

    runs/NAME/checkpoint-1000/   config.json model.safetensors, the tokenizer's files and those of `mmctx.hf_files`: a Transformers model
        trainer/                 trainer_state.json, optimizer/*.safetensors
        manifest.json            size and hash of each file
        COMPLETE                 hash of the manifest; written last
    runs/NAME/latest             symbolic link to the newest

Follow one from the step to the disk: `saver` copies tensors (`snapshot`), a thread of its own (`writer`) writes files (`write`), seals them
(`manifest`), renames the folder (`layout`) and deletes what `retention` does not keep. On the way back, `layout` finds the newest whole
one, `same_run` compares configurations, `load` and `optimizer_state` read tensors. Where processes hold parts of them, `sharded` does both.
"""

"""Our models as Transformers models. Importing this package tells Transformers' Auto classes of them.

import mmctx.hf
from transformers import AutoModelForCausalLM, AutoProcessor

model = AutoModelForCausalLM.from_pretrained("runs/demo/latest")
processor = AutoProcessor.from_pretrained("runs/demo/latest")
"""

from __future__ import annotations

import transformers
from transformers import AutoConfig, AutoProcessor

from mmctx.hf.config import MmctxConfig
from mmctx.hf.model import MmctxForConditionalGeneration
from mmctx.hf.processor import MmctxProcessor
from mmctx.hf_files import AUTO_MAP, MODEL_TYPE

AutoConfig.register(MODEL_TYPE, MmctxConfig, exist_ok=True)
for name, reference in AUTO_MAP.items():
    if reference.endswith(MmctxForConditionalGeneration.__name__):
        getattr(transformers, name).register(MmctxConfig, MmctxForConditionalGeneration, exist_ok=True)
AutoProcessor.register(MmctxConfig, MmctxProcessor, exist_ok=True)

__all__ = ["MmctxConfig", "MmctxForConditionalGeneration", "MmctxProcessor"]

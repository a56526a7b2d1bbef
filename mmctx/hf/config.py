"""`MmctxConfig`: the shape of a model, its objectives and the ids of its special tokens, as Transformers keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from transformers import PreTrainedConfig

from mmctx.hf_files import AUTO_MAP, MODEL_TYPE, MODELING, MODELING_SOURCE, special_tokens
from mmctx.model import ModelConfig
from mmctx.objectives import AnyObjective

_OBJECTIVES = TypeAdapter(dict[str, AnyObjective])
_DERIVED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "tie_word_embeddings",
)
"""What others ask a config by the names of Llama; all of it follows from `model`."""


class MmctxConfig(PreTrainedConfig):
    """Of a model with or without a run.

    Args:
        vocab_size: ids that the tokenizer knows; the embedding has as many rows, rounded up.
        model: a `ModelConfig`, or its tree.
        objectives: by name; those that own parameters (similarity, next sentence) are part of the model.
        special_tokens: ids by what they stand for: `image`, `audio`, `mask`, `embed`, `eos`, and `bos` where documents begin
            with it. Media, masks and embeddings need theirs.
        max_position_embeddings: longest document that the model was trained on, for whoever cuts texts to what a model reads.
        run: the configuration of the run that trained it, which knows the rest.

    Raises:
        pydantic.ValidationError: a tree has an unknown key or a wrong value.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        vocab_size: int = 64,
        model: ModelConfig | Mapping[str, Any] | None = None,
        objectives: Mapping[str, AnyObjective | Mapping[str, Any]] | None = None,
        special_tokens: Mapping[str, int] | None = None,
        max_position_embeddings: int | None = None,
        run: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        run = dict(run) if run is not None else None
        if run is not None and model is None:  # a checkpoint of an earlier version
            model, objectives = run["model"], run["objectives"]
        if run is not None and max_position_embeddings is None:
            max_position_embeddings = run["data"]["context_length"]
        self.model = ModelConfig.model_validate({} if model is None else model).model_dump(mode="json")
        self.objectives = _OBJECTIVES.dump_python(_OBJECTIVES.validate_python(dict(objectives or {})), mode="json")
        self.vocab_size, self.run = vocab_size, run
        self.special_tokens = dict(special_tokens or {})
        self.max_position_embeddings = max_position_embeddings
        kwargs = {"auto_map": AUTO_MAP} | {key: value for key, value in kwargs.items() if key not in _DERIVED}
        super().__init__(**kwargs)

    @property
    def shape(self) -> ModelConfig:
        """Of trunk and encoders."""
        return ModelConfig.model_validate(self.model)

    @property
    def objective_configs(self) -> dict[str, AnyObjective]:
        """By name."""
        return _OBJECTIVES.validate_python(self.objectives)

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.shape.transformer.width

    @property
    def num_hidden_layers(self) -> int:
        """Blocks of the trunk."""
        return self.shape.transformer.depth

    @property
    def num_attention_heads(self) -> int:
        """H."""
        return self.shape.transformer.num_heads

    @property
    def num_key_value_heads(self) -> int:
        """K."""
        return self.shape.transformer.kv_heads

    @property
    def head_dim(self) -> int:
        """d."""
        return self.shape.transformer.head_width

    @property
    def intermediate_size(self) -> int:
        """F."""
        return self.shape.transformer.mlp_width

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the output head is the input embedding: then there is no parameter of its own to tie."""
        return self.shape.transformer.tie_embeddings

    def to_dict(self) -> dict[str, Any]:
        """A tree that JSON can hold."""
        return super().to_dict() | {name: getattr(self, name) for name in _DERIVED}

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes `config.json`, and the three lines that find its classes."""
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        (Path(save_directory) / MODELING).write_text(MODELING_SOURCE)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """From a folder; see `PreTrainedConfig.from_pretrained`."""
        kwargs.setdefault("name_or_path", str(pretrained_model_name_or_path))
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """From a tree; a checkpoint of an earlier version is completed from the other files of its folder, if that is known."""
        folder = Path(kwargs.get("name_or_path") or config_dict.get("name_or_path") or "")
        if "run" in config_dict and "model" not in config_dict and (folder / "tokenizer.json").is_file():
            config_dict = config_dict | _read_folder(folder)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing to do: the classes are those of the package, and no folder needs a copy of their source."""


def _read_folder(folder: Path) -> dict[str, Any]:
    """What the `config.json` of earlier versions lacks: the shape in the stage that was trained last, and ids of special tokens."""
    from mmctx.tokenizer import TextTokenizer
    from mmctx.train.checkpoints.load import load_run_config, without_pretrained
    from mmctx.train.checkpoints.state import read_state
    from mmctx.train.stages import trained_stage

    config = load_run_config(folder)
    if (folder / "trainer" / "trainer_state.json").is_file():
        config = trained_stage(config, read_state(folder).step).config
    return {
        "model": without_pretrained(config.model).model_dump(mode="json"),
        "objectives": {name: objective.model_dump(mode="json") for name, objective in config.objectives.items()},
        "special_tokens": special_tokens(TextTokenizer(folder, config.data.bos)),
        "max_position_embeddings": config.data.context_length,
    }

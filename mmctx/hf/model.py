"""`MmctxForConditionalGeneration`: a model of ours with the face of a Transformers model.

Shapes: B rows, L columns, T packed tokens, D width, V vocabulary, K kept columns, I items of a modality.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from mmctx.activations import ActivationsConfig
from mmctx.errors import ConfigError
from mmctx.hf.build import build_native
from mmctx.hf.cache import PaddedCache, joined
from mmctx.hf.config import MmctxConfig
from mmctx.hf.features import FeaturesMixin
from mmctx.hf.fresh import FreshMixin
from mmctx.hf.head import next_token_logits, sum_of_losses
from mmctx.hf.inputs import MEDIA_INPUTS, Rows, items_by_row, media_batches
from mmctx.hf.resize import VocabularyMixin
from mmctx.hf.tuned import ADDED, TunedMixin
from mmctx.hf_files import generation_defaults
from mmctx.model import MmctxModel
from mmctx.pack import IGNORE_INDEX, MODALITIES

_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What this version of Transformers calls it."""
_MEDIA = [name for names in MEDIA_INPUTS.values() for name in names]


class _Read(NamedTuple):
    """What the trunk was given and made: ids (T,), zeros where embeddings were given, embeddings and hidden states (T, D)."""

    ids: Tensor
    embeddings: Tensor
    hidden: Tensor


class MmctxForConditionalGeneration(
    TunedMixin, FreshMixin, FeaturesMixin, VocabularyMixin, PreTrainedModel, GenerationMixin
):
    """Reads text, pictures and sound, writes text.

    The modules of a `MmctxModel` hang directly below this class, so that parameters have the names that they have in training and in
    `model.safetensors`, for LoRA's targets, too. `native` is that model, over the same modules.
    """

    config_class = MmctxConfig
    config: MmctxConfig
    main_input_name = "input_ids"
    input_modalities = ["text", "image", "audio"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    gradient_checkpointing = False
    _keys_to_ignore_on_load_unexpected = ADDED
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012

    def __init__(self, config: MmctxConfig) -> None:
        super().__init__(config)
        native = build_native(config)
        self._modules, self._parameters, self._buffers = native._modules, native._parameters, native._buffers
        self.__dict__["_of_native"] = native.__dict__
        self._no_split_modules = ["Block", *{type(encoder).__name__ for encoder in native.encoders.values()}]
        self.post_init()

    @property
    def native(self) -> MmctxModel:
        """The model without Transformers, over the same modules and in the same mode."""
        found = MmctxModel.__new__(MmctxModel)
        shared = {name: self.__dict__[name] for name in ("_modules", "_parameters", "_buffers", "training")}
        found.__dict__.update(self.__dict__["_of_native"] | shared | {"vocab_size": self.config.vocab_size})
        return found

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        input_features_tokens: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        logits_to_keep: int | Tensor | None = None,
        is_causal: bool = True,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Hidden states of padded rows, and of these what is asked for.

        Args:
            input_ids: (B, L), media slots hold their placeholder; or `inputs_embeds`.
            attention_mask: (B, L), with a cache (B, P + L): 0 for padding, at either end. Padding is neither computed nor seen.
            position_ids: (B, L); counted from the mask by default.
            past_key_values, cache: a Transformers cache, filled in place. See `joined` for both.
            inputs_embeds: (B, L, D), media included.
            pixel_values: (I, 3, H, W) uint8, pictures of all rows in reading order; `image_sizes` (I, 2) where they differ.
            input_features: (I, F, M) frames of all clips in reading order, `input_features_mask` (I, F) 0 behind a clip's end,
                `input_features_tokens` (I,) embeddings that each becomes.
            labels: (B, L) ids, `IGNORE_INDEX` where none is predicted, media never are; the loss: mean, or sum / `num_items_in_batch`.
            use_cache: start a cache, if none is given.
            logits_to_keep: logits (B, K, V) of the last K columns, or of columns (K,). By default all; with labels none.
            is_causal: False reads in both directions, as masked LM does.
            output_hidden_states: (B, L, D) of the embeddings and each block.

        Raises:
            DataError: shapes do not fit together, or media and placeholders are not equally many.
            ConfigError: something is asked for that kernels do not give.
        """
        if output_attentions:
            raise ConfigError("output_attentions: attention kernels keep no weights; leave it out")
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("give either input_ids or inputs_embeds")
        cache = joined(cache, past_key_values)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        given: Any = input_ids if inputs_embeds is None else inputs_embeds
        rows = Rows.of(given, 0 if cache is None else cache.get_seq_length(), attention_mask, position_ids)
        media = (pixel_values, image_sizes, input_features, input_features_mask, input_features_tokens)
        with _block_outputs(self.trunk) if output_hidden_states else nullcontext([]) as states:
            read = self._read(rows, given, dict(zip(_MEDIA, media, strict=True)), cache, is_causal)
        found = self._output(rows, read, labels, num_items_in_batch, logits_to_keep)
        if output_hidden_states:
            found["hidden_states"] = tuple(map(rows.unpack, (read.embeddings, *states[:-1], read.hidden)))
        return CausalLMOutputWithPast(**found, **{_CACHE: cache})

    def _read(
        self, rows: Rows, given: Tensor, media: Mapping[str, Tensor | None], cache: Any, is_causal: bool
    ) -> _Read:
        """Runs ids or embeddings `given` (B, L, ...) through the trunk."""
        native, has_ids = self.native, given.ndim == 2
        self._check_positions(rows, native)
        ids = rows.pack(given) if has_ids else rows.positions.new_zeros(len(rows.positions))
        shown: Mapping[str, Any] = {}
        if has_ids and (not rows.past or media["pixel_values"] is not None or media["input_features"] is not None):
            shown = media_batches(ids, self.placeholder_ids, dict(native.encoders.items()), media)
        batch = rows.batch(ids, shown, is_causal)
        embeddings = native.embed(batch) if has_ids else rows.pack(given)
        if cache is None:
            return _Read(ids, embeddings, native.read(embeddings, batch))
        padded: Any = PaddedCache(cache, rows, native.prefix)
        return _Read(ids, embeddings, native.trunk(embeddings, native.positions(batch), batch.layout, padded))

    def _output(
        self, rows: Rows, read: _Read, labels: Tensor | None, count: Tensor | int | None, keep: int | Tensor | None
    ) -> dict[str, Any]:
        """The loss, with labels; logits, without or where some are asked for."""
        found = {} if labels is None else {"loss": self._loss(rows, read, labels, count)}
        if keep is None and labels is None:
            keep = 0
        return found if keep is None else found | {"logits": self._logits(rows, read.hidden, keep)}

    def _logits(self, rows: Rows, hidden: Tensor, keep: int | Tensor) -> Tensor:
        """(B, K, V), in padding behind a row those of its last token, zeros before its first."""
        columns = torch.arange(rows.shape[1], device=hidden.device)
        kept = columns[keep.to(hidden.device)] if isinstance(keep, Tensor) else columns[-keep:]  # -0: all
        last, real = rows.latest(kept)
        logits = next_token_logits(self.native, hidden.index_select(0, last.flatten())).unflatten(0, last.shape)
        return logits if rows.is_full else logits * real[..., None]

    def _loss(self, rows: Rows, read: _Read, labels: Tensor, count: Tensor | int | None) -> Tensor:
        """Cross entropy of the next token of each row, in chunks: the logits never exist."""
        targets, device = torch.full_like(read.ids, IGNORE_INDEX), read.ids.device
        targets[:-1] = rows.pack(labels.to(device))[1:]
        ends = torch.tensor(rows.lengths, device=device).cumsum(dim=0) - 1
        targets[ends[ends >= 0]] = IGNORE_INDEX
        for placeholder in self.placeholder_ids.values():
            targets[targets == placeholder] = IGNORE_INDEX
        places = (targets != IGNORE_INDEX).nonzero()[:, 0]
        total = sum_of_losses(self.native, read.hidden.index_select(0, places), targets.index_select(0, places))
        return total / (len(places) if count is None else count)

    def _check_positions(self, rows: Rows, native: MmctxModel) -> None:
        """Learned positions end somewhere. The device is asked only where they might."""
        count, before = (
            self.config.shape.transformer.learned_positions,
            native.prefix.num_tokens if native.prefix else 0,
        )
        if count is None or before + rows.past + rows.shape[1] <= count:
            return
        if (last := before + int(rows.positions.max())) >= count:
            raise ConfigError(
                f"a row of {last + 1} tokens is longer than the {count} positions that the model has learned "
                "(model.transformer.learned_positions); shorten it, or ask for fewer new tokens"
            )

    @property
    def placeholder_ids(self) -> dict[str, int]:
        """Modality -> the id that its slots hold, of those that the config tells."""
        return {kind: self.config.special_tokens[kind] for kind in MODALITIES if kind in self.config.special_tokens}

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Beams and several answers: rows are repeated, and with each its own items, of which it may have any number."""
        media = {name: model_kwargs.pop(name, None) for name in _MEDIA}
        if input_ids is not None and expand_size > 1:
            media = self._repeat_media(input_ids, media, expand_size)
        expand: Any = super()._expand_inputs_for_generation  # type: ignore[reportAttributeAccessIssue]
        input_ids, model_kwargs = expand(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | {name: value for name, value in media.items() if value is not None}

    def _repeat_media(self, input_ids: Tensor, media: dict[str, Any], times: int) -> dict[str, Any]:
        batches = media_batches(input_ids.flatten(), self.placeholder_ids, dict(self.native.encoders.items()), media)
        found = dict(media)
        for kind, names in MEDIA_INPUTS.items():
            if kind not in batches:
                continue
            slots = (input_ids == self.placeholder_ids[kind]).sum(dim=1).tolist()
            counts = items_by_row(slots, batches[kind].num_tokens)
            of_rows = torch.arange(sum(counts), device=input_ids.device).split(counts)
            order = torch.cat([items.repeat(times) for items in of_rows])
            found |= {name: media[name][order] for name in names if media[name] is not None}
        return found

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, every_n_layers: int = 1
    ) -> None:
        """Blocks are computed again by our own means, see `mmctx.activations`; reentrant checkpoints are not among them."""
        self.gradient_checkpointing = enable
        self.native.set_activations(ActivationsConfig(checkpoint="full" if enable else "none", every=every_n_layers))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """From any checkpoint folder; see `PreTrainedModel.from_pretrained`.

        Raises:
            ConfigError, CheckpointError: the checkpoint is of a tuning that cannot be put onto its base, see `put_tuning`.
        """
        found = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        model.put_tuning(pretrained_model_name_or_path, kwargs)
        # checkpoints of earlier versions say nothing of generation
        for name, value in generation_defaults(model.config.special_tokens).items():
            if getattr(model.generation_config, name) is None:
                setattr(model.generation_config, name, value)
        return found

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """See `MmctxConfig.register_for_auto_class`."""


@contextmanager
def _block_outputs(trunk: Any) -> Iterator[list[Tensor]]:
    """A list that the trunk's blocks add their output to."""
    states: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *call: states.append(call[2])) for block in trunk.blocks]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()

# SPDX-License-Identifier: Apache-2.0
"""The model and its `generate` with a `CodebookCache` where no cache is given."""

import functools
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache

from .surgery_codebook_attention import CodebookAttention
from .surgery_codebook_cache import CodebookCache, stock_options
from .surgery_codebook_settings import CacheSettings
from .surgery_compatibility import merged

UNSAID: Any = object()
# What makes generate() guess ahead, and how many guesses it may then have to take back.
DRAFTING, TAKEN_BACK = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"), 64


class CodebookModel:
    """Stands before a native base model among the bases of a class."""

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the native model; what is not given takes the settings of the config."""
        wanted = self.config.use_cache if use_cache is None else use_cache
        if past_key_values is None and wanted and not self.training:
            past_key_values = new_cache(self, CacheSettings.of(self.config.surgery["codebook_cache"]))
        if isinstance(past_key_values, CodebookCache):
            given = input_ids if input_ids is not None else inputs_embeds
            if given is None:
                raise ValueError("give either input_ids or inputs_embeds")
            like = self.embed_tokens.weight[:1][None]
            past_key_values.begin(input_ids, position_ids, attention_mask, given, self._rotation, like)
        output = super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        if isinstance(past_key_values, CodebookCache):
            past_key_values.end()
        return output

    def _rotation(self: Any, like: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary tables [B, T, table] in the type and on the device of `like`."""
        cos, sin = self.rotary_emb(like, position)
        return merged(cos, sin, self.config)


def codebook_model(_config: Any, replaced: Any) -> Any:
    """A language model that is a part of another model, with what `CodebookModel` adds."""
    native: Any = type(replaced)
    replaced.__class__ = _with_codebook(native)
    return replaced


@functools.cache
def _with_codebook(native: Any) -> type:
    def reduced(model: Any) -> tuple[Any, ...]:  # pickles look classes up by name
        return _revived, (native,), model.__dict__

    names = {"__module__": native.__module__, "__qualname__": native.__qualname__}  # outputs are recorded by name
    made = type(native.__name__, (CodebookModel, native), {**names, "__doc__": CodebookModel.__doc__})
    made.__reduce__ = reduced  # type: ignore[method-assign, assignment]
    return made


def _revived(native: Any) -> Any:
    made: Any = _with_codebook(native)
    return made.__new__(made)


def new_cache(model: Any, settings: CacheSettings, prompt_length: int | None = None) -> DynamicCache:
    """An empty cache for the base model `model`; a stock one where every layer has a sliding window."""
    coded = [index for index, layer in enumerate(model.layers) if isinstance(layer.self_attn, CodebookAttention)]
    return CodebookCache(settings, coded, model.config, prompt_length) if coded else stock_cache(model.config)


class CodebookGeneration:
    """Stands before a native language model among the bases of a class."""

    def generate(
        self: Any,
        inputs: Any = None,
        generation_config: Any = None,
        *args: Any,
        surgery_cache: Any = UNSAID,
        **kwargs: Any,
    ) -> Any:
        """As `generate` of transformers; `surgery_cache` are settings over those of the config, None the stock cache.

        A generation config may have them as `surgery_cache` too. Raises ValueError for settings that do not exist, and
        for kinds of cache that cannot be coded.
        """
        configured = self.generation_config if generation_config is None else generation_config
        if surgery_cache is UNSAID:
            of_model = getattr(self.generation_config, "surgery_cache", {})
            surgery_cache = getattr(configured, "surgery_cache", of_model)
        elif surgery_cache is not None and kwargs.get("past_key_values") is not None:
            raise ValueError("surgery_cache is for a new cache, and past_key_values gives one: leave one of them out")
        kind = kwargs.get("cache_implementation", getattr(configured, "cache_implementation", None))
        wanted = kwargs.get("use_cache", getattr(configured, "use_cache", True)) is not False
        if kwargs.get("past_key_values") is None and wanted:
            if kind is not None:  # transformers makes it; for drafts it asks for a "dynamic_full" one
                if surgery_cache is not None and not str(kind).startswith("dynamic"):
                    raise ValueError(f"a {kind} cache is not coded: pass surgery_cache=None with cache_implementation")
            elif surgery_cache is None:
                kwargs["past_key_values"] = stock_cache(self.config)
            else:
                prompts = (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
                length = next((prompt.shape[1] for prompt in prompts if prompt is not None), None)
                if hasattr(self.model, "visual_tokens"):  # some of which leave the prompt on the way
                    length = None
                settings = CacheSettings.of(_configured(self), surgery_cache)
                if any(kwargs.get(name, getattr(configured, name, None)) for name in DRAFTING):
                    settings = replace(settings, residual=max(settings.residual, TAKEN_BACK))
                kwargs["past_key_values"] = new_cache(_language_model(self), settings, length)
        output = super().generate(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]
        used = kwargs.get("past_key_values")
        if isinstance(used, CodebookCache):
            self._codebook_report = used.report()
        return output

    def surgery_cache(self: Any, prompt_length: int | None = None, **settings: Any) -> DynamicCache:
        """An empty cache to pass as `past_key_values`; `settings` go over those of the config.

        `prompt_length`, in tokens with padding, is needed where a prompt comes in several calls.
        """
        return new_cache(_language_model(self), CacheSettings.of(_configured(self), settings), prompt_length)

    def surgery_cache_report(self: Any, cache: CodebookCache | None = None) -> dict[str, Any]:
        """Bytes of `cache`, or of the last that `generate` coded, by layer and kind, beside the stock cache's."""
        if isinstance(cache, CodebookCache):
            return cache.report()
        if cache is not None:
            raise ValueError(f"a {type(cache).__name__} is not coded, so there is nothing to tell of it")
        report: dict[str, Any] | None = getattr(self, "_codebook_report", None)
        if report is None:
            raise ValueError("nothing was generated with a codebook cache yet: pass one, as output.past_key_values")
        return report


def _configured(model: Any) -> Any:
    return model.config.get_text_config().surgery["codebook_cache"]


def _language_model(model: Any) -> Any:
    """The part with the layers: all below the head, or a part of that where the model sees images."""
    return getattr(model.model, "language_model", model.model)


def stock_cache(config: Any) -> DynamicCache:
    """What transformers would make."""
    return DynamicCache(**stock_options(config))

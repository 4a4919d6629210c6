"""A checkpoint of transformers: its settings, its tokenizer and its weights, each with errors in one line.

``loading`` reads checkpoints by this, as they are and to pack them. Only ``.safetensors`` files are read, and no code
of a checkpoint runs. One thread.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from kvswap.errors import ModelError
from kvswap.models.empty_model import sdpa_or_eager
from kvswap.models.gguf import BUNDLED
from kvswap.models.loading_info import check_weights, unused_weights

WHERE = f"give a local model directory, a .gguf file, a hub id such as org/model, or {BUNDLED}"
_CODE_OF_ITS_OWN = "trust_remote_code"  # the errors of transformers name the option that would run it
_WRONG_VALUES = (ValueError, KeyError, TypeError, AttributeError, RuntimeError, struct.error)
_DAMAGED = (ImportError, OSError, SafetensorError, *_WRONG_VALUES)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What transformers loads for ``name``: a folder or hub id, and whether only from local files."""

    name: str
    source: str
    local: bool
    notice: Callable[[str], None]

    def settings(self) -> tuple[Any, Any, GenerationConfig | None]:
        """The configuration, the tokenizer, and the settings of generation where the checkpoint has some.

        Raises ModelError.
        """
        name, source, options = self.name, self.source, self._options
        try:
            config = AutoConfig.from_pretrained(source, **options)
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
        except _DAMAGED as error:
            hint = "the directory needs config.json and a tokenizer (tokenizer.json, tokenizer_config.json)"
            raise _cannot_load(name, "", error, hint) from error
        try:
            generation = GenerationConfig.from_pretrained(source, **options)
        except ValueError as error:  # keys that contradict each other
            hint = "remove from that file what the message names"
            raise _cannot_load(name, "generation_config.json: ", error, hint) from error
        except OSError:
            generation = None  # most checkpoints have one, but none needs it
        return config, tokenizer, generation

    def model(self, config: Any, dtype: Any) -> PreTrainedModel:
        """The model in a dtype; ``"auto"`` is the checkpoint's. Attention is sdpa, or eager in families without it.

        Raises ModelError.
        """
        options = {"config": config, "dtype": dtype, **self._options}

        def read(attention: str) -> Any:
            return AutoModelForCausalLM.from_pretrained(
                self.source,
                attn_implementation=attention,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )

        try:
            model, info = sdpa_or_eager(read, self.notice)
        except _DAMAGED as error:
            hint = f"{self.source} may be damaged or incomplete: fetch it again" if self.local else WHERE
            if (kind := quantisation(config)) is not None:
                hint = f"its weights are quantised ({kind}) and need the packages and devices of that; or take others"
            raise _cannot_load(self.name, "its weights cannot be loaded: ", error, hint) from error
        check_weights(self.name, info)
        if (unused := unused_weights(self.name, info)) is not None:
            self.notice(unused)
        return model

    @property
    def _options(self) -> dict[str, Any]:
        return {"local_files_only": self.local, "trust_remote_code": False}


def quantisation(config: Any) -> str | None:
    """The kind of quantisation of a checkpoint, or None."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    return str(found.get("quant_method", "")) if isinstance(found, dict) else str(found.quant_method)


def _cannot_load(name: str, what: str, error: BaseException, hint: str) -> ModelError:
    text = _first_line(error)
    if _CODE_OF_ITS_OWN in str(error):
        text, hint = "it brings Python code of its own, which kvswap never runs", "use a family that transformers has"
    elif isinstance(error, ImportError) or " install" in text:
        hint = "install the package that is named, or use a model that does not need it"
    elif "safetensors" in text and isinstance(error, OSError):
        hint = "weights are read from .safetensors files only, since other kinds can run code: convert them"
    return ModelError(f"model {name}: {what}{text}", hint=hint)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__

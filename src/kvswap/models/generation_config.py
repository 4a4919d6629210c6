"""What kvswap does with each key of a checkpoint's generation_config.json.

``streaming`` generates with a cleaned copy and gives the sentences that say so. ``KEYS`` is the one table of decisions.
A key that is not in it is set aside and named.
"""

from __future__ import annotations

import copy
from enum import Enum
from typing import Any


class Use(Enum):
    """What is done with a key."""

    HONOURED = "taken as the checkpoint has it"
    HONOURED_AND_SAID = "taken as the checkpoint has it; it changes which tokens are chosen, so it is named"
    REPLACED = "an option or a part of kvswap stands in its place, with or without the checkpoint"
    SET_ASIDE = "set back to what has no effect, and named"


_HONOURED = "eos_token_id pad_token_id bos_token_id decoder_start_token_id stop_strings"
_HONOURED_AND_SAID = "sequence_bias bad_words_ids suppress_tokens begin_suppress_tokens"
_REPLACED = "max_length max_new_tokens do_sample temperature top_k top_p use_cache"
_SET_ASIDE = """
    min_length min_new_tokens early_stopping max_time num_beams num_return_sequences use_mtp
    cache_implementation cache_config max_cache_len prefill_chunk_size
    min_p top_h typical_p epsilon_cutoff eta_cutoff
    repetition_penalty encoder_repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
    renormalize_logits forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty
    token_healing guidance_scale watermarking_config
    output_attentions output_hidden_states output_scores output_logits return_dict_in_generate
    is_assistant num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold
    prompt_lookup_num_tokens max_matching_ngram_size assistant_early_exit assistant_lookbehind target_lookbehind
    assistant_ensemble_weight speculation_type compile_config disable_compile continuous_batching_config
    num_beam_groups diversity_penalty penalty_alpha dola_layers constraints force_words_ids low_memory
"""
KEYS: dict[str, Use] = {
    **dict.fromkeys(_HONOURED.split(), Use.HONOURED),
    **dict.fromkeys(_HONOURED_AND_SAID.split(), Use.HONOURED_AND_SAID),
    **dict.fromkeys(_REPLACED.split(), Use.REPLACED),
    **dict.fromkeys(_SET_ASIDE.split(), Use.SET_ASIDE),
}
"""The decision for each key, those of older versions of transformers included."""

_NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "num_beam_groups": 1,
    "min_length": 0,
    "early_stopping": False,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "renormalize_logits": False,
    "remove_invalid_values": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "output_logits": False,
    "return_dict_in_generate": False,
    "token_healing": False,
    "use_mtp": False,
    "is_assistant": False,
    "low_memory": False,
    "disable_compile": False,
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
    "assistant_lookbehind": 10,
    "target_lookbehind": 10,
    "max_matching_ngram_size": None,
}
"""Values that have no effect; None for every other key."""
_ABOUT_THE_FILE = ("transformers_version",)


def cleaned(config: Any) -> Any:
    """A copy of a model's ``generation_config`` without what is set aside."""
    copied = copy.deepcopy(config)
    for key in _stated(config):
        if key not in KEYS:
            delattr(copied, key)
        elif KEYS[key] is Use.SET_ASIDE:
            setattr(copied, key, _NEUTRAL.get(key))
    copied.max_length, copied.use_cache = None, True
    return copied


def remarks(config: Any) -> list[str]:
    """Sentences about keys of a model's ``generation_config`` that a user would not expect to be used, or not used."""
    stated = _stated(config)
    aside = [key for key in stated if KEYS.get(key, Use.SET_ASIDE) is Use.SET_ASIDE]
    changing = [key for key in stated if KEYS.get(key) is Use.HONOURED_AND_SAID]
    said = []
    if aside:
        said.append(f"generation_config.json: not used, because only the options of kvswap count: {', '.join(aside)}")
    if changing:
        said.append(f"generation_config.json: these keys change which tokens are chosen: {', '.join(changing)}")
    return said


def _stated(config: Any) -> list[str]:
    """Keys that have a value with an effect, sorted."""
    found = {key: value for key, value in vars(config).items() if not key.startswith("_")}
    return sorted(
        key
        for key, value in found.items()
        if key not in _ABOUT_THE_FILE and value is not None and value != _NEUTRAL.get(key)
    )

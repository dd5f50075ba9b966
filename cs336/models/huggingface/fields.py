"""What a config.json says: each field is used, known to change nothing, or refused by name."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NoReturn

# Changes no logit: of files and versions, outputs not asked for, heads of other tasks, ways to compute, training.
IRRELEVANT = {"architectures", "auto_map", "dtype", "model_type", "name_or_path", "torch_dtype", "transformers_version"}
IRRELEVANT |= {"_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id"}
IRRELEVANT |= {"unk_token_id", "decoder_start_token_id", "tokenizer_class", "prefix", "training_step"}
IRRELEVANT |= {"output_attentions", "output_hidden_states", "output_router_logits", "output_past", "return_dict"}
IRRELEVANT |= {"finetuning_task", "id2label", "label2id", "num_labels", "problem_type", "task_specific_params"}
IRRELEVANT |= {"_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "cache_implementation"}
IRRELEVANT |= {"chunk_size_feed_forward", "gradient_checkpointing", "pretraining_tp", "torchscript", "use_bfloat16"}
IRRELEVANT |= {"use_cache", "unsloth_fixed", "unsloth_version", "loss_type"}
# Of old files, which sampled as their config.json said: generation_config.json says that now.
IRRELEVANT |= {"do_sample", "early_stopping", "length_penalty", "max_length", "max_new_tokens", "min_length"}
IRRELEVANT |= {"num_beams", "num_return_sequences", "repetition_penalty", "temperature", "top_k", "top_p"}
# Means nothing where it is off.
OFF = {"is_encoder_decoder", "is_decoder", "add_cross_attention", "tie_encoder_decoder", "pruned_heads", "quantization"}


class Fields:
    """The fields of a table, which are taken one by one; null is as good as not there.

    Raises ValueError, naming the field, for one that is missing, of a value that the model cannot do, or not taken.
    """

    def __init__(self, table: Mapping[str, Any], above: str = "", source: str = "config.json"):
        self.table = {name: value for name, value in table.items() if value is not None}
        self.given, self.above, self.source, self.taken = set(table), above, source, set[str]()

    def require(self, *names: str) -> None:
        if missing := [f"{self.above}{name}" for name in names if name not in self.table]:
            raise ValueError(f"{self.source} lacks {', '.join(missing)}")

    def take(self, name: str, default: Any = None) -> Any:
        self.taken.add(name)
        return self.table.get(name, default)

    def number(self, name: str, default: Any = None) -> Any:
        """A number, or the default. TOML and JSON write 1 for 1.0."""
        value = self.take(name, default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"{self.source} has {self.above}{name} = {value!r}: expected a number")
        return value

    def count(self, name: str, default: Any = None) -> Any:
        """A whole number of 1 or more, or the default."""
        value = self.take(name, default)
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{self.source} has {self.above}{name} = {value!r}: expected a whole number, 1 or more")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.source} has {self.above}{name} = {value!r}: expected true or false")
        return value

    def only(self, name: str, *values: Any) -> None:
        """What may be there, but only so."""
        if name in self.table and self.table[name] not in values:
            self.refuse(name)
        self.taken.add(name)

    def refuse(self, name: str, value: Any = None) -> NoReturn:
        """value: that which stands for one that is left out."""
        value = self.table.get(name, value)
        raise ValueError(
            f"{self.source} has {self.above}{name} = {value!r}, which cs336.models.Transformer does not do"
        )

    def finish(self) -> None:
        """Raises ValueError for the first field that was not taken and would mean something."""
        for name, value in self.table.items():
            off = name in OFF and not value
            if name not in self.taken and not off and (self.above or name not in IRRELEVANT):
                self.refuse(name)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Raises FileNotFoundError where there is no such file, ValueError where it holds no JSON object."""
    if not path.exists():
        raise FileNotFoundError(f"{path.parent} has no {path.name}: is it a model's directory?")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content

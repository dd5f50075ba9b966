"""What a tokenizer means to a model: which tokens end a text, which ids are none, and the ids of prompts."""

from collections.abc import Collection, Sequence

from cs336.models import Transformer
from cs336.tokenizer.text_stream import TextStream
from cs336.utils.special_tokens import END_OF_TEXT


def ends_of(model: Transformer, tokenizer) -> Collection[int]:
    """The ids that end a text."""
    if not model.end_ids:
        return [i for text, i in tokenizer.special_tokens.items() if text == END_OF_TEXT]
    if not any(i in tokenizer.vocab for i in model.end_ids):
        raise ValueError(
            f"the model ends a text with token {model.end_ids[0]}, which the tokenizer does not have: "
            "use the tokenizer that the model was trained with"
        )
    return model.end_ids


def encode_prompts(model: Transformer, tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """The ids of each (Tokenizer.encode_prompt); an empty one begins a document."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.config.vocab_size}: "
            "use the tokenizer that the model was trained with"
        )
    encoded = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    if all(encoded):
        return encoded
    begin = tokenizer.special_tokens.get(END_OF_TEXT, model.special_ids.get("bos_token_id"))
    if begin is None:
        raise ValueError(
            f"an empty prompt begins a document after {END_OF_TEXT}, which this tokenizer lacks: give a text"
        )
    return [ids or [begin] for ids in encoded]


def text_stream(tokenizer, stop: Sequence[str], prompt_ids: Sequence[int]) -> TextStream:
    """Of what comes behind a prompt."""
    return TextStream(tokenizer, stop, at_start=begins_text(tokenizer, prompt_ids))


def begins_text(tokenizer, prompt_ids: Sequence[int]) -> bool:
    """Whether a text begins behind a prompt, which has none."""
    return all(i in tokenizer.special_ids for i in prompt_ids)


def unused_ids(model: Transformer, tokenizer) -> list[int]:
    """Rows of the embedding that are no token: holes in the vocabulary, and padding to a round size."""
    vocab = tokenizer.vocab
    return [i for i in range(model.config.vocab_size) if i not in vocab]


def check_same_tokens(tokenizer, other, name: str) -> None:
    """Raises ValueError where the other tokenizer, of the model called so, gives an id to another token."""
    for i in sorted(tokenizer.vocab.keys() | other.vocab.keys()):
        ours, theirs = tokenizer.vocab.get(i), other.vocab.get(i)
        if ours != theirs:
            raise ValueError(
                f"token {i} is {theirs!r} to {name} and {ours!r} to the model: they must share a tokenizer"
            )

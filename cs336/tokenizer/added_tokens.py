"""The added tokens of a tokenizer.json: texts that Hugging Face's tokenizers looks for before all else."""

from typing import Any

from cs336.tokenizer.formats import field

STRIPS = ("lstrip", "rstrip")  # flags of those that take the white space beside them with them


def read_added_tokens(document: dict[str, Any], vocab: dict[str, int], may_strip: bool = False) -> dict[str, int]:
    """Their ids by their texts. Raises ValueError for one that would not be found as we find it."""
    if document.get("added_tokens") is None:
        return {}
    ids: dict[str, int] = {}
    texts: dict[bool, list[str]] = {False: [], True: []}  # those found before the text is normalized, and after
    strips = False
    for token in field(document, "added_tokens", list):
        text = field(token, "content", str, "added_tokens[]")
        if token.get("single_word") or (not may_strip and any(token.get(flag) for flag in STRIPS)):
            raise ValueError(f"the added token {text!r} takes white space or word ends into account")
        strips = strips or any(token.get(flag) for flag in STRIPS)
        i = field(token, "id", int, "added_tokens[]")
        theirs = ids.get(text, vocab.get(text, max([len(vocab) - 1, *ids.values()]) + 1))
        if i != theirs:
            raise ValueError(
                f"the added token {text!r} has the id {i}, and Hugging Face's tokenizers would make it {theirs}: the "
                "next after the others, since the vocabulary does not have it"
                if text not in vocab
                else f"the added token {text!r} has the id {i}, and {theirs} in the vocabulary"
            )
        ids[text] = i
        texts[bool(token.get("normalized"))].append(text)
    for late in texts[True]:  # all are found at once by us, the leftmost first
        for early in texts[False]:
            if early in late or any(early.startswith(late[i:]) for i in range(1, len(late))):
                raise ValueError(
                    f"of the added tokens {late!r} and {early!r}, which may overlap, it takes the second wherever they "
                    "do: this tokenizer takes the first of a text"
                )
    if strips and (white := next((text for text in ids if text != text.strip()), None)):
        raise ValueError(
            f"an added token takes the white space beside it, with which another, {white!r}, begins or ends"
        )
    return ids

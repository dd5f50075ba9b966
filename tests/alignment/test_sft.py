"""Conversations as tokens, masks and packed rows, and the objective that learns them."""

import pytest
import torch
from training import tiny_run

from cs336.alignment import SFT, Example, encode_chat, pack_examples, sequence_log_probs
from cs336.alignment.examples import read_rows
from cs336.inference.chat import ChatTemplate
from cs336.models import Transformer, TransformerConfig
from cs336.tokenizer import Tokenizer
from cs336.training.learner import Learner

TOKENIZER = Tokenizer({i: bytes([i]) for i in range(256)}, [], ["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
END = TOKENIZER.special_tokens["<|im_end|>"]
TURNS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "no"},
]
SHORT = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}|{% endfor %}{% if add_generation_prompt %}a:{% endif %}"


def test_the_assistant_and_its_end_are_learned():
    example = encode_chat(TURNS, TOKENIZER, ChatTemplate(), [END])
    text = ChatTemplate().render(TURNS, add_generation_prompt=False)
    assert example.token_ids == TOKENIZER.encode(text, allowed_special="all")
    learned = [t for t, m in zip(example.token_ids, example.mask, strict=True) if m]
    assert TOKENIZER.decode(learned) == "yes<|im_end|>no<|im_end|>"
    last = encode_chat(TURNS, TOKENIZER, ChatTemplate(), [END], last_only=True)
    assert last.token_ids == example.token_ids
    assert TOKENIZER.decode([t for t, m in zip(last.token_ids, last.mask, strict=True) if m]) == "no<|im_end|>"


def test_what_is_learned_begins_where_the_model_is_asked():
    example = encode_chat(TURNS[:2], TOKENIZER, ChatTemplate(), [END])
    prompt = TOKENIZER.encode(ChatTemplate().render(TURNS[:1]), allowed_special="all")
    assert example.token_ids[: len(prompt)] == prompt
    assert example.mask.index(True) == len(prompt)


@pytest.mark.parametrize(
    ("turns", "template", "message"),
    [
        (TURNS, SHORT, "never stops"),  # | is no end
        (TURNS[:1], None, "no message is the assistant's"),
        ([*TURNS[:1], {"role": "assistant", "content": " "}], None, "must have text"),
        (
            TURNS,
            "{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}",
            "drops or rewrites",
        ),
        (TURNS, "{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}", "drops or rewrites"),
        (TURNS, "{{ messages | length }}:{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}", "rewrites"),
    ],
)
def test_encode_chat_refuses(turns, template, message):
    with pytest.raises(ValueError, match=message):
        encode_chat(turns, TOKENIZER, ChatTemplate(template), [END])


def test_a_template_that_rewrites_earlier_turns_serves_for_the_last():
    template = ChatTemplate(
        "{% for m in messages %}{% if m.role == 'user' or loop.last %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="last_only"):
        encode_chat(TURNS, TOKENIZER, template, [END])
    example = encode_chat(TURNS, TOKENIZER, template, [END], last_only=True)
    assert TOKENIZER.decode(example.token_ids) == "hi<|im_end|>more<|im_end|>no<|im_end|>"


def examples_of(*lengths):
    return [Example([n] * n, [False] + [True] * (n - 1)) for n in lengths]


def test_packing_keeps_examples_whole_and_apart():
    token_ids, targets, segments = pack_examples(examples_of(3, 6, 2, 5), 8, pad_id=9)
    assert token_ids.tolist() == [[6] * 6 + [2] * 2, [5] * 5 + [3] * 3]
    assert segments.tolist() == [[0] * 6 + [1] * 2, [0] * 5 + [1] * 3]
    assert targets.tolist() == [[6] * 5 + [-100, 2, -100], [5] * 4 + [-100, 3, 3, -100]]
    token_ids, targets, segments = pack_examples(examples_of(3), 5, pad_id=9)
    assert (token_ids.tolist(), segments.tolist()) == ([[3, 3, 3, 9, 9]], [[0, 0, 0, -1, -1]])
    assert targets.tolist() == [[3, 3, -100, -100, -100]]
    with pytest.raises(ValueError, match="example 1 has 9 tokens"):
        pack_examples(examples_of(3, 9), 8)
    with pytest.raises(ValueError, match="nothing is learned of example 0"):
        pack_examples([Example([1, 2, 3], [True, False, False])], 8)
    with pytest.raises(ValueError, match="3 token_ids and 2"):
        Example([1, 2, 3], [True, False])


def test_the_loss_of_packed_rows_is_that_of_each_example():
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(272, 48, num_layers=2, d_model=16, num_heads=2, init_std=0.3))
    examples = [encode_chat(TURNS[i : i + 2], TOKENIZER, ChatTemplate(), [END]) for i in (0, 2)]
    examples += [Example([65, 66, 67], [False, True, True])]
    batch = pack_examples(examples, 48)
    assert len(batch[0]) == 2
    loss, count, _ = SFT()(model, batch)
    want = sum(
        -sequence_log_probs(model, torch.tensor([e.token_ids]))[0][torch.tensor(e.mask[1:])].sum() for e in examples
    )
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-4)
    assert count == 4 + 3 + 2
    with pytest.raises(ValueError, match="nothing is learned in this batch"):
        SFT()(model, (batch[0], torch.full_like(batch[1], -100), batch[2]))


def test_a_learner_learns_an_answer(tmp_path):
    model = TransformerConfig(272, 48, num_layers=1, d_model=32, num_heads=2)
    learner = Learner(tiny_run.config(tmp_path, model=model, objective=SFT(), batch_size=2, micro_batch_size=1))
    batch = pack_examples([encode_chat(TURNS[i : i + 2], TOKENIZER, ChatTemplate(), [END]) for i in (0, 2)], 48)
    losses = [learner.update(batch, lr=1e-2)["loss"].item() for _ in range(30)]
    assert losses[0] > 4
    assert losses[-1] < 0.3


def test_rows_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n')
    assert [row["prompt"] for _, row in read_rows(path)] == ["a", "b"]

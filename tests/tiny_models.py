"""Llama, Qwen3 and GPT-2 of transformers, tiny and random, and what is asked of an attention in their place."""

import torch
from close import assert_close_to_ref

NAMES = ("llama", "qwen3", "gpt2")
SIZES = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}


def tiny(name, attention="eager"):
    import transformers

    torch.manual_seed(0)
    llama = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 8} | SIZES
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "loss_type": "ForCausalLM"} | SIZES
    gpt2 |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    config, model = {
        "llama": (transformers.LlamaConfig(**llama), transformers.LlamaForCausalLM),
        "qwen3": (transformers.Qwen3Config(**llama), transformers.Qwen3ForCausalLM),
        "gpt2": (transformers.GPT2Config(**gpt2), transformers.GPT2LMHeadModel),
    }[name]
    config._attn_implementation = attention
    made = model(config)
    with torch.no_grad():  # logits of random weights lie so close that rounding would choose between tokens
        made.get_input_embeddings().weight.mul_(8)
    return made


def train(model, steps=5, dtype=torch.float32, call=None, **batch):
    """The losses of a few steps on one batch."""
    model.to(dtype).train()
    batch = batch or {"input_ids": torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        loss = (model if call is None else call)(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def generate(model, tokens=32):
    model.eval()
    prompt = torch.randint(1, 64, (2, 6), generator=torch.Generator().manual_seed(2))
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=tokens, do_sample=False)


def assert_like_its_own(name, ours):
    """Losses of five steps, within the tolerance rule of the model's own eager attention. transformers' norms and loss
    are float32 in a float64 model too."""
    own, wide = train(tiny(name)), train(tiny(name), dtype=torch.float64)
    assert own[0] - own[-1] > 0.05
    assert_close_to_ref(ours, wide.double(), own)

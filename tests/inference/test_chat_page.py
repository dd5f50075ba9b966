"""The chat page in a browser: it streams, stops, asks again and samples as it is told, on wide and narrow screens."""

import dataclasses
import json

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

import torch
from inference.serving import CONFIG, TOKENIZER, listening
from scaling.browser import CHROMIUM, browser

from cs336.inference import LLM
from cs336.models import Transformer

ANSWERED = "document.getElementById('send').textContent === 'Send' && /tokens\\/s/.test(speed.textContent)"
TURNS = "[...document.querySelectorAll('#talk .turn')].map(turn => [turn.className, turn.textContent])"
FITS = "document.documentElement.scrollWidth <= innerWidth"


def say(tab, text):
    tab.js(f"speed.textContent = ''; say.value = {json.dumps(text)}; document.getElementById('send').click()")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt install chromium")
def test_the_chat_page_in_a_browser(tmp_path):
    torch.manual_seed(5)
    model = Transformer(dataclasses.replace(CONFIG, context_length=512)).eval()
    with listening(LLM(model, TOKENIZER, quiet=True)) as (_, port), browser(tmp_path / "browser") as tab:
        for width in (1280, 390):
            tab.size(width, 844)
            tab.open(f"http://127.0.0.1:{port}/")
            tab.until("document.getElementById('model').textContent === 'cs336'")
            tab.js("toggle.click()")
            for name, value in (("temperature", 0), ("max_tokens", 40), ("seed", 3), ("system", "Be kind.")):
                tab.js(f"document.getElementById('{name}').value = '{value}'")
            assert tab.js("toggle.getAttribute('aria-expanded')") == "true"
            tab.screenshot(tmp_path / f"settings-{width}.png")
            assert tab.js(FITS)
            tab.js("toggle.click()")

            say(tab, "Hello " + "x" * 60)
            tab.until(ANSWERED)
            (who, asked), (answerer, first) = tab.js(TURNS)
            assert (who, asked, answerer) == ("turn user", "Hello " + "x" * 60, "turn assistant")
            assert first
            tab.screenshot(tmp_path / f"answer-{width}.png")
            assert tab.js(FITS), "a long word must break"

            tab.js("speed.textContent = ''; again.click()")
            tab.until(ANSWERED)
            assert tab.js(TURNS)[1:] == [["turn assistant", first]]  # greedily the same, in the same place

            tab.js("fresh.click(); max_tokens.value = ''; temperature.value = -1")
            say(tab, "Hi")
            tab.until("document.getElementById('send').textContent === 'Send'")
            kind, reason = tab.js(TURNS)[-1]
            assert kind == "turn error"
            assert "temperature" in reason

            tab.js("temperature.value = 1; fresh.click()")
            say(tab, "Hi")
            tab.until("document.querySelector('#talk .assistant')?.textContent")
            tab.js("document.getElementById('send').textContent === 'Stop' && document.getElementById('send').click()")
            tab.until("document.getElementById('send').textContent === 'Send' && !document.querySelector('.busy')")
            assert tab.js("!again.disabled")

"""The dashboard in a browser: a key opens it, a run is submitted and seen to its end, on wide and narrow screens."""

import json

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from scaling.api_server import SLOW, client, listening
from scaling.browser import CHROMIUM, browser

from cs336.scaling import EPOCH
from cs336.scaling.api.app import PAGE

FITS = "document.documentElement.scrollWidth <= innerWidth"


def test_the_page_holds_everything_it_shows():
    text = PAGE.read_text()
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "").replace("https://", "http")
    assert "innerHTML" not in text  # what others wrote is text


def type_in(tab, form, **values):
    for name, value in values.items():
        tab.js(f"document.querySelector('#{form} [name={name}]').value = {json.dumps(value)}")
    tab.js(f"document.querySelector('#{form} button.main').click()")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt install chromium")
def test_the_page_in_a_browser(tmp_path):
    with listening(tmp_path / "api", SLOW, workers=2, target=1e20) as (store, url), browser(tmp_path / "b") as tab:
        ada, eve = client(store, url, amount=1e20), client(store, url, "eve")
        ids = []
        for budget in (1e15, 1e16, 1e17):
            best = EPOCH.optimum(budget).parameters
            ids += [ada.submit(n, budget / (6 * n)).id for n in best * np.geomspace(0.2, 5, 5)]
        eve.predict(2.5, 1e9, 1e10)
        ada.wait(ids)
        tab.size(1280)
        tab.open(url)
        assert tab.js("document.getElementById('board').hidden")
        tab.js("document.getElementById('key').value = 'wrong'; document.querySelector('#enter button').click()")
        tab.until("document.getElementById('wrong').textContent.includes('Nobody')")
        key = ada._headers["Authorization"].removeprefix("Bearer ")
        tab.js(f"document.getElementById('key').value = '{key}'; document.querySelector('#enter button').click()")
        tab.until("document.querySelectorAll('#isoflop circle').length === 15")
        assert tab.js("document.querySelectorAll('#isoflop path').length") == 3
        assert tab.js("document.getElementById('who').textContent") == "ada"
        assert "9.94e19 FLOPs left" in tab.js("document.getElementById('amounts').innerText").replace("\n", "")
        assert "hidden" in tab.js("document.getElementById('leaders').innerText")

        type_in(tab, "submit", parameters="3e8", tokens="many")
        tab.until("document.querySelector('#submit p').textContent === 'tokens must be a number, got many'")
        type_in(tab, "submit", parameters="3e8", tokens="1e12")
        tab.until("document.querySelector('#submit p').textContent.includes('are left of your budget')")
        type_in(tab, "submit", parameters="1e8", tokens="1e11")  # two minutes
        tab.until("document.querySelector('#runs .running') && document.querySelectorAll('#curves path').length === 8")
        for width in (1280, 390):
            tab.size(width)
            assert tab.js(FITS), width
            tab.js("look()")
            tab.screenshot(tmp_path / f"{width}.png")
        type_in(tab, "submit", parameters="1e6", tokens="1e9", seed="5")
        tab.until("document.getElementById('counts').textContent === '16 done, 1 running'")
        tab.js("document.querySelector('#runs button').click()")
        tab.until("document.getElementById('counts').textContent === '16 done, 1 cancelled'")
        type_in(tab, "predict", loss="2.7", parameters="1e9", tokens="1e10")
        tab.until("document.getElementById('leaders').innerText.includes('ada')")
        assert ada.submission().loss == 2.7
        tab.open(url)
        tab.until("!document.getElementById('board').hidden")  # the tab remembers the key
        tab.js("document.getElementById('leave').click()")
        assert tab.js("sessionStorage.getItem('key')") is None
        assert tab.js("document.getElementById('board').hidden")

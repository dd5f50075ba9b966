"""Pages are counted right whatever is done with them, and what the prefix tree finds is what was told to it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cs336.inference.pages import PageCache


def fill(cache, tokens, step=0):
    """A sequence of these tokens: matched, computed, told to the tree. Returns its pages and how many were known."""
    match = cache.match(tokens, len(tokens), step)
    size = cache.page_size
    pages = match.pages + (cache.take(len(tokens) // size - len(match.pages)) or [])
    node = match.node
    for i in range(len(match.pages), len(tokens) // size):
        node = cache.remember(node, tuple(tokens[i * size : (i + 1) * size]), pages[i], step)
        pages[i] = node.page
    if match.copy is not None:
        cache.release([match.copy])
    return pages, match


def test_what_is_known_is_shared():
    cache = PageCache(8, 2)
    first, _ = fill(cache, [1, 2, 3, 4])
    second, match = fill(cache, [1, 2, 3, 5])
    assert (match.tokens, match.copy) == (2, None)  # the page [3, 4] is of this very step
    assert second[0] == first[0]
    assert second[1] != first[1]
    cache.check([first, second])
    later, match = fill(cache, [1, 2, 3, 6], step=1)
    assert match.tokens == 3
    assert match.copy in (first[1], second[1])
    cache.release(first + second + later)
    cache.check([])
    assert (cache.available, cache.in_use) == (8, 0)
    pages, match = fill(cache, [1, 2, 3, 4], step=2)
    assert (pages, match.tokens) == (first, 4)  # still known


def test_the_oldest_leaf_gives_way_first():
    cache = PageCache(4, 1)
    old, _ = fill(cache, [1, 2])
    new, _ = fill(cache, [3, 4])
    cache.release(old)
    cache.release(new)
    assert cache.take(1) == [old[1]]
    assert cache.match([1, 2], 2, 1).tokens == 1
    assert cache.match([3, 4], 2, 1).tokens == 2
    assert cache.take(1) is None  # the other three are held


def test_two_that_computed_the_same_hold_one_page():
    cache = PageCache(4, 2)
    (a,), (b,) = cache.take(1), cache.take(1)
    assert cache.remember(cache.root, (1, 2), a, 0).page == a
    assert cache.remember(cache.root, (1, 2), b, 0).page == a
    assert cache.available == 3
    cache.check([[a], [a]])


def test_a_match_stops_where_it_is_told():
    cache = PageCache(8, 2)
    fill(cache, [1, 2, 3, 4])
    for most, pages, tokens in ((4, 2, 4), (3, 1, 3), (2, 1, 2), (1, 0, 1), (0, 0, 0)):
        match = cache.match([1, 2, 3, 4], most, 1)
        assert (len(match.pages), match.tokens, match.copy is None) == (pages, tokens, tokens == 2 * pages)


def test_forgetting():
    cache = PageCache(4, 1)
    pages, _ = fill(cache, [1, 2, 3])
    cache.release(pages)
    cache.forget()
    cache.check([])
    assert cache.match([1, 2, 3], 3, 1).tokens == 0
    assert len(cache.take(4)) == 4


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_order_of_things_keeps_the_books(data):
    size = data.draw(st.integers(1, 3))
    cache = PageCache(data.draw(st.integers(1, 12)), size)
    held = []
    for step in range(data.draw(st.integers(1, 25))):
        if held and data.draw(st.booleans()):
            cache.release(held.pop(data.draw(st.integers(0, len(held) - 1))))
        else:
            tokens = data.draw(st.lists(st.integers(0, 1), max_size=8))
            match = cache.match(tokens, len(tokens), step)
            assert len(match.pages) * size <= match.tokens <= len(tokens)
            missing = -(-len(tokens) // size) - len(match.pages)
            before = cache.available
            taken = cache.take(missing)
            if match.copy is not None:
                cache.release([match.copy])
            if taken is None:
                assert before < missing
                cache.release(match.pages)
            else:
                assert not set(taken) & {page for pages in held for page in pages}
                pages, node = match.pages + taken, match.node
                for i in range(len(match.pages), len(tokens) // size):
                    node = cache.remember(node, tuple(tokens[i * size : (i + 1) * size]), pages[i], step)
                    pages[i] = node.page
                held.append(pages)
        cache.check(held)
    for pages in held:
        cache.release(pages)
    assert cache.available == cache.num_pages
    assert len(cache.take(cache.num_pages)) == cache.num_pages  # all that is known gives way
    with pytest.raises(AssertionError):
        cache.check([])

"""Pages of the cache on the host: who holds which, and which tokens an idle page still knows.

A page is held by each sequence that reads it, and by the prefix tree once its tokens are complete: a node is a page,
its tokens, and the node before. Who begins with the same tokens reads the same pages. A page is written by the one
sequence that took it; of a page that begins right and goes on otherwise, a copy is made. Idle pages, which the tree
alone holds, are given away when no free ones are left: leaves first, the longest unused first.

    take:  free -> 1 holder        remember: + the tree        release: - a holder, and free at none
"""

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

SIBLINGS = 32  # looked through for a page to copy: the newest, so that a match costs the same in a crowd


@dataclass(eq=False, slots=True)
class Node:
    tokens: tuple[int, ...] = ()
    page: int = -1
    parent: "Node | None" = None
    born: int = 0
    """The step in which its page is written."""
    used: int = 0
    children: dict[tuple[int, ...], "Node"] = field(default_factory=dict)


@dataclass(frozen=True)
class Match:
    """What the tree knows of a sequence's beginning; its pages are held for the caller."""

    node: Node
    pages: list[int]
    tokens: int
    """Known in all, of which those past the pages are the beginning of `copy`."""
    copy: int | None = None
    """A page to copy, held for the caller too."""


class PageCache:
    """num_pages pages of page_size tokens. remembering: keep a prefix tree."""

    def __init__(self, num_pages: int, page_size: int, *, remembering: bool = True):
        self.num_pages, self.page_size, self.remembering = num_pages, page_size, remembering
        self.root = Node()
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages
        self._node_of: list[Node | None] = [None] * num_pages
        self._idle = 0
        self._leaves: list[tuple[int, int]] = []  # heap of (used, page); entries that no longer hold are skipped
        self._clock = 0

    @property
    def available(self) -> int:
        """Pages that can be taken: free or idle."""
        return len(self._free) + self._idle

    @property
    def in_use(self) -> int:
        return self.num_pages - self.available

    def take(self, count: int) -> list[int] | None:
        """Pages of which the caller is the one holder, or None if there are not so many: then none is taken."""
        if count > self.available:
            return None
        while len(self._free) < count:
            self._evict()
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Give back what was taken or matched, once each; those that the tree knows stay until they are wanted."""
        self._clock += 1
        for page in pages:
            assert self._holders[page] > (self._node_of[page] is not None)
            self._holders[page] -= 1
            node = self._node_of[page]
            if not self._holders[page]:
                self._free.append(page)
            elif node is not None and self._holders[page] == 1:
                self._idle += 1
                node.used = self._clock
                self._push(node)

    def match(self, token_ids: Sequence[int], most: int, step: int) -> Match:
        """The longest known beginning of token_ids, of `most` tokens at most. A page that step `step` itself will write
        can be read by it, but not be copied before."""
        node, size = self.root, self.page_size
        pages: list[int] = []
        while (at := len(pages) * size) + size <= most:
            found = node.children.get(tuple(token_ids[at : at + size]))
            if found is None:
                break
            self._hold(found.page)
            node = found
            pages.append(found.page)
        copy, common = None, 0
        rest = token_ids[at : min(at + size, most)]
        for child in itertools.islice(reversed(node.children.values()), SIBLINGS):
            same = next((i for i, (a, b) in enumerate(zip(rest, child.tokens, strict=False)) if a != b), len(rest))
            if same > common and child.born < step:
                copy, common = child.page, same
        if copy is not None:
            self._hold(copy)
        return Match(node, pages, at + common, copy)

    def remember(self, parent: Node, tokens: tuple[int, ...], page: int, step: int) -> Node:
        """The node of a complete page that the caller holds. Where the tree has those tokens already, the caller holds
        the node's page in place of its own, which is released."""
        node = parent.children.get(tokens)
        if node is None:
            node = parent.children[tokens] = Node(tokens, page, parent, step)
            self._node_of[page] = node
            self._holders[page] += 1
        elif node.page != page:
            self._hold(node.page)
            self.release([page])
        return node

    def forget(self) -> None:
        """Empty the tree, all pages of which must be idle: the weights have changed."""
        for page, node in enumerate(self._node_of):
            if node is not None:
                assert self._holders[page] == 1
                self._drop(node)
        self._leaves.clear()
        self.root = Node()

    def check(self, held: Sequence[Sequence[int]]) -> None:
        """Raises AssertionError unless the holders are the tree and these lists of pages, and all else is free."""
        count = [0] * self.num_pages
        for page in itertools.chain(*held):
            count[page] += 1
        nodes = [node for node in self._node_of if node is not None]
        for node in nodes:
            assert self._node_of[node.page] is node
            assert node.parent is not None
            assert node.parent.children[node.tokens] is node
            assert node.parent is self.root or count[node.parent.page] >= count[node.page], "a child without its parent"
        for node in nodes:
            count[node.page] += 1
        assert count == self._holders, "pages are held by others than their sequences"
        assert sorted(self._free) == [page for page, holders in enumerate(count) if not holders]
        assert self._idle == sum(self._holders[node.page] == 1 for node in nodes)
        reachable, todo = 0, [self.root]
        while todo:
            children = todo.pop().children.values()
            reachable += len(children)
            todo += children
        assert reachable == len(nodes)

    def _hold(self, page: int) -> None:
        self._idle -= self._holders[page] == 1 and self._node_of[page] is not None
        self._holders[page] += 1

    def _push(self, node: Node) -> None:
        if not node.children:
            heapq.heappush(self._leaves, (node.used, node.page))
        if len(self._leaves) > 4 * self.num_pages:
            self._leaves = [entry for entry in set(self._leaves) if self._is_idle_leaf(*entry)]
            heapq.heapify(self._leaves)

    def _is_idle_leaf(self, used: int, page: int) -> bool:
        node = self._node_of[page]
        return node is not None and node.used == used and not node.children and self._holders[page] == 1

    def _evict(self) -> None:
        used, page = heapq.heappop(self._leaves)
        node = self._node_of[page]
        if node is None or not self._is_idle_leaf(used, page):
            return
        parent = node.parent
        self._drop(node)
        if parent is not None and parent is not self.root and self._is_idle_leaf(parent.used, parent.page):
            self._push(parent)

    def _drop(self, node: Node) -> None:
        assert node.parent is not None
        del node.parent.children[node.tokens]
        self._node_of[node.page] = None
        self._holders[node.page] = 0
        self._free.append(node.page)
        self._idle -= 1

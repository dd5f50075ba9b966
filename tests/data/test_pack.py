"""Packed and shuffled shards: nothing is lost, documents stay whole, bins are as full as best-fit makes them."""

import collections

import numpy as np
import pytest

from cs336 import _text
from cs336.data import TokenDataset
from cs336.data.pack import pack_shards, shuffle_shards, shuffled
from cs336.utils.shards import ShardWriter, open_tokens

EOT = 0


def slow_best_fit(lengths, capacity):
    """Rooms of the bins, each item by a search through all bins."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if not fitting:
            rooms.append(capacity)
            fitting = [len(rooms) - 1]
        rooms[min(fitting, key=lambda i: rooms[i])] -= length
    return sorted(rooms)


class TestBestFit:
    @pytest.mark.parametrize("capacity", [1, 7, 63, 64, 65, 4096, 5000, 300_000])
    def test_equals_a_slow_search(self, capacity):
        rng = np.random.default_rng(capacity)
        for count in (0, 1, 200):
            lengths = rng.integers(1, capacity + 1, count)
            lengths[::2] = np.maximum(1, lengths[::2] // 5)
            items, ends = _text.best_fit(lengths.astype(np.uint32), capacity)
            assert sorted(items.tolist()) == list(range(count))
            bins = np.split(lengths[items.astype(int)], ends[:-1].astype(int)) if count else []
            assert sorted(capacity - int(b.sum()) for b in bins) == slow_best_fit(lengths.tolist(), capacity)

    def test_millions_of_documents_take_seconds(self):
        lengths = np.random.default_rng(0).geometric(1 / 300, 1_000_000).clip(1, 2048).astype(np.uint32)
        items, ends = _text.best_fit(lengths, 2048)
        assert len(items) == len(lengths)
        assert int(lengths.sum()) / (len(ends) * 2048) > 0.999

    @pytest.mark.parametrize("lengths", [[0], [6], [3, 9]])
    def test_refuses_what_fits_nowhere(self, lengths):
        with pytest.raises(ValueError, match=r"does not fit into 1\.\.5"):
            _text.best_fit(np.array(lengths, np.uint32), 5)


def write(directory, documents, shard_tokens=97):
    with ShardWriter(directory, vocab_size=1000, tokenizer="t", eot_id=EOT, shard_tokens=shard_tokens) as writer:
        for document in documents:
            writer.write(np.array(document, np.uint16), documents=1, text_bytes=7)


def split(tokens):
    """The documents of a stream, without padding."""
    out, current = [], []
    for token in tokens.tolist():
        if token == EOT:
            out.append(tuple(current))
            current = []
        else:
            current.append(token)
    return [d for d in [*out, tuple(current)] if d]


@pytest.fixture
def documents():
    rng = np.random.default_rng(0)
    return [[*rng.integers(1, 1000, rng.integers(1, 60)), EOT] for _ in range(300)]


def tokens_of(directory):
    parts, meta = open_tokens(directory)
    return np.concatenate(parts), meta


class TestPack:
    def test_documents_that_fit_are_whole_within_one_window(self, tmp_path, documents):
        write(tmp_path / "in", documents)
        report = pack_shards(tmp_path / "in", tmp_path / "out", 64)
        tokens, meta = tokens_of(tmp_path / "out")
        windows = tokens[:-1].reshape(-1, 64)
        found = [d for window in windows for d in split(window)]
        assert collections.Counter(found) == collections.Counter(tuple(d[:-1]) for d in documents)
        assert (meta.documents, meta.text_bytes, meta.eot_id, meta.tokenizer) == (300, 2100, EOT, "t")
        assert (report.documents, report.cut, report.windows, report.tokens) == (300, 0, len(windows), len(tokens))
        assert report.padding == len(tokens) - sum(map(len, documents))
        assert report.windows == len(slow_best_fit([len(d) for d in documents], 64))

    def test_the_dataset_reads_these_windows(self, tmp_path, documents):
        write(tmp_path / "in", documents)
        report = pack_shards(tmp_path / "in", tmp_path / "out", 64, shard_tokens=500)
        dataset = TokenDataset(tmp_path / "out", 64)
        assert len(dataset) == report.windows
        whole = {tuple(d[:-1]) for d in documents}
        assert all(d in whole for i in range(len(dataset)) for d in split(dataset[i][0].numpy()))

    def test_longer_documents_give_windows_and_a_rest(self, tmp_path):
        document = [*range(1, 26), EOT]
        write(tmp_path / "in", [document, [90, EOT]])
        report = pack_shards(tmp_path / "in", tmp_path / "out", 10)
        tokens, _ = tokens_of(tmp_path / "out")
        windows = {tuple(w) for w in tokens[:-1].reshape(-1, 10).tolist()}
        rest = (*document[20:], 90, EOT, EOT, EOT)
        assert windows == {tuple(document[:10]), tuple(document[10:20]), rest}
        assert (report.cut, report.padding) == (1, 3)

    @pytest.mark.parametrize(
        "make",
        [lambda a, b, seed: pack_shards(a, b, 32, seed=seed), lambda a, b, seed: shuffle_shards(a, b, seed=seed)],
    )
    def test_is_a_function_of_tokens_and_seed(self, tmp_path, documents, make):
        write(tmp_path / "in", documents)
        write(tmp_path / "one", documents, shard_tokens=10**6)
        for name, source, seed in [("a", "in", 0), ("b", "one", 0), ("c", "in", 1)]:
            make(tmp_path / source, tmp_path / name, seed)
        a, b, c = (tokens_of(tmp_path / name)[0] for name in "abc")
        assert (a == b).all()
        assert len(a) == len(c)
        assert (a != c).any()

    def test_a_last_document_without_its_end_is_kept(self, tmp_path):
        write(tmp_path / "in", [[1, 2, EOT], [3, 4]])
        pack_shards(tmp_path / "in", tmp_path / "out", 4)
        assert sorted(split(tokens_of(tmp_path / "out")[0])) == [(1, 2), (3, 4)]

    def test_the_tokenizer_travels_along(self, tmp_path):
        with ShardWriter(
            tmp_path / "in", vocab_size=9, tokenizer="t", eot_id=EOT, save_tokenizer=lambda p: open(p, "w").write("{}")
        ) as writer:
            writer.write(np.array([1, EOT], np.uint16), documents=1)
        pack_shards(tmp_path / "in", tmp_path / "out", 4)
        assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"

    def test_refuses_what_cannot_be_packed(self, tmp_path, documents):
        write(tmp_path / "in", documents)
        with pytest.raises(ValueError, match="both read and written"):
            pack_shards(tmp_path / "in", tmp_path / "in", 8)
        with pytest.raises(ValueError, match="context_length must be"):
            pack_shards(tmp_path / "in", tmp_path / "out", 0)
        with pytest.raises(ValueError, match="do not say where documents end"):
            pack_shards(tmp_path / "in" / "00000.bin", tmp_path / "out", 8)
        write(tmp_path / "empty", [[]])
        with pytest.raises(ValueError, match="holds no tokens"):
            pack_shards(tmp_path / "empty", tmp_path / "out", 8)
        assert not (tmp_path / "out").exists()


class TestShuffle:
    def test_documents_are_the_same_in_another_order(self, tmp_path, documents):
        write(tmp_path / "in", documents)
        meta = shuffle_shards(tmp_path / "in", tmp_path / "out", seed=3, shard_tokens=100)
        tokens, found = tokens_of(tmp_path / "out")
        order = split(tokens)
        assert found == meta
        assert (meta.documents, meta.tokens) == (300, sum(map(len, documents)))
        plain = [tuple(d[:-1]) for d in documents]
        assert collections.Counter(order) == collections.Counter(plain)
        assert order == [plain[i] for i in shuffled(300, 3)]

    def test_orders_are_random(self):
        places = np.stack([np.argsort(shuffled(50, seed)) for seed in range(400)])
        assert np.abs(places.mean(0) - 24.5).max() < 4 * 14.4 / 20
        assert (np.sort(places, 1) == np.arange(50)).all()
        assert len(shuffled(0, 5)) == 0

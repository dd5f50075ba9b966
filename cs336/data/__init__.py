"""From documents to batches: sources, split, token shards, packed windows, a shuffled loader with a saved position.

The names that need torch load it when they are first used, so that a tokenizer alone can make shards.
"""

import importlib
from typing import TYPE_CHECKING, Any

from cs336.data.corpus import for_split as for_split
from cs336.data.corpus import in_validation as in_validation
from cs336.data.corpus import select as select
from cs336.data.tokenize import tokenize_corpus as tokenize_corpus
from cs336.data.tokenize import tokenize_documents as tokenize_documents
from cs336.data.tokenize import tokenizer_of as tokenizer_of
from cs336.utils.documents import Document as Document
from cs336.utils.documents import read_documents as read_documents
from cs336.utils.documents import read_texts as read_texts
from cs336.utils.shards import ShardWriter as ShardWriter
from cs336.utils.shards import TokenMeta as TokenMeta
from cs336.utils.shards import read_meta as read_meta
from cs336.utils.shards import read_shard as read_shard
from cs336.utils.shards import write_shard as write_shard

if TYPE_CHECKING:
    from cs336.data.dataset import TokenDataset as TokenDataset
    from cs336.data.dataset import get_batch as get_batch
    from cs336.data.loader import TokenLoader as TokenLoader

_HOME = {"TokenDataset": "dataset", "get_batch": "dataset", "TokenLoader": "loader"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"cs336.data.{_HOME[name]}"), name)
    raise AttributeError(f"module 'cs336.data' has no attribute {name!r}")

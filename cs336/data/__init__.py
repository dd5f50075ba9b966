"""From pages to batches: text extraction, filters, deduplication, split, token shards, packed windows, a loader.

The names that need torch or an optional package load it when they are first used, so that a tokenizer alone can make
shards, and a filter needs nothing but itself.
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
    from cs336.data.build.job import Build as Build
    from cs336.data.dataset import TokenDataset as TokenDataset
    from cs336.data.dataset import get_batch as get_batch
    from cs336.data.decontaminate import Decontaminator as Decontaminator
    from cs336.data.dedup.bloom import BloomFilter as BloomFilter
    from cs336.data.dedup.lines import dedup_documents as dedup_documents
    from cs336.data.dedup.lines import dedup_lines as dedup_lines
    from cs336.data.dedup.minhash import dedup_minhash as dedup_minhash
    from cs336.data.dedup.minhash import minhash as minhash
    from cs336.data.dedup.minhash import near_duplicates as near_duplicates
    from cs336.data.dedup.paragraphs import dedup_paragraphs as dedup_paragraphs
    from cs336.data.dedup.semantic import semantic_duplicates as semantic_duplicates
    from cs336.data.dedup.substrings import dedup_substrings as dedup_substrings
    from cs336.data.dedup.substrings import repeated_spans as repeated_spans
    from cs336.data.extract.html import html_to_text as html_to_text
    from cs336.data.extract.pdf import pdf_to_text as pdf_to_text
    from cs336.data.filter.classifier import Classifier as Classifier
    from cs336.data.filter.language import identify_language as identify_language
    from cs336.data.filter.perplexity import NgramModel as NgramModel
    from cs336.data.filter.pii import mask_cards as mask_cards
    from cs336.data.filter.pii import mask_emails as mask_emails
    from cs336.data.filter.pii import mask_ip_addresses as mask_ip_addresses
    from cs336.data.filter.pii import mask_phone_numbers as mask_phone_numbers
    from cs336.data.filter.pii import mask_secrets as mask_secrets
    from cs336.data.filter.rules import c4_quality as c4_quality
    from cs336.data.filter.rules import fineweb_quality as fineweb_quality
    from cs336.data.filter.rules import gopher_quality as gopher_quality
    from cs336.data.filter.rules import gopher_repetition as gopher_repetition
    from cs336.data.loader import TokenLoader as TokenLoader
    from cs336.data.mix import MixSource as MixSource
    from cs336.data.mix import mix_documents as mix_documents
    from cs336.data.pack import pack_shards as pack_shards
    from cs336.data.pack import shuffle_shards as shuffle_shards
    from cs336.data.recipe import Recipe as Recipe

_NAMES = {
    "build.job": ["Build"],
    "recipe": ["Recipe"],
    "dataset": ["TokenDataset", "get_batch"],
    "loader": ["TokenLoader"],
    "extract.html": ["html_to_text"],
    "extract.pdf": ["pdf_to_text"],
    "decontaminate": ["Decontaminator"],
    "filter.classifier": ["Classifier"],
    "filter.perplexity": ["NgramModel"],
    "mix": ["MixSource", "mix_documents"],
    "pack": ["pack_shards", "shuffle_shards"],
    "filter.language": ["identify_language"],
    "filter.pii": ["mask_cards", "mask_emails", "mask_ip_addresses", "mask_phone_numbers", "mask_secrets"],
    "filter.rules": ["c4_quality", "fineweb_quality", "gopher_quality", "gopher_repetition"],
    "dedup.bloom": ["BloomFilter"],
    "dedup.lines": ["dedup_documents", "dedup_lines"],
    "dedup.minhash": ["dedup_minhash", "minhash", "near_duplicates"],
    "dedup.paragraphs": ["dedup_paragraphs"],
    "dedup.semantic": ["semantic_duplicates"],
    "dedup.substrings": ["dedup_substrings", "repeated_spans"],
}
_HOME = {name: home for home, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"cs336.data.{_HOME[name]}"), name)
    raise AttributeError(f"module 'cs336.data' has no attribute {name!r}")

"""Sources: crawls, pages, papers, texts, source trees, rows of tables, as records that are bounded and named."""

from cs336.data.sources.record import Limits as Limits
from cs336.data.sources.record import Record as Record
from cs336.data.sources.record import Unread as Unread
from cs336.data.sources.unit import Unit as Unit
from cs336.data.sources.warc import read_archive as read_archive
from cs336.data.sources.warc_writer import WarcWriter as WarcWriter

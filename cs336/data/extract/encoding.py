"""The character encoding of a page, and its text."""

import codecs
import re

PRESCAN = 4096  # bytes in which a <meta> may declare the encoding; the standard asks for 1024, pages do not keep to it
META = re.compile(rb"""<(?:meta|\?xml)[^>]*?(?:charset|encoding)\s*=\s*["']?\s*([A-Za-z0-9_.:-]+)""", re.IGNORECASE)
BOMS = [(codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")]
UTF_16 = {"utf-16": "utf-16-le", "utf-16le": "utf-16-le", "utf-16be": "utf-16-be"}  # which a header may say
# The web's meaning of a label where it is wider than Python's.
WIDER = {
    "iso8859-1": "cp1252",
    "ascii": "cp1252",
    "iso8859-9": "cp1254",
    "iso8859-11": "cp874",
    "tis-620": "cp874",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "big5": "cp950",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
    "utf-16": "utf-8",  # what names its encoding in ASCII is not UTF-16
    "utf-16-le": "utf-8",
    "utf-16-be": "utf-8",
}
# Labels of the web that Python does not know.
LABELS = {
    label: codec
    for codec, labels in {
        "utf-8": "unicode-1-1-utf-8 unicode11utf8 unicode20utf8",
        "utf-16": "ucs-2 unicode csunicode iso-10646-ucs-2 unicodefeff unicodefffe",
        "iso8859-7": "sun_eu_greek",
        "iso8859-8": "logical visual",
        "iso8859-15": "csisolatin9",
        "koi8-r": "koi koi8",
        "koi8-u": "koi8-ru",
        "mac-roman": "mac csmacintosh",
        "mac-cyrillic": "mac-ukrainian",
        "gb18030": "csgb2312 gb_2312 gb_2312-80",
        "big5": "cn-big5",
        "euc_jp": "cseucpkdfmtjapanese",
        "cp932": "windows-31j",
        "cp949": "cseuckr csksc56011987 iso-ir-149 ks_c_5601-1989 ksc_5601",
    }.items()
    for label in labels.split()
}
# Codecs of encodings that pages are in; Python has others, of which some fail on any page ("undefined" is one).
WEB = {
    *("utf-8", "cp866", "cp874", "koi8-r", "koi8-u", "mac-roman", "mac-cyrillic"),
    *(f"cp{page}" for page in range(1250, 1259)),
    *(f"iso8859-{part}" for part in (2, 3, 4, 5, 6, 7, 8, 10, 13, 14, 15, 16)),
    *("gb18030", "hz", "cp950", "big5hkscs", "euc_jp", "iso2022_jp", "cp932", "cp949", "iso2022_kr"),
}
GUESSES = {  # encodings of languages that fill few code points, and the range of those
    "cp932": r"[\u3040-\u30ff]",
    "euc_jp": r"[\u3040-\u30ff]",
    "gb18030": r"[\u4e00-\u9fa5]",
    "big5": r"[\u4e00-\u9fa5]",
    "cp949": r"[\uac00-\ud7a3]",
    "cp1251": r"[а-яё]{3,}",  # words: one such letter in a French page is an accented one
    "koi8-r": r"[а-яё]{3,}",
}
FREQUENT_HAN = "的一是不了在人有我他这這个個们們中来來上大为為和国國地到以说說时時要就出会會可也你对對生能而子那得于"
SAMPLE = 1 << 16
REPLACEMENT = "\ufffd"


def detect_encoding(page: bytes, charset: str = "") -> str:
    """The name of a codec of Python's: by byte order mark, `charset`, `<meta>` or XML declaration, or what the bytes
    look like.

    charset: what the header that came with the page says, "" for nothing.
    A page that is valid UTF-8 with other than ASCII in it is UTF-8, whatever it says. One that is not, and says that it
    is, is what its next sign says. Without a sign: windows-1252.
    """
    for mark, name in BOMS:
        if page.startswith(mark):
            return name
    sample = page[:SAMPLE]
    if (wide := UTF_16.get(charset.strip().lower())) and b"\0" in sample:
        return wide
    if not sample.isascii() and _is_utf8(sample, whole=len(page) <= SAMPLE):
        return "utf-8"
    nearly = _is_nearly(sample, "utf-8")
    for label in (charset, *(found.decode() for found in META.findall(page[:PRESCAN]))):
        declared = _codec(label)
        if declared is not None and (declared != "utf-8" or nearly):
            return declared
    return "utf-8" if nearly else _guess(sample)


def decode(page: bytes, charset: str = "") -> str:
    """The text of a page; bytes that the encoding does not have become U+FFFD. charset: as in `detect_encoding`."""
    return page.decode(detect_encoding(page, charset), "replace").removeprefix("\ufeff")


def _codec(label: str) -> str | None:
    """The codec that the web means by a label, as by windows-874, x-sjis, iso-8859-8-i; None where it means none."""
    label = re.sub(r"^(?:x-)+|(?<=iso-8859-[68])-[ie]$", "", label.strip().lower())
    label = re.sub(r"^(?:cs)?iso8859(\d+)[ei]?$", r"iso-8859-\1", label)
    try:
        name = codecs.lookup(LABELS.get(label) or re.sub(r"^(?:windows|dos)-(?=\d)", "cp", label)).name
    except (LookupError, ValueError):  # of a label with a NUL
        return None
    name = WIDER.get(name, name)
    return name if name in WEB else None


def _is_utf8(sample: bytes, whole: bool) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(sample, final=whole)  # a sample may end within a character
    except UnicodeDecodeError:
        return False
    return True


def _is_nearly(sample: bytes, encoding: str) -> bool:
    """Whether at most one in ten characters that are not ASCII is broken."""
    text = sample.decode(encoding, "replace")
    return text.count(REPLACEMENT) * 10 <= len(text) - len(text.encode("ascii", "ignore"))


def _guess(sample: bytes) -> str:
    """The encoding whose language fills the text best, if any fills half of what is not ASCII."""
    best, best_share = "cp1252", 0.5
    for name, letters in GUESSES.items():
        text = re.sub(r"[\x00-\x7f]+", " ", sample.decode(name, "replace"))
        size = len(text.replace(" ", ""))
        if size == 0 or text.count(REPLACEMENT) * 50 > size:
            continue
        share = sum(map(len, re.findall(letters, text))) / size
        if name in ("gb18030", "big5"):  # nearly all pairs of bytes are some Han character: ask for frequent ones
            share *= min(1.0, 8 * sum(map(text.count, FREQUENT_HAN)) / size)
        if share > best_share:
            best, best_share = name, share
    return best

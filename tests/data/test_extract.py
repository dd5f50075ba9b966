"""Pages and papers to text."""

import time

import pytest

from cs336.data import html_to_text, pdf_to_text
from cs336.data.extract.encoding import decode, detect_encoding

PAGE = """<!doctype html><html><head><title>Rivers of the north</title><style>p {color: red}</style></head><body>
<header><nav class="menu"><ul><li><a href="/">Home</a><li><a href="/news">News</a><li><a href="/about">About us</a></ul>
</nav></header>
<div class="sidebar"><h3>Most read</h3><ul><li><a href="/1">Ten boats you must see</a>
<li><a href="/2">Cheap flights</a></ul></div>
<article><h1>Rivers of the north</h1>
<p>The river rises in the hills, where the snow of the long winter melts late in May, and it runs for two hundred miles
before it meets the sea near a small town that few people have ever heard of.</p>
<p>Along its banks, the villages have kept their old mills, and in the summer, when the water is low, one can still walk
from one side to the other without getting wet above the knee, as the farmers did for centuries.</p>
<p>Nobody knows how old the bridge is, but the stones in its arches,
some of them larger than a man, were cut by hand.</p>
</article>
<div class="comments"><h3>Comments</h3><p>Reply</p><p><a href="#">Log in to post</a></p></div>
<footer class="footer"><p>Copyright 2020 North Media.
<a href="/terms">Terms</a> <a href="/privacy">Privacy</a></p></footer>
</body></html>"""


def test_main_content_is_the_article_alone():
    text = html_to_text(PAGE)
    assert "rises in the hills" in text
    assert "kept their old mills" in text
    assert "cut by hand" in text
    for noise in ("Cheap flights", "About us", "Log in", "Copyright", "color: red"):
        assert noise not in text
        assert noise in html_to_text(PAGE, mode="full") or noise == "color: red"


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<div>Hello world</div>", "Hello world"),
        ("<div>One</div><div>two<div hidden>three</div></div>", "One\n\ntwo"),
        ("<div>" * 2000 + "deep", "deep"),
        ("<div hidden>nothing</div><script>x</script>", ""),
    ],
)
def test_a_short_page_without_an_article_is_its_own_content(html, text):
    assert html_to_text(html) == html_to_text(html, mode="full") == text


def test_markdown_keeps_structure():
    html = """<h2>Head <b>line</b></h2><p>One <a href="/a b?x=1&amp;y=2">link <i>here</i></a>, <b>two</b>.</p>
    <ul><li>a<li>b<ul><li>b1</ul><li>c<p>more</ul><ol start=3><li>x<li>y</ol>
    <table><tr><th>A<th>B<tr><td>1<td>2|3<tr><td><td>only b</table>
    <blockquote><p>quoted</blockquote><pre><code>def f():
    return 1
</code></pre><p>use <code>f()</code>"""
    assert html_to_text(html, "full", "markdown") == (
        "## Head line\n\nOne [link *here*](/a%20b?x=1&y=2), **two**.\n\n- a\n- b\n  - b1\n- c\n  more\n\n3. x\n4. y\n\n"
        "| A | B |\n| --- | --- |\n| 1 | 2\\|3 |\n|  | only b |\n\n> quoted\n\n"
        "```\ndef f():\n    return 1\n```\n\nuse `f()`"
    )


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>a<p>b<div>c</div>d", "a\n\nb\n\nc\n\nd"),
        ("<p>one<br>two<br><br>three", "one\ntwo\n\nthree"),
        (
            "a &lt; b &#8212; &#x41; &eacute; &notin; &amp;amp; &unknown; &#0; &#150;",
            "a < b — A é ∉ &amp; &unknown; � –",
        ),
        ("x<script>if (a < b) '</p>'</script>y<!-- no > --> z<style>q</style>", "xy z"),
        ("<div><noscript><div>no</div></noscript>yes</div>", "yes"),
        ("<select><option>1<option>2</select>after", "after"),
        ("<select><option>1<div>after</div></div></div>", ""),
        ("<svg/>after<svg><title>t</title><text>no</text></svg>", "after"),
        ("<textarea><b>no</b></textarea>t<title>x</title>", "t"),
        ("<p style='display: none'>hidden</p><p hidden>too</p>seen", "seen"),
        ("<table><tr><td>a<td>b<tr><td>c<td>d</table>", "a\tb\nc\td"),
        ("<b><p>bold</b> rest</p>end", "bold rest\n\nend"),
        ("3 < 4 & 5 > 2 </", "3 < 4 & 5 > 2"),
        ("a<!-- no --!>b<!---!>no-->c<!--->d<!-->e<!--!>no-->f<!--", "abcdef"),
        ("x<script>'</scripted>'</script >y<title>t</titles></title\n>z", "xyz"),
        ("\ufeffa\0b<p>\0</p>", "ab"),
        ("<html><head>\n<title>t</title>a</head><p>b<html><head><title>t</title>c</head><body>d", "a\n\nb\n\nc\n\nd"),
        ("", ""),
        ("<p>  </p>&nbsp;", ""),
    ],
)
def test_markup_is_read_as_browsers_read_it(html, text):
    assert html_to_text(html, mode="full") == text


def test_a_new_link_ends_the_one_before():
    assert html_to_text("<a href=x>one <a href=y>two</a> three", "full", "markdown") == "[one](x) [two](y) three"


def test_pages_of_any_encoding():
    cyrillic = "<p>Мы долго шли по дороге, и наконец увидели реку, которая текла между холмами.</p>"
    japanese = "<p>これは日本語の文章です。川は山から海へ流れていきます。とても長いです。</p>"
    assert decode(cyrillic.encode("windows-1251")) == cyrillic
    assert decode(japanese.encode("euc_jp")) == japanese
    assert decode(japanese.encode("cp932")) == japanese
    assert decode("<meta charset='iso-8859-1'>“café”".encode("windows-1252")).endswith("“café”")
    assert decode("<meta charset='iso-8859-1'>“café”".encode()).endswith("“café”")  # what it is, not what it says
    assert decode("<meta charset='utf-8'>café".encode("windows-1252")).endswith("café")
    assert decode("\ufeff<p>é".encode("utf-16-le")) == "<p>é"
    assert detect_encoding(b"<?xml version='1.0' encoding='Shift_JIS'?>") == "cp932"
    assert decode("<p>gęś, ą".encode("iso-8859-2"), "ISO-8859-2") == "<p>gęś, ą"  # what the header says
    assert decode("<meta charset='utf-8'>gęś, ą".encode("iso-8859-2"), "iso-8859-2").endswith("gęś, ą")
    for name in ("<meta charset='iso-8859-2'>", "<?xml encoding='utf-8'?><meta charset='iso-8859-2'>"):
        page = f"{name}<p>Zażółć gęślą jaźń"
        assert decode(page.encode("iso-8859-2"), "utf-8") == page  # what is so, of what is said
    assert html_to_text("<p>gęś, ą".encode("iso-8859-2"), "full", charset="iso-8859-2") == "gęś, ą"
    assert decode("<p>été я".encode("utf-16-le"), "UTF-16") == "<p>été я"
    assert decode("<p>été я".encode("utf-16-be"), "utf-16be") == "<p>été я"
    assert decode("<p>été".encode(), "utf-16le") == "<p>été"
    assert decode("<p>été".encode(), "iso-8859-1") == "<p>été"
    assert decode("<p>été à Noël ".encode() * 9 + b"\xff").startswith("<p>été")  # one broken byte
    assert html_to_text("<p>caf\xe9".encode("latin-1"), "full") == "café"
    assert html_to_text(b"\xff\xfe\x00<p>\x80ok\xc3", "full")  # whatever it is, text comes out
    assert html_to_text("a\udc80b", "full") == "a�b"


@pytest.mark.parametrize(
    "html",
    [
        "<div>" * 100_000 + "deep" + "</div>" * 100_000,
        "<b><p>" * 100_000 + "deep",
        "<table><tr><td>" * 50_000 + "deep",
        "<ul><li>" * 50_000 + "deep" + "<p>a<a href=x>" * 50_000,
        "<noscript>" * 100_000,
        "deep" + "<a href='" * 100_000,
        "deep" + "&amp" * 300_000 + "&#" * 100_000,
        "deep" + "<!--" * 100_000 + "</script" * 100_000,
        "deep<script>" + "</scrip" * 200_000,
    ],
    ids=lambda html: html[:12],
)
@pytest.mark.parametrize("mode", ["main", "full"])
def test_hostile_pages_take_linear_time(html, mode):
    start = time.process_time()
    html_to_text(html, mode, "markdown")
    assert time.process_time() - start < 5  # quadratic work would take minutes


@pytest.mark.parametrize(
    ("label", "codec"),
    [
        ("tis-620", "cp874"),
        ("windows-874", "cp874"),
        ("iso-8859-11", "cp874"),
        ("x-sjis", "cp932"),
        ("x-gbk", "gb18030"),
        ("iso-8859-8-i", "iso8859-8"),
        ("windows-949", "cp949"),
        ("big5", "cp950"),
        ("X-CP1251", "cp1251"),
        ("windows-31j", "cp932"),
        ("ks_c_5601-1989", "cp949"),
        ("iso88592", "iso8859-2"),
        ("csISO88598I", "iso8859-8"),
        ("logical", "iso8859-8"),
        ("mac", "mac-roman"),
        ("x-mac-ukrainian", "mac-cyrillic"),
    ],
)
def test_labels_of_the_web(label, codec):
    assert detect_encoding(f"<meta charset='{label}'>".encode()) == codec


@pytest.mark.parametrize("label", ["undefined", "idna", "punycode", "utf-32", "cp037", "hex", "none", "a\0b"])
def test_labels_that_name_no_encoding_of_a_page_are_passed_over(label):
    assert html_to_text(f"<meta charset={label}><p>été".encode("cp1252"), "full") == "été"
    assert decode("<p>été".encode("cp1252"), label) == "<p>été"


def test_unknown_mode_and_format_are_refused():
    with pytest.raises(ValueError, match="mode is"):
        html_to_text("", mode="best")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected str or bytes, got NoneType"):
        html_to_text(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="format is"):
        html_to_text("", format="html")  # type: ignore[arg-type]


def make_pdf(*pages: list[tuple[int, int, str]]) -> bytes:
    """A PDF in Helvetica: of each page, lines at (x, y)."""
    count = len(pages)
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [%s] /Count %d >>" % (b" ".join(b"%d 0 R" % (4 + 2 * i) for i in range(count)), count),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for i, lines in enumerate(pages):
        stream = b"\n".join(b"BT /F1 10 Tf %d %d Td (%s) Tj ET" % (x, y, t.encode()) for x, y, t in lines)
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R"
            b" /Resources << /Font << /F1 3 0 R >> >> >>" % (5 + 2 * i)
        )
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream))
    out, places = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    size, start = len(objects) + 1, len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n%s" % (size, table)
    return out + b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (size, start)


COLUMNS = [(72, 700, "left one"), (72, 688, "left two"), (72, 650, "new paragraph"), (320, 700, "right one")]


class TestPdf:
    pytestmark = pytest.mark.usefixtures("pdfium")

    @pytest.fixture(scope="class")
    def pdfium(self):
        return pytest.importorskip("pypdfium2", reason="pypdfium2 is not installed: pip install 'cs336[data]'")

    def test_paragraphs_columns_and_pages(self, tmp_path):
        pdf = make_pdf(COLUMNS, [(72, 700, "second page")])
        text = "left one\nleft two\n\nnew paragraph\nright one\fsecond page"
        assert pdf_to_text(pdf) == text
        (tmp_path / "a.pdf").write_bytes(pdf)
        assert pdf_to_text(tmp_path / "a.pdf") == text

    def test_a_page_written_upwards_is_read_downwards(self):
        lines = [(72, 600 + 12 * i, f"line {9 - i}") for i in range(10)]
        assert pdf_to_text(make_pdf(lines)).split("\n") == [f"line {i}" for i in range(10)]

    def test_pages_and_time_are_bounded(self):
        pdf = make_pdf(*[[(72, 700, f"page {i}")] for i in range(5)])
        assert pdf_to_text(pdf, max_pages=2) == "page 0\fpage 1"
        assert pdf_to_text(pdf, max_seconds=-1) == ""

    def test_damage_is_named(self, tmp_path):
        path = tmp_path / "broken.pdf"
        path.write_bytes(b"%PDF-1.4 and then nothing")
        with pytest.raises(ValueError, match=r"broken\.pdf cannot be read: it is damaged"):
            pdf_to_text(path)

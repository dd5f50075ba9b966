"""Personal data and secrets, each found by its form and replaced by a mask.

    masked, count = mask_emails("write to jo@example.org")   # "write to |||EMAIL_ADDRESS|||", 1

Masks that stand in a text already are left alone and not counted. Every pattern takes linear time: it can only begin
where its kind of run begins, or looks no further than a few hundred characters, and never gives back what it took.
"""

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator

EMAIL_MASK = "|||EMAIL_ADDRESS|||"
PHONE_MASK = "|||PHONE_NUMBER|||"
IP_MASK = "|||IP_ADDRESS|||"
CARD_MASK = "|||CREDIT_CARD|||"
SECRET_MASK = "|||SECRET|||"

LOCAL = r"[\w!#$%&'*+/=?^`{}~-]"
EMAIL = re.compile(
    rf"""(?<![\w!#$%&*+=?^`{{}}~.-])(?=[^\s@]{{1,256}}@){LOCAL}++(?:\.{LOCAL}++)*+@
         (?:[^\W_](?:[\w-]{{0,62}})\.)+[^\W\d_]{{2,63}}+(?![\w@-])""",
    re.VERBOSE,
)

BETWEEN = "[ .\u2010\u2011-]"  # groups of digits: what is written [ .-] below, and two more hyphens
# Digits in groups, as people write them. The lookarounds keep out parts of longer numbers, decimals, versions, sums.
PHONE = re.compile(
    r"""(?<![\w.,/#$€£=+-])(?:
        (?:\(\+[1-9]\d{0,2}\)|(?:\+|00)[1-9]\d{0,2})[ .-]?                                  # +44, (+44), 0044, and then
            (?:\(0?\d{0,4}\)[ .-]?)?\d{1,5}(?:[ .-]?\d{2,5}){1,4}                           # (0)20 7946 0958
      | (?:1[ .-]?)?(?:\(\d{3}\)[ .-]{0,2}|\d{3}[ .-]?)\d{3}[ .-]?\d{4}                     # (415) 555-2671, 4155552671
      | \(\d{2,5}\)[ .-]?\d{2,4}(?:[ .-]?\d{2,4}){1,2}                                      # (020) 7946 0958
      | 0\d{1,4}[ .-]\d{2,8}(?:[ .-]\d{2,4}){0,4} | 0[1-9]\d{8,9}                           # 020 7946 0958
      | \d{2,3}([ -])\d{2,3}\1\d{2,4}(?:\1\d{2,4})?                                         # 699 956 915
      | [2-9]\d{2}-\d{4}                                                                    # 555-2671
      | (?:\(\d{3}\)[ ]?|\d{3}–)\d{3}–\d{4}                                                # with dashes
    )(?:[ ]?(?:x|ext\.?)[ ]?\d{1,5})?(?![\w/:=%$€£]|[.,-]\d)""".replace("[ .-]", BETWEEN),
    re.VERBOSE,
)
DATE = re.compile(
    r"(?:19|20)?\d\d([ .-])(?:0?[1-9]|1[0-2])\1\d{2,4}|\d{1,2}([ .-])\d{1,2}\2(?:19|20)\d\d|\d{3}-\d\d-\d{4}".replace(
        "[ .-]", BETWEEN
    )
)

OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
IPV4 = re.compile(rf"(?<![\w.-]){OCTET}(?:\.{OCTET}){{3}}(?![\w-]|\.\w)")
IPV6 = re.compile(r"(?<![\w:.])(?=[0-9a-fA-F:.]*:[0-9a-fA-F:.]*:)(?:[0-9a-fA-F:]|\.(?=\d)){2,45}+(?![\w:])")

CARD = re.compile(r"(?<![\w.,+-])(?:\d[ -]?){11,18}\d(?![\w-]|[.,]\d)")

SECRETS = re.compile(
    r"""-----BEGIN\ (?P<kind>[A-Z ]{0,20}PRIVATE\ KEY)-----(?:[^-]|-(?!----))++-----END\ (?P=kind)-----
      | (?<![A-Za-z0-9_-])(?:
            (?:AKIA|ASIA)[0-9A-Z]{16}                        # Amazon
          | gh[opsur]_[A-Za-z0-9]{36,255} | github_pat_\w{22,255} | glpat-[\w-]{20,64}
          | xox[abeoprs]-[A-Za-z0-9-]{10,250}                # Slack
          | AIza[\w-]{35}                                    # Google
          | (?:sk|pk|rk)_(?:live|test)_[A-Za-z0-9]{10,99}    # Stripe
          | sk-(?:[a-z]+-)?[\w-]{20,200} | hf_[A-Za-z0-9]{30,64} | npm_[A-Za-z0-9]{36}
          | SG\.[\w-]{16,32}\.[\w-]{16,64}                   # SendGrid
          | eyJ[\w-]{10,}+\.eyJ[\w-]{10,}+\.[\w-]{10,}+      # JSON web token
        )(?![A-Za-z0-9_-])""",
    re.VERBOSE | re.ASCII,
)
ASSIGNED = re.compile(
    r"""((?:api|access|auth|secret|private|encryption)[_-]?(?:key|token|secret)|password|passwd|client[_-]?secret)
        (["']?\s{0,8}[:=]\s{0,8}["']?)([A-Za-z0-9_+/=.~!@#$%^&*-]{12,200}+)""",
    re.VERBOSE | re.IGNORECASE,
)
ASSIGNED_WORDS = ("key", "token", "secret", "passw")  # one of them is in each name: looked for first, 10 times faster
NEIGHBOUR = 512  # characters, at most, of one that stands directly behind another
LEAST_BITS = 3.0  # a character, of an assigned secret: words and placeholders have fewer


def mask_emails(text: str, mask: str = EMAIL_MASK) -> tuple[str, int]:
    """Replace e-mail addresses. Returns the text and how many there were."""
    return _mask(text, mask, EMAIL, behind=(1, 0))


def mask_phone_numbers(text: str, mask: str = PHONE_MASK) -> tuple[str, int]:
    """Replace telephone numbers: international ones, American ones in every common form, grouped European ones.

    Dates, American social security numbers, decimals and parts of longer numbers are not telephone numbers.
    """
    return _mask(text, mask, PHONE, _is_phone_number, behind=(0,))


def mask_ip_addresses(text: str, mask: str = IP_MASK) -> tuple[str, int]:
    """Replace addresses of both versions of IP; version numbers such as 1.2.3.4.5 are none."""
    text, six = _mask(text, mask, IPV6, _is_ipv6)  # first: they may end in one of version 4
    text, four = _mask(text, mask, IPV4)
    text, last = _mask(text, mask, IPV6, _is_ipv6) if four else (text, 0)  # ::1 directly behind one of version 4
    return text, six + four + last


def mask_cards(text: str, mask: str = CARD_MASK) -> tuple[str, int]:
    """Replace payment card numbers: 12 to 19 digits, alone or in groups, whose check digit is right (Luhn)."""
    return _mask(text, mask, CARD, is_card)


def mask_secrets(text: str, mask: str = SECRET_MASK) -> tuple[str, int]:
    """Replace keys and tokens: those of known services by their form, private keys, and what is assigned to a name such
    as `api_key` or `password` and is random enough; there the name stays."""
    text, known = _mask(text, mask, SECRETS)
    total = known

    def value(match: re.Match) -> str:
        nonlocal total
        if mask in match[0] or not _is_random(match[3]):
            return match[0]
        total += 1
        return match[1] + match[2] + mask

    lower = text.lower()
    return (ASSIGNED.sub(value, text) if any(word in lower for word in ASSIGNED_WORDS) else text), total


def is_card(number: str) -> bool:
    """Whether the digits of a card number have an issuer's first digit and the right check digit."""
    digits = [int(c) for c in number if c.isdigit()]
    doubled = (sum(divmod(2 * d, 10)) for d in digits[-2::-2])
    return digits[0] in (1, 2, 3, 4, 5, 6) and len(set(digits)) > 1 and (sum(doubled) + sum(digits[-1::-2])) % 10 == 0


def _mask(
    text: str,
    mask: str,
    pattern: re.Pattern,
    accept: Callable[[str], bool] = lambda _: True,
    behind: tuple[int, ...] = (),
) -> tuple[str, int]:
    """Replace what matches and is accepted, between masks that are there already."""
    if not mask:
        raise ValueError("the mask is empty: expected a text that shows that something was here, such as " + EMAIL_MASK)
    if not isinstance(text, str):
        raise TypeError(f"expected str, got {type(text).__name__}")
    total, parts = 0, []
    for part in text.split(mask):
        kept, end = [], 0
        for begin, stop in _spans(part, pattern, accept, behind):
            kept.append(part[end:begin])
            end = stop
        total += len(kept)
        parts.append(mask.join([*kept, part[end:]]))
    return mask.join(parts), total


def _spans(
    text: str, pattern: re.Pattern, accept: Callable[[str], bool], behind: tuple[int, ...]
) -> Iterator[tuple[int, int]]:
    """What matches and is accepted, from left to right.

    behind: how far behind the end of one the next may begin whatever stands before it, as it may behind a mask:
        both of a@b.org&c@d.org, and of (555) 123-4567(555) 123-4568.
    """
    place, is_behind = 0, False
    while True:
        span = _neighbour(text, place, pattern, accept, behind) if is_behind else None
        is_behind = span is not None
        if span is None:
            match = pattern.search(text, place)
            if match is None:
                return
            span = match.span()
            is_behind = accept(match[0])
        if is_behind:
            yield span
        place = span[1]


def _neighbour(
    text: str, place: int, pattern: re.Pattern, accept: Callable[[str], bool], behind: tuple[int, ...]
) -> tuple[int, int] | None:
    for skip in behind:
        begin = place + skip
        near = text[begin : begin + NEIGHBOUR]
        match = pattern.match(near)
        is_whole = match is not None and (match.end() + 2 <= len(near) or begin + len(near) == len(text))
        if match is not None and is_whole and accept(match[0]):
            return begin, begin + match.end()
    return None


def _is_phone_number(found: str) -> bool:
    return not DATE.fullmatch(found) and 7 <= sum(c.isdigit() for c in found) <= 15


def _is_ipv6(found: str) -> bool:
    try:
        return ipaddress.ip_address(found).version == 6 and any(c.isdigit() for c in found)
    except ValueError:
        return False


def _is_random(value: str) -> bool:
    """By the entropy of its characters, and having both letters and other ones."""
    counts = Counter(value)
    bits = -sum(n / len(value) * math.log2(n / len(value)) for n in counts.values())
    return bits >= LEAST_BITS and any(c.isalpha() for c in value) and not value.isalpha()

"""Masks what points to a person: addresses of e-mail, numbers of phones, accounts and machines."""

import ipaddress
import re
from collections.abc import Collection

KINDS = ("email", "ip", "phone", "iban")

_EMAIL = re.compile(r"(?<![\w.+%-])[\w.+%-]+@(?:[\w-]+\.)+[^\W\d_]{2,}(?![\w-])")
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])[0-9a-fA-F]{0,4}(?::[0-9a-fA-F]{0,4}){2,7}(?![\w:])")
# A version or the number of a section may look like an address.
_NUMBERED = re.compile(r"(?:\b(?:v|ver|version|release|section|chapter)\.?|§)\s*$", re.IGNORECASE)
_PHONE = re.compile(
    r"(?<![\w+.])(?:\+|00)[1-9]\d{0,2}[ .()/-]*(?:\d[ .()/-]{0,3}){6,12}\d(?!\w)"
    r"|(?<![\w+.-])\(?[2-9]\d{2}\)?[ .-]\d{3}[ .-]\d{4}(?![\w-])"
)
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}(?!\w)")


def mask(text: str, kinds: Collection[str] = KINDS) -> str:
    """The text with <email>, <ip>, <phone> and <iban> in place of these.

    Only public IP addresses count, also of version 6, only numbers of phones with the code of a
    country or in the form of North America, and only numbers of accounts with the right check
    digits (ISO 13616). Equal texts give equal results. Other numbers that have one of these forms,
    such as 200-300-4000 or 1::2, are masked, too.

    Args:
        kinds: which of "email", "ip", "phone" and "iban".
    """
    if "email" in kinds and "@" in text:
        text = _EMAIL.sub("<email>", text)
    if "iban" in kinds:
        text = _IBAN.sub(_account, text)
    if "ip" in kinds:
        text = _IPV4.sub(_address, text)
        text = _IPV6.sub(_address, text)
    if "phone" in kinds:
        text = _PHONE.sub("<phone>", text)
    return text


def _address(match: re.Match[str]) -> str:
    before = match.string[max(0, match.start() - 12) : match.start()]
    try:
        public = ipaddress.ip_address(match.group()).is_global
    except ValueError:
        return match.group()
    return "<ip>" if public and not _NUMBERED.search(before) else match.group()


def _account(match: re.Match[str]) -> str:
    """Words in capitals that follow may have been taken for a part of the number."""
    found = match.group()
    ends = [i for i in range(15, len(found) + 1) if i == len(found) or not found[i].isalnum()]
    for end in reversed(ends):
        number = found[:end].replace(" ", "")
        digits = "".join(str(int(c, 36)) for c in number[4:] + number[:4])
        if 15 <= len(number) <= 34 and int(digits) % 97 == 1:
            return "<iban>" + found[end:]
    return found

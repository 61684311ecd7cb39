"""Strings on which tokenizers differ: white space, contractions, digits, scripts, emoji, marks, control bytes."""

# ruff: noqa: E501

_PIECES = [
    "", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n", "\n ", "a ", " a", "  a", "a  b", "a   b\n\n c", "\x00",
    "\x7f", "\u00a0", "\u2003x", "\u200b", "\ufeff", "\u3000", "\u0085", "\x1b[0m", "it's", "IT'S", "we'll've",
    "'s", " 's", "''s", "I'm you're he'd they've can't", "’s", "x'S", "1", "12", "123", "1234567890", "3.14159",
    "1,000,000", "½⅓", "²³", "٣٤٥", "१२३", "Ⅷ", "①", "0x1F", "1e-5", "é", "e\u0301", "ÀÉÎõü", "ß", "ﬁ", "Ω≈ç√∫",
    "日本語のテキスト", "中文分词", "한국어 텍스트", "العربية", "עברית", "ไทยไม่มีช่องว่าง", "हिन्दी", "русский текст", "ελληνικά", "ქართული",
    "😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪🇫🇷", "a😀b", "\U0001f9ff\U0001fae0", "𝔘𝔫𝔦", "𐍈", "\ufffd", "\u202eabc", "a\u0300\u0301\u0302",
    "...", "!!!", "?!", "—–-", "“quotes”", "$100", "#hash @at", "a/b\\c", "<html>", "{}[]()", "==!=<=>=", "_x__y", "**bold**",
    "|<|", "<|endoftext|>", "a<|endoftext|>b", "<|endoftext", "endoftext|>", "< |endoftext|>", "def f(x):\n    return x**2  # ok\n", "\tif x:\n\t\tpass",
    "CamelCaseWords", "snake_case_words", "ALLCAPS", "http://a.b/c?d=e&f=g#h", "a@b.co", "C:\\dir\\f.txt", "~`^", "x" * 300,
    " " * 200, "\n" * 50, "ab " * 80, "é" * 60, "😀" * 40, "1" * 100, "'" * 30, "a\nb\tc d\u00a0e", "trailing   ",
    "mixed日本語and English123", "π≈3.14…", "x\u0000y", "\u2028line\u2029para", "🤷🏻‍♀️ ok", "naïve café", "Ĝĉ Ċ Ġ", "Ġword", "▁word",
]  # fmt: skip

NASTY_STRINGS = list(dict.fromkeys(_PIECES))

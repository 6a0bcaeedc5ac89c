"""Shared lexer and parser of all text forms: graphs, types, sizes, pipelines, options, schemes, expressions."""

from qcompiler.text.lexer import NAME, Source, Token, legal_name
from qcompiler.text.reader import Reader
from qcompiler.text.values import WORDS, ValueReader

__all__ = ["NAME", "WORDS", "Reader", "Source", "Token", "ValueReader", "legal_name"]

"""TokenText: the bytes of each token, so that sampled ids are cut at a tag exactly, even inside a character."""

from transformers import PreTrainedTokenizerBase

from core.errors import UserError
from data.formats import encode

_PROBE = 'a é漢🙂\n\n<|x_y|> </x> $12.5$ = {"k": [1]}'


class TokenText:
    """id -> bytes, for byte-level BPE (Qwen, Llama 3, GPT) and for SentencePiece-like vocabularies (Gemma).

    Raises:
        UserError: the tokenizer's tokens do not join to the text they were made from (e.g. it adds a leading space).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = tokenizer.added_tokens_decoder
        self._without_text = set(tokenizer.all_special_ids) | {i for i, token in self._added.items() if token.special}
        self._byte_of_character = _byte_level_alphabet()
        learned_ids = [id_ for id_ in encode(tokenizer, _PROBE) if id_ not in self._added]
        learned_tokens = tokenizer.convert_ids_to_tokens(learned_ids)
        self._is_byte_level = all(c in self._byte_of_character for token in learned_tokens for c in token)
        self._cache: dict[int, bytes | None] = {}
        pieces = [self.bytes_of(id_) for id_ in encode(tokenizer, _PROBE)]
        if None in pieces or b"".join(piece for piece in pieces if piece is not None) != _PROBE.encode():
            raise UserError(
                f"the tokens of tokenizer `{tokenizer.name_or_path}` do not join to the text they were made from",
                expected="byte-level BPE, or a SentencePiece vocabulary without an added leading space",
                remedy="use a model with such a tokenizer (Qwen, Llama 3, Gemma, ...)",
            )

    def bytes_of(self, token_id: int) -> bytes | None:
        """UTF-8 bytes of one token (a part of a character, maybe); None for special tokens and unknown ids."""
        if token_id not in self._cache:
            self._cache[token_id] = self._look_up(token_id)
        return self._cache[token_id]

    def _look_up(self, token_id: int) -> bytes | None:
        if token_id in self._without_text or token_id >= len(self._tokenizer):
            return None
        if token_id in self._added:
            return self._added[token_id].content.encode()
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:
            return None
        if self._is_byte_level:
            return bytes(self._byte_of_character[c] for c in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()


def _byte_level_alphabet() -> dict[str, int]:
    """Character -> byte of GPT-2's byte-level BPE: printable Latin-1 bytes are themselves, the others U+0100 onward."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}

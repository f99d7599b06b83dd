"""Tokenizers without a file: bytes, words, and chat templates for them."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|pad|>", "<|begin|>"]


def by_bytes(template=None, begin=False, trim=False):
    """Bytes as tokens, so that what is labelled can be read back exactly; `begin`: it puts a token
    in front; `trim`: its offsets leave out spaces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL)
    inner.post_processor = processors.ByteLevel(trim_offsets=trim)
    if begin:
        at = [("<|begin|>", inner.token_to_id("<|begin|>"))]
        inner.post_processor = processors.TemplateProcessing("<|begin|> $A", special_tokens=at)
    end, pad, first = SPECIAL
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=end, pad_token=pad, bos_token=first
    )
    tokenizer.chat_template = template
    return tokenizer


def masked_words(n=20):
    """One token a word, w0 …, between [CLS] and [SEP], as BERT's."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(n))]
    ids = {word: i for i, word in enumerate(words)}
    inner = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    around = [("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    inner.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=around)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip

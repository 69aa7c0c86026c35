# SPDX-License-Identifier: MIT
"""Makes tests/data/tokenizer/ with the PyPI packages `tokenizers` and `sentencepiece`: tokenizer.py FOLDER

llama.json       BPE with byte fallback in the form of Llama and Mistral: spaces by Prepend and Replace
byte_level.json  BPE over bytes in the form of GPT-NeoX, with NFC
llama.model      SentencePiece's own form of a tokenizer such as llama.json
lines.safetensors: `lines`, the expected ids of both for each, and, for the first lines, those of variants of llama.json
(see variants()). A list of texts or of ids is a tensor of all of them and one of their lengths.

Lines and the text trained on come from a seeded recipe over the words and characters below.
"""

import io
import json
import random
import struct
import sys
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = {
    "english": "the river bends where old stones keep their quiet and nobody counts how many winters have passed since "
    "we were reading by a window while rain came over fields that children called endless it's don't we'll "
    "they've I'm you'd she's state space model attention shared weights language token sequence memory",
    "latin": "über Straße façade naïve año niño señor crème brûlée déjà vu Øresund smörgåsbord čeština žluťoučký kůň "
    "příliš ľalia łódź żółw ğ ışık çok güzel tiếng Việt người đường ngắn încă ștergar þorn æther",
    "cyrillic": "река течёт медленно под старым мостом и никто не помнит сколько зим прошло зелёный чай объект їжак "
    "ґанок щастя ўсход љубав џеп",
    "greek": "ο ποταμός κυλά αργά κάτω από τη γέφυρα και κανείς δεν θυμάται πόσοι χειμώνες πέρασαν θάλασσα ήλιος",
    "arabic": "يجري النهر ببطء تحت الجسر القديم ولا أحد يتذكر كم شتاء مضى شمس قمر مَدْرَسَة",
    "hebrew": "הנהר זורם לאט מתחת לגשר הישן ואיש אינו זוכר שָׁלוֹם",
    "devanagari": "नदी पुराने पुल के नीचे धीरे बहती है और किसी को याद नहीं कितनी सर्दियाँ बीत गईं हिन्दी क्षेत्र",
    "cjk": "河水 在 旧桥 下 慢慢 流 没有 人 记得 过 了 多少 个 冬天 語言 模型 川は 古い 橋の 下を ゆっくり 流れる カタカナ "
    "강물은 오래된 다리 아래로 천천히 흐른다",
    "code": "for(int i=0;i<n;++i) return x->next; std::vector<float> #include def f(self): if __name__ == '__main__': "
    '{"key": [1, 2.5e-3]} SELECT * FROM t; \\n 0x1F && || != https://example.org/a?b=c&d=%20',
    "numbers": "0 7 42 1984 3.14159 1,000,000 ½ ² ٣٤ १२३ Ⅷ 五 2024-02-29 12:30:59 −5 €20 50%",
}
PIECES = {
    "emoji": ["👩‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪", "😀", "❤️", "🧑🏿‍🚀", "☺", "🫠"],
    "marks": [
        "e\u0301",
        "a\u0308\u0323",
        "o\u0323\u0302",
        "q\u0307\u0323",
        "\u1100\u1161\u11a8",
        "\uac00\u11a8",
        "\u212b",
        "\u2126",
        "\ufb01",
        "\uf900",
        "\u0958",
        "n\u0303",
        "\u0301",
        "\u1e9b\u0323",
        "I\u0307",
        "\u0344",
        "\u2adc",
    ],
    "spaces": [
        " ",
        "  ",
        "   ",
        "       ",
        "\t",
        "\t\t",
        "\n",
        "\n\n",
        "\r\n",
        " \n ",
        "\u00a0",
        "\u3000",
        "\u2028",
        "\u200b",
        "\v\f",
        "\u0085",
    ],
    "control": [
        "\x00",
        "\x01\x02",
        "\x1b[0m",
        "\x7f",
        "\x9f",
        "\ufeff",
        "\u202e",
        "\u200d",
        "\ufffd",
        "\U000e0041",
        "\U0010ffff",
    ],
    "rare": ["𝔷𝔞𝔪", "𓀀𓁐", "ꙮ", "ᚠᛇᚻ", "བོད", "አማርኛ", "ქართული", "தமிழ்", "ไทยภาษา", "𠀋", "㍿", "⠿"],
    "special": [
        "<s>",
        "</s>",
        "<unk>",
        "<|left|>",
        "<|right|>",
        "single",
        "Normal",
        "▁",
        "▁▁",
        "<0x41>",
        "<|endoftext|>",
    ],
}
SPACE_RUNS = ["  ", "   ", "    ", "     ", "      ", "       ", "        "]
SCRIPT_RANGES = [
    (0x61, 0x7A),
    (0xC0, 0x17F),
    (0x391, 0x3C9),
    (0x410, 0x44F),
    (0x621, 0x64A),
    (0x905, 0x939),
    (0x4E00, 0x9FA5),
    (0x3041, 0x30FA),
    (0xAC00, 0xD7A3),
    (0x300, 0x36F),
    (0x21, 0x7E),
    (0x1F300, 0x1F64F),
]


def words(rng, kind, count):
    return " ".join(rng.choice(WORDS[kind].split()) for _ in range(count))


def line(rng):
    """Words of one kind most often; otherwise several kinds, characters of one script, or odd pieces among words."""
    form = rng.random()
    kind = rng.choice(list(WORDS))
    if form < 0.4:
        return words(rng, kind, rng.randint(1, 7))
    if form < 0.5:
        low, high = rng.choice(SCRIPT_RANGES)
        return "".join(chr(rng.randint(low, high)) if rng.random() < 0.85 else " " for _ in range(rng.randint(1, 14)))
    parts = []
    for _ in range(rng.randint(2, 5)):
        parts.append(
            words(rng, rng.choice(list(WORDS)), 1)
            if rng.random() < 0.45
            else rng.choice(PIECES[rng.choice(list(PIECES))])
        )
        parts.append(rng.choice(["", "", " "]))
    return "".join(parts)


def lines(count):
    rng = random.Random(1)
    fixed = [
        "",
        " ",
        "  ",
        "a",
        " a",
        "  a",
        "a ",
        "<s>",
        "<s><s>",
        " <s> a",
        "<|left|>",
        "a  <|left|>  b",
        "a  <|right|>  b",
        "singled",
        "single",
        "a single.",
        "singlé",
        "a_single",
        "Normal",
        "a Normal b",
        "Normally",
        "▁a",
        "\n",
        "'s 'S 'll",
        "a\n\n  b",
        "x  \n",
        "\t\tif (x)",
        "  \u3000 a",
        "hello      world",
        "1234 five6",
    ]
    return fixed + [line(rng) for _ in range(count - len(fixed))]


def made_up(rng, kind):
    """A word of two halves of others."""
    left, right = (rng.choice(WORDS[kind].split()) for _ in range(2))
    return left[: (len(left) + 1) // 2] + right[len(right) // 2 :]


def corpus():
    rng = random.Random(2)
    kinds = [rng.choice(list(WORDS)) for _ in range(9000)]
    return [words(rng, kind, 6) + " " + made_up(rng, kind) for kind in kinds] + ["e" * 16] * 40


def llama():
    trainer = trainers.BpeTrainer(
        vocab_size=2400,
        show_progress=False,
        max_token_length=16,
        special_tokens=["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)],
        limit_alphabet=300,
    )
    trained = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(corpus() + ["x = a    +  b"] * 40, trainer)
    model = json.loads(trained.to_str())["model"]
    # As in Llama, runs of spaces are tokens too.
    vocab, merges = model["vocab"], model["merges"]
    for left, right in [(1, 1), (2, 2), (2, 1), (4, 4)]:
        vocab["▁" * (left + right)] = len(vocab)
        merges.append(["▁" * left, "▁" * right])
    tokenizer = Tokenizer(
        models.BPE(vocab, [tuple(pair) for pair in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(
        ["<unk>", "<s>", "</s>", AddedToken("<|left|>", lstrip=True), AddedToken("<|right|>", rstrip=True)]
    )
    tokenizer.add_tokens(
        [AddedToken("single", single_word=True, normalized=False), AddedToken("Normal", normalized=True)]
    )
    text = json.loads(tokenizer.to_str())
    text["model"]["merges"] = [" ".join(pair) for pair in text["model"]["merges"]]  # the older spelling
    return text


def byte_level():
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.NFC()
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(
            vocab_size=2200,
            show_progress=False,
            max_token_length=16,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|endoftext|>", "<|padding|>"],
        ),
    )
    trained.decoder = decoders.ByteLevel()
    trained.post_processor = processors.ByteLevel(trim_offsets=True)
    trained.add_tokens([AddedToken(run, normalized=True) for run in SPACE_RUNS])
    return json.loads(trained.to_str())


def sentencepiece_model():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()[:3000]),
        model_writer=model,
        vocab_size=700,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def variants(base, byte_level):
    """Both files with other parts; tests/text/tokenizer.cpp makes the same changes."""

    def metaspace(**settings):
        return {"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", **settings}}

    template = {
        **base["post_processor"],
        "single": base["post_processor"]["single"] + base["post_processor"]["single"][:1],
    }
    steps = byte_level["pre_tokenizer"]
    no_fallback = {"model": {**base["model"], "byte_fallback": False}}
    of_llama = {
        "first": metaspace(prepend_scheme="first", split=False),
        "always": metaspace(prepend_scheme="always", split=True),
        "never": metaspace(prepend_scheme="never", split=False),
        "metaspace_decoder": {
            "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
            **metaspace(prepend_scheme="always", split=True),
        },
        "ignore_merges": {
            **metaspace(prepend_scheme="always", split=True),
            "model": {**base["model"], "ignore_merges": True, "merges": base["model"]["merges"][:200]},
        },
        "unk_fused": no_fallback,
        "unk": {"model": {**no_fallback["model"], "fuse_unk": False}},
        "template": {"post_processor": {"type": "Sequence", "processors": [template, byte_level["post_processor"]]}},
    }
    of_byte_level = {
        "spaced": {"normalizer": None, "pre_tokenizer": {**steps, "add_prefix_space": True}},
        "whole": {"pre_tokenizer": {**steps, "use_regex": False}},
    }
    return {name: {**base, **changes} for name, changes in of_llama.items()} | {
        name: {**byte_level, **changes} for name, changes in of_byte_level.items()
    }


class Tensors:
    def __init__(self):
        self.header, self.data = {}, []

    def add(self, name, dtype, code, values):
        raw = struct.pack(f"<{len(values)}{code}", *values)
        begin = sum(map(len, self.data))
        self.header[name] = {"dtype": dtype, "shape": [len(values)], "data_offsets": [begin, begin + len(raw)]}
        self.data.append(raw)

    def add_lists(self, name, dtype, code, lists):
        self.add(name, dtype, code, [value for one in lists for value in one])
        self.add(name + ".lengths", "U16", "H", [len(one) for one in lists])

    def write(self, path):
        header = json.dumps(self.header).encode()
        header += b" " * (-len(header) % 8)
        path.write_bytes(struct.pack("<Q", len(header)) + header + b"".join(self.data))


def main():
    folder = Path(sys.argv[1])
    texts = lines(2400)
    files = {"llama": llama(), "byte_level": byte_level()}
    tensors = Tensors()
    cases = {name: (file, texts) for name, file in files.items()}
    cases.update((name, (file, texts[:400])) for name, file in variants(files["llama"], files["byte_level"]).items())
    decoded = {}
    for name, (file, some) in cases.items():
        tokenizer = Tokenizer.from_str(json.dumps(file))
        ids = [tokenizer.encode(text).ids for text in some]
        tensors.add_lists(name, "U16", "H", ids)
        decoded[name] = [tokenizer.decode(one).encode() for one in ids]
    (folder / "llama.model").write_bytes(sentencepiece_model())
    library = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    tensors.add_lists("sentencepiece", "U16", "H", [library.encode(text) for text in texts[:400]])
    # Texts last, so that every tensor is aligned to its elements.
    tensors.add_lists("lines", "U8", "B", [text.encode() for text in texts])
    for name in ["first", "metaspace_decoder", "unk"]:
        tensors.add_lists(name + ".decoded", "U8", "B", decoded[name])
    tensors.write(folder / "lines.safetensors")
    for name, file in files.items():
        (folder / f"{name}.json").write_text(json.dumps(file, ensure_ascii=False, separators=(",", ":")) + "\n")


main()
